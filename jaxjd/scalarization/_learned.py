"""Scales of the losses that are learned beside the parameters, by gradient descent."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from jaxjd._checks import check_integer, known
from jaxjd.scalarization._scalarizer import Scalarizer, finite_losses, scalarizer
from jaxjd.weighting._weighting import keep_unless

# The rate of Adam in the experiments of GradNorm, for its weights and for those of UW.
LEARNING_RATE = 0.025

Parameters = TypeVar("Parameters")


class LearnedState(NamedTuple):
    """The state of a method that learns a scale for each loss.

    - `scales`: what is learned [m].
    - `optimizer`: the state of the optimizer that learns it.
    """

    scales: Float[Array, " m"]
    optimizer: optax.OptState


def learned(
    method: str,
    scalar: Callable[
        [Float[Array, " m"], Bool[Array, " m"], Float[Array, " m"]], Float[Array, ""]
    ],
    num_losses: int,
    optimizer: optax.GradientTransformation | None,
) -> Scalarizer:
    """A scalarizer that descends, by an optimizer of its own, in its scales as well.

    **Arguments:**

    - `method`: its name, for messages.
    - `scalar`: of the losses, the mask and the scales, which start from zero.

    **Raises:** `TypeError` or `ValueError` if `num_losses` is not a positive integer,
    or `optimizer` is not an optimizer.
    """
    size = check_integer("num_losses", num_losses, least=1)
    tx = check_optimizer(optimizer)

    def init():
        return start(jnp.zeros(known("num_losses", size)), tx)

    def with_state(values, mask, state, **extra_args):
        del extra_args  # For other links of the chain.
        check_length_of_state(state.scales, values)
        scales = state.scales.astype(values.dtype)
        result, gradient = jax.value_and_grad(scalar, argnums=2)(values, mask, scales)
        return result, step(state, gradient, mask, finite_losses(values, mask), tx)

    return scalarizer(method, with_state, init)


def check_optimizer(
    optimizer: optax.GradientTransformation | None,
) -> optax.GradientTransformation:
    """An optimizer, by default Adam.

    **Raises:** `TypeError` if it is anything else.
    """
    if optimizer is None:
        return optax.adam(LEARNING_RATE)
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(
            "`optimizer` must be an optimizer of optax, such as optax.adam(1e-3). Got "
            f"{optimizer!r}."
        )
    return optimizer


def check_length_of_state(
    scales: Float[Array, " m"], values: Float[Array, " k"]
) -> None:
    """**Raises:** `ValueError` if there are not as many losses as scales."""
    if scales.shape != values.shape:
        raise ValueError(
            f"`losses` must be num_losses={len(scales)} losses, for which the state "
            f"was made. Got {len(values)}."
        )


def start(
    scales: Float[Array, " m"], optimizer: optax.GradientTransformation
) -> LearnedState:
    """The state before the first step."""
    return LearnedState(scales, optimizer.init(scales))


def step(
    state: LearnedState,
    gradient: Float[Array, " m"],
    mask: Bool[Array, " m"],
    take: Bool[Array, ""],
    optimizer: optax.GradientTransformation,
) -> LearnedState:
    """Descend. A missing loss keeps its scale, and without `take` all is as it was."""
    scales = state.scales
    gradient = jnp.where(mask, gradient, 0).astype(scales.dtype)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes.
        change, after = optimizer.update(gradient, state.optimizer, scales)
        moved = jnp.asarray(optax.apply_updates(scales, change))
    new = LearnedState(jnp.where(mask, moved, scales), after)
    return keep_unless(take, new, state)
