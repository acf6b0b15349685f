"""Weights from a projection onto the dual cone: what UPGrad and DualProj share."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxjd._checks import check_integer, check_num_losses, known
from jaxjd._sharding import replicated
from jaxjd.solvers import dual_cone
from jaxjd.weighting._certified import certified
from jaxjd.weighting._preference import Preference
from jaxjd.weighting._weighting import Weighting

# The rounding of float32, in float64 too: the choice of a precision should not change
# what a model learns.
NOISE_EPS = float(jnp.finfo(jnp.float32).eps)


class ProjectionState(NamedTuple):
    """The state of UPGrad and DualProj with a warm start."""

    solution: Float[Array, "... m"]
    """The weights of the last projections, with which the next search begins: [m, m]
    for UPGrad, [m] for DualProj."""


def projection(
    preference: Preference,
    bounds: Callable[[Float[Array, " m"]], Float[Array, "... m"]],
    shape: Callable[[int], tuple[int, ...]],
    *,
    noise_eps: float | Float[Array, ""] | None,
    norm_eps: float | Float[Array, ""] | None,
    reg_eps: float | Float[Array, ""] | None,
    warm_start: bool,
    num_losses: int | None,
    certificate: bool,
) -> Weighting:
    """Make a weighting whose weights are the sum of the projections of combinations.

    **Arguments:**

    - `preference`: that of the method.
    - `bounds`: from the preference to the combinations of gradients to project.
    - `shape`: from m to the shape of the combinations.
    - The others: as [`jaxjd.weighting.upgrad`][].
    """
    dual_cone.check_regularisation(noise_eps, norm_eps, reg_eps)
    if noise_eps is None and reg_eps is None:
        noise_eps = NOISE_EPS
    size = num_losses
    if size is not None:
        size = check_integer("num_losses", size, least=1)
    if warm_start and size is None:
        raise ValueError(
            "`num_losses` must be given with `warm_start=True`: the state holds the "
            "projections of that many losses."
        )

    def init():
        # With `warm_start` the size is given, as checked above.
        if not warm_start or size is None:
            return optax.EmptyState()
        return ProjectionState(jnp.zeros(shape(known("num_losses", size))))

    def solve(gramian, mask, state, _, preferred):
        if warm_start:
            check_num_losses(len(state.solution.T), gramian)
        elif isinstance(size, int):
            check_num_losses(size, gramian)
        solution, proof = dual_cone.projection(
            bounds(preferred),
            gramian,
            noise_eps=noise_eps,
            norm_eps=norm_eps,
            reg_eps=reg_eps,
            initial=state.solution if warm_start else None,
            certified=certificate,
        )
        if warm_start:
            state = ProjectionState(solution)
        weights = solution.reshape(-1, gramian.shape[0]).sum(axis=0)
        return replicated(weights), state, proof

    return certified(solve, init=init, certificate=certificate, preference=preference)
