"""Find the shortest convex combination of the gradients."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxjd._checks import check_gramian, check_max_iterations
from jaxjd._numerics import all_finite, matmul, unit_diagonal
from jaxjd._sharding import on_every_device
from jaxjd.solvers._certificate import Certificate, certificate, rounding
from jaxjd.solvers.least_distance import Step, find_step, relative_residual


class SimplexMinimum(NamedTuple):
    """What [`jaxjd.solvers.minimise_on_simplex`][] returns."""

    solution: Float[Array, " m"]
    """The weights of the combination."""
    certificate: Certificate
    r"""How close the combination is to the shortest, relative to
    $\sum_j \alpha_j \|g_j\|$."""


@on_every_device
def minimise_on_simplex(
    gramian: Float[Array, "m m"],
    *,
    mask: Bool[Array, " m"] | None = None,
    max_iterations: int | None = None,
) -> SimplexMinimum:
    r"""Minimise $\tfrac12 \alpha^\top G \alpha$ over the simplex: MGDA's problem.

    $J^\top \alpha$ is the point of the convex hull of the gradients that is closest to
    the origin. Its weights are proportional to the multipliers of the shortest step
    along which every loss makes the same progress, [`jaxjd.solvers.least_distance`][].
    If there is no such step, they are proportional to the proof of that, a combination
    that vanishes.

    The weights are differentiable in reverse mode, as those of
    [`jaxjd.solvers.project_dual_cone`][] are. If a gradient is zero, the minimum is 0,
    and the zero gradients share the weight.

    **Arguments:**

    - `gramian`: $G = J J^\top$, symmetric positive semidefinite, which is not checked.
      Types narrower than float32 are solved in float32.
    - `mask`: False for losses that are left out. Their weight is 0.
    - `max_iterations`: by default that of [`jaxjd.solvers.project_dual_cone`][].

    **Returns:** the weights, nonnegative and of sum 1, and their certificate. NaN or
    infinity in G gives NaN.

    **Raises:** `ValueError` or `TypeError` if `gramian` is not a square matrix of real
    floats, `mask` does not have one entry per row of it, or `max_iterations` is below
    1.

    **Reference:** Désidéri (2012), Comptes Rendus Math. 350, section 2.

    **Example:**

    >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    >>> jaxjd.solvers.minimise_on_simplex(J @ J.T).solution
    Array([0.6, 0.4], dtype=float32)
    """
    G = check_gramian(gramian)
    check_max_iterations(max_iterations)
    m = G.shape[0]
    present = jnp.ones(m, bool) if mask is None else jnp.asarray(mask)
    if present.shape != (m,):
        raise ValueError(f"`mask` must have shape ({m},). Got {present.shape}.")
    G = jnp.where(present[:, None] & present[None, :], G, 0)
    scaled = unit_diagonal(G, constant_norms=True)
    zero = (scaled.norms == 0) & present
    # A zero gradient is owed no progress, so that the problem of the others is solved.
    levels = jnp.where(scaled.norms == 0, 0, 1).astype(G.dtype)
    shortest = find_step(G, levels, max_iterations)

    any_zero = jnp.any(zero)
    combined = jnp.where(any_zero, zero.astype(G.dtype), shortest.solution)
    total = jnp.sum(combined)
    # If every loss is missing, there is nothing to combine.
    weights = combined / jnp.where(total == 0, 1, total)
    weights = jnp.where(all_finite(G), weights, jnp.nan)
    residual = _residual(
        *lax.stop_gradient((scaled.C, scaled.norms * weights, shortest))
    )
    # With zero gradients the answer does not come from the search.
    residual = jnp.where(any_zero, weights[0] * 0, residual)
    proof = certificate(residual, shortest.iterations, shortest.finished | any_zero)
    return SimplexMinimum(weights, proof)


def _residual(
    C: Float[Array, "m m"], shares: Float[Array, " m"], shortest: Step
) -> Float[Array, ""]:
    """Bound the distance to the shortest combination, from that to the shortest step.

    The combination of a step x is x / |x|^2. So the combinations of two steps x and x*
    are |x - x*| / (|x| |x*|) apart.
    """
    total = jnp.sum(shares)
    squared = jnp.vdot(shares, matmul(C, shares)) + rounding(shares) * total
    length = jnp.sqrt(jnp.maximum(squared, 0))
    relative = relative_residual(shortest)
    bounded = relative < 0.5
    # No point of the hull is further from the shortest than from 0.
    relative = jnp.where(bounded, relative / jnp.where(bounded, 1 - relative, 1), 1)
    relative = jnp.where(shortest.feasible, relative, 1)
    return relative * length / jnp.where(total > 0, total, 1)
