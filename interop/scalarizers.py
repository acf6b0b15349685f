"""Compare the scalarizers: the scalar, and its gradient in the losses.

`METHODS` is a table like the one in `interop.aggregators`. Those with a state are
compared over 20 steps, in which each library learns its scales by its own Adam.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import torch
import torchjd.scalarization as reference

import jaxjd
from jaxjd.weighting._random import random_weights

from . import aggregators
from .aggregators import (
    Bounds,
    Inputs,
    Method,
    Ours,
    inputs,
    only,
    preference,
    preferred,
)
from .check import Check
from .jacobians import normal
from .steps import NUM_STEPS, steps

# Ten times what was measured. In float32 Adam divides small gradients by their norms.
BOUNDS: Bounds = {"float32": 2e-5, "float64": 1e-14}
# TorchJD adds 1e-12 to the square of PBI's distance.
OF_PBI: Bounds = {"float32": 2e-6, "float64": 2e-12}
RATE = 0.05
EPOCH = 3


def checks() -> list[Check]:
    return [
        *(aggregators.check("scalarizer", row) for row in METHODS),
        *(aggregators.check(f"scalarizer, {NUM_STEPS} steps", row) for row in STEPS),
    ]


def with_gradient(
    update: Callable[..., Any],
) -> Callable[[Inputs, Any, Any], tuple[jax.Array, Any]]:
    """The scalar and its gradient [1 + m], and the state."""

    def step(inputs: Inputs, draws: Any, state: Any) -> tuple[jax.Array, Any]:
        def scalar(losses: jax.Array) -> tuple[jax.Array, Any]:
            return update(losses, state, draws)

        (value, new), gradient = jax.value_and_grad(scalar, has_aux=True)(inputs.losses)
        return jnp.concatenate([value[None], gradient]), new

    return step


def ours(make: Callable[[int], jaxjd.Scalarizer]) -> Callable[[int, int], Ours]:
    def for_shape(m: int, n: int) -> Ours:
        del n
        scalarizer = make(m)

        def update(losses: jax.Array, state: Any, draws: Any) -> Any:
            del draws
            # As if all steps had the same batch: FAMO learns from the step before.
            return scalarizer.update(losses, state, losses_after=losses)

        return Ours(scalarizer.init, with_gradient(update))

    return for_shape


def of_normals(m: int, n: int) -> Ours:
    """Random weights from given normal numbers."""
    del m, n

    def update(losses: jax.Array, state: Any, normals: jax.Array) -> Any:
        weights = random_weights(normals, jnp.ones(losses.shape, bool))
        return jnp.vdot(weights, losses), state

    return Ours(tuple, with_gradient(update))


def theirs(
    make: Callable[[int, torch.dtype], reference.Scalarizer],
) -> Callable[[int, torch.dtype], Callable[[torch.Tensor], torch.Tensor]]:
    def for_size(m: int, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
        scalarizer = make(m, dtype).to(dtype)
        learned = [] if isinstance(scalarizer, reference.FAMO) else scalarizer
        parameters = [p for p in getattr(learned, "parameters", list)()]
        optimizer = torch.optim.Adam(parameters, RATE) if parameters else None
        calls = 0

        def call(losses: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            if isinstance(scalarizer, reference.FAMO) and calls:
                scalarizer.update(losses)
            losses = losses.clone().requires_grad_()
            value = scalarizer(losses)
            value.backward()
            calls += 1
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()
            if isinstance(scalarizer, reference.DWA) and calls % EPOCH == 0:
                scalarizer.step()
            assert losses.grad is not None
            return torch.cat([value.detach()[None], losses.grad])

        return call

    return for_size


def some() -> list[list[Inputs]]:
    return [[inputs(normal(6, 12, seed))] for seed in range(4)]


def below(m: int) -> list[float]:
    """A reference point below the losses."""
    return [0.1 * i / m - 0.05 for i in range(m)]


def tensor(values: list[float], dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def row(
    name: str,
    make: Callable[[int], jaxjd.Scalarizer],
    their: Callable[[int, torch.dtype], reference.Scalarizer],
    sequences: Callable[[], list[list[Inputs]]] = some,
    bounds: Bounds = BOUNDS,
) -> Method:
    return Method(name, ours(make), theirs(their), "losses", sequences, bounds)


s = jaxjd.scalarization

METHODS = [
    row("mean", lambda m: s.mean(), lambda m, dtype: reference.Mean()),
    row("sum", lambda m: s.sum(), lambda m, dtype: reference.Sum()),
    row(
        "constant",
        lambda m: s.constant(preference(m)),
        lambda m, dtype: reference.Constant(preferred(m, dtype)),
    ),
    Method(
        "random, same normal numbers",
        of_normals,
        theirs(lambda m, dtype: reference.Random()),
        "losses",
        some,
        BOUNDS,
        draws=only,
    ),
    row(
        "geometric_mean",
        lambda m: s.geometric_mean(),
        lambda m, dtype: reference.GeometricMean(),
    ),
    *(
        row(
            f"stch, smoothing = {mu:g}",
            lambda m, mu=mu: s.stch(mu),
            lambda m, dtype, mu=mu: reference.STCH(mu),
        )
        for mu in (0.01, 1.0)
    ),
    row(
        "stch, preference, reference",
        lambda m: s.stch(0.1, preference(m), reference=below(m)),
        lambda m, dtype: reference.STCH(
            0.1, preferred(m, dtype), tensor(below(m), dtype)
        ),
    ),
    row(
        "cosmos",
        lambda m: s.cosmos(1.5, preference(m)),
        lambda m, dtype: reference.COSMOS(1.5, preferred(m, dtype)),
    ),
    row(
        "pbi",
        lambda m: s.pbi(5.0, preference(m)),
        lambda m, dtype: reference.PBI(5.0, preferred(m, dtype)),
        bounds=OF_PBI,
    ),
    row(
        "pbi, reference",
        lambda m: s.pbi(0.5, preference(m), reference=below(m)),
        lambda m, dtype: reference.PBI(
            0.5, preferred(m, dtype), tensor(below(m), dtype)
        ),
        bounds=OF_PBI,
    ),
]

STEPS = [
    row(
        "uw",
        lambda m: s.uw(num_losses=m, optimizer=optax.adam(RATE)),
        lambda m, dtype: reference.UW(m),
        steps,
    ),
    row(
        "imtl_l",
        lambda m: s.imtl_l(num_losses=m, optimizer=optax.adam(RATE)),
        lambda m, dtype: reference.IMTLL(m),
        steps,
    ),
    row(
        "dwa",
        lambda m: s.dwa(num_losses=m, epoch_steps=EPOCH, temperature=0.5),
        lambda m, dtype: reference.DWA(0.5),
        steps,
    ),
    row(
        "famo",
        lambda m: s.famo(num_losses=m),
        lambda m, dtype: reference.FAMO(m),
        steps,
    ),
    row(
        "famo, lower bounds",
        lambda m: s.famo(num_losses=m, reference=below(m)),
        lambda m, dtype: reference.FAMO(m, tensor(below(m), dtype)),
        steps,
    ),
]
