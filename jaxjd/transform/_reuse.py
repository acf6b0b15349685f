"""Weights that are computed only in every k-th step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jaxtyping import Array, Float, Int


class Reused(NamedTuple):
    """The weights that are in use.

    - `weights`: [m], or [g, m] for g groups of parameters.
    - `age`: how many steps have used them, [], from 0 to k - 1. At 0 new ones are due.
    """

    weights: Float[Array, "... m"]
    age: Int[Array, ""]


class Computed(NamedTuple):
    """What a step computes.

    - `update`: `Jᵀ w`.
    - `weights`: w.
    - `state`: that of the weighting.
    - `diagnostics`: a `Diagnostics`, or empty if none are kept.
    """

    update: optax.Updates
    weights: Float[Array, "... m"]
    state: Any
    diagnostics: Any


def in_every(
    period: int | Int[Array, ""],
    reused: Reused,
    compute: Callable[[], Computed],
    reuse: Callable[[Float[Array, "... m"]], Computed],
) -> tuple[Computed, Reused]:
    """Compute weights if they are due, else reuse the last ones.

    Weights that are not finite are not kept, and new ones stay due: otherwise one bad
    batch would spoil k steps.
    """

    def fresh() -> Computed:
        found = compute()
        return found._replace(weights=found.weights.astype(reused.weights.dtype))

    due = reused.age == 0
    if isinstance(due, Tracer):
        found = jax.lax.cond(due, fresh, lambda: reuse(reused.weights))
    else:  # A branch of `cond` would be compiled anew in each step.
        found = fresh() if due else reuse(reused.weights)
    finite = jnp.isfinite(found.weights).all()
    weights = jnp.where(finite, found.weights, reused.weights)
    age = jnp.where(due & ~finite, 0, (reused.age + 1) % period)
    return found, Reused(weights, age.astype(reused.age.dtype))
