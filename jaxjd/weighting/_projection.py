"""Weights from a projection onto the dual cone: what UPGrad and DualProj share."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from jaxjd._checks import check_integer, check_num_losses, known, present_only
from jaxjd.solvers import Certificate, project_dual_cone
from jaxjd.solvers.dual_cone import check_regularisation
from jaxjd.weighting._certified import unused, worst
from jaxjd.weighting._weighting import Weighting

# The rounding of float32, in float64 too: the choice of a precision should not change
# what a model learns.
NOISE_EPS = float(jnp.finfo(jnp.float32).eps)


class ProjectionState(NamedTuple):
    """The state of UPGrad and DualProj."""

    solution: Float[Array, "... m"] | None
    """The weights of the last projections, with which the next search begins: [m, m]
    for UPGrad, [m] for DualProj. None without `warm_start`."""
    certificate: Certificate | None
    """Of the last step: the worst of all rows in every field, each a scalar. None
    without `certificate`."""


def projection(
    bounds: Callable[[Float[Array, "m m"], Bool[Array, " m"]], Float[Array, "... m"]],
    shape: Callable[[int], tuple[int, ...]],
    *,
    noise_eps: float | Float[Array, ""] | None,
    norm_eps: float | Float[Array, ""] | None,
    reg_eps: float | Float[Array, ""] | None,
    warm_start: bool,
    num_losses: int | None,
    certificate: bool,
) -> Weighting:
    """Weights that are the sum of the projections of some combinations of gradients.

    **Arguments:**

    - `bounds`: from a Gramian and a mask to the combinations.
    - `shape`: of the combinations of m losses.
    - The others: as [`jaxjd.weighting.upgrad`][].
    """
    check_regularisation(noise_eps, norm_eps, reg_eps)
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
        if not (warm_start or certificate):
            return optax.EmptyState()
        solution = None
        if warm_start and size is not None:  # The latter is checked above.
            solution = jnp.zeros(shape(known("num_losses", size)))
        return ProjectionState(solution, unused() if certificate else None)

    def update(gramian, state, /, *, mask=None, **extra_args):
        del extra_args  # For other links of the chain.
        gramian, mask = present_only(gramian, mask)
        if warm_start:
            check_num_losses(len(state.solution.T), gramian)
        elif isinstance(size, int):
            check_num_losses(size, gramian)
        projected = project_dual_cone(
            bounds(gramian, mask),
            gramian,
            noise_eps=noise_eps,
            norm_eps=norm_eps,
            reg_eps=reg_eps,
            initial=state.solution if warm_start else None,
        )
        if certificate:
            worst_row = worst(projected.certificate, state.certificate)
            state = state._replace(certificate=worst_row)
        if warm_start:
            # After a batch that is not finite this is NaN, from which the solver does
            # not begin: the next search is a cold one.
            solution = projected.solution.astype(state.solution.dtype)
            state = state._replace(solution=solution)
        return projected.solution.reshape(-1, gramian.shape[0]).sum(axis=0), state

    return Weighting(init, update)
