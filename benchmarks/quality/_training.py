"""Train a problem by a method, over seeds and learning rates in one compiled call."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int, Key

import jaxjd
from benchmarks.quality._methods import (
    Method,
    is_shared,
    one_loss_per_step,
    optimizer,
)
from benchmarks.quality._problem import Batch, Params, Problem

STAGES = 10  # How often a run is measured.


def step_of(
    problem: Problem, method: Method, tx: optax.GradientTransformation
) -> Callable[..., Any]:
    """One step: of the number of the step, its batches, and the carry."""
    tx = optax.with_extra_args_support(tx)
    value_and_jac = jaxjd.value_and_jac(problem.losses, in_axes=problem.in_axes)
    in_turn = one_loss_per_step(problem, method)

    def cross_gramian(params: Params, batches: Sequence[Batch]) -> Float[Array, "m m"]:
        jacs = [value_and_jac(params, *batch)[1] for batch in batches]
        if problem.labels is not None:
            mask = mask_of_shared(problem.labels, params)
            jacs = [jac.restrict(mask) for jac in jacs]
        return jacs[0].cross_gramian(jacs[1])

    def step(number: Int[Array, ""], batches: Sequence[Batch], carry: Any) -> Any:
        params, state, after = carry
        losses, jac = value_and_jac(params, *batches[0])
        extra: dict[str, Any] = {"losses": losses} if method.of_losses else {}
        if method.after:
            extra["losses_after"] = after
        if method.of_two_batches:
            extra["cross_gramian"] = cross_gramian(params, batches[1:])
        if in_turn:
            extra["index"] = number % problem.num_losses
        updates, state = tx.update(jac, state, params, **extra)
        params = optax.apply_updates(params, updates)
        if method.after:
            after = value_and_jac(params, *batches[0])[0]
        return params, state, after

    return step


def cosine(rate: Float[Array, ""], steps: Int[Array, ""]) -> optax.Schedule:
    """As `optax.cosine_decay_schedule`, which needs to know the steps beforehand."""
    return lambda count: rate * (1 + jnp.cos(jnp.pi * count / steps)) / 2


def mask_of_shared(labels: Any, params: Params) -> Any:
    return jax.tree.map(
        lambda shared, part: jax.tree.map(lambda _: shared, part),
        is_shared(labels),
        params,
    )


def runs(problem: Problem, method: Method) -> Callable[..., dict[str, Array]]:
    """A function of keys [seeds], rates [rates] and the steps between measurements.

    It returns all measures and `"validation"`, [rates, seeds, stages]. Rates decay to
    zero over the run, as a cosine does.
    """

    def run(
        key: Key[Array, ""], rate: Float[Array, ""], steps: Int[Array, ""]
    ) -> dict[str, Float[Array, " stages"]]:
        of_params, of_batches = jax.random.split(key)
        params = problem.init(of_params)
        tx = optimizer(problem, method, cosine(rate, STAGES * steps))
        step = step_of(problem, method, tx)

        def batches(number: Int[Array, ""]) -> list[Batch]:
            # The first batch is the same for all methods.
            key = jax.random.fold_in(of_batches, number)
            found = [problem.batch(key)]
            if method.of_two_batches:
                found += map(problem.batch, jax.random.split(key))
            return found

        def stage(carry: Any, first: Int[Array, ""]) -> Any:
            carry = lax.fori_loop(
                first,
                first + steps,
                lambda number, carry: step(number, batches(number), carry),
                carry,
            )
            return carry, problem.measure(carry[0])

        after = ()
        if method.after:
            losses = problem.losses
            if problem.in_axes is not None:
                losses = jax.vmap(losses, problem.in_axes)
            after = losses(params, *problem.batch(of_batches))
        start = params, tx.init(params), after
        _, measured = lax.scan(stage, start, steps * jnp.arange(STAGES))
        return measured

    over_seeds = jax.vmap(run, (0, None, None))
    return jax.vmap(over_seeds, (None, 0, None))
