"""Which convex combination of the gradients is the shortest?"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxjd._checks import check_gramian, check_max_iterations
from jaxjd._numerics import UnitDiagonal, matmul, unit_diagonal
from jaxjd.solvers._certificate import Certificate
from jaxjd.solvers.least_distance import least_distance


class SimplexMinimum(NamedTuple):
    """What [`jaxjd.solvers.minimise_on_simplex`][] returns."""

    solution: Float[Array, " m"]
    """The weights of the combination."""
    certificate: Certificate
    r"""How well the KKT conditions hold.

    Here, with $d = \sqrt{\operatorname{diag} G}$, $s = \|d \circ \alpha\|_2$ and
    $y_j = ((G \alpha)_j - \alpha^\top G \alpha) / (s \max(d_j, s))$, `primal` is how
    far the weights are from the simplex, `dual` is $\max_j (-y_j)_+$ and
    `complementarity` is $\max_j \alpha_j d_j |y_j| / s$.
    """


def minimise_on_simplex(
    gramian: Float[Array, "m m"],
    *,
    mask: Bool[Array, " m"] | None = None,
    max_iterations: int | None = None,
) -> SimplexMinimum:
    r"""Minimise $\tfrac12 \alpha^\top G \alpha$ over the simplex: MGDA's problem.

    $J^\top \alpha$ is the point of the convex hull of the gradients that is closest to
    the origin. Its weights are proportional to the multipliers of the shortest step
    along which every loss makes the same progress, [`jaxjd.solvers.least_distance`][];
    or, where there is none, to the proof of that: a combination that vanishes.

    Differentiable in reverse mode, as [`jaxjd.solvers.project_dual_cone`][] is. Where a
    gradient is zero the minimum is 0, and the zero gradients share the weight.

    **Arguments:**

    - `gramian`: $G = J J^\top$, symmetric positive semidefinite, which is not checked.
      Types narrower than float32 are solved in float32.
    - `mask`: False for losses that are left out. Their weight is 0.
    - `max_iterations`: by default that of [`jaxjd.solvers.project_dual_cone`][].

    **Returns:** the weights, nonnegative and of sum 1, and their certificate. NaN or
    infinity in G gives NaN.

    **Raises:** `ValueError` or `TypeError` if `gramian` is not a square matrix of real
    floats, `mask` has not one entry per row of it, or `max_iterations` is below 1.

    **Reference:** Désidéri (2012), Comptes Rendus Math. 350, section 2.
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
    # Those without a gradient are not owed any progress, so that the rest is solved.
    levels = jnp.where(scaled.norms == 0, 0, 1).astype(G.dtype)
    shortest = least_distance(G, levels, max_iterations=max_iterations)

    any_zero = jnp.any(zero)
    combined = jnp.where(any_zero, zero.astype(G.dtype), shortest.solution)
    total = jnp.sum(combined)
    # Only where every loss is missing is there nothing to combine.
    weights = combined / jnp.where(total == 0, 1, total)
    weights = jnp.where(jnp.all(jnp.isfinite(G)), weights, jnp.nan)
    certificate = _certify(scaled, weights, shortest.certificate)
    return SimplexMinimum(weights, certificate)


def _certify(
    scaled: UnitDiagonal, weights: Float[Array, " m"], projection: Certificate
) -> Certificate:
    C, weights = lax.stop_gradient((scaled.C, weights))
    m, eps = weights.shape[0], float(jnp.finfo(weights.dtype).eps)
    norms = scaled.norms
    size = jnp.linalg.norm(norms * weights)
    share = norms * weights / jnp.where(size > 0, size, 1)
    cosines = matmul(C, share)
    # Divided by the larger of two norms: rounding moves the minimum by eps size^2.
    largest = jnp.maximum(norms, size)
    largest = jnp.where(largest > 0, largest, 1)
    slack = (norms * cosines - size * jnp.sum(share * cosines)) / largest
    # What is left out is not compared.
    slack = jnp.where(norms > 0, slack, 0)
    primal = jnp.abs(jnp.sum(weights) - 1) + jnp.max(jnp.maximum(-weights, 0))
    dual = jnp.max(jnp.maximum(-slack, 0))
    complementarity = jnp.max(jnp.abs(share * slack))
    bound = 32 * eps * (m + 1) ** 0.5
    residual = jnp.maximum(jnp.maximum(primal, dual), complementarity)
    # With zero gradients the answer does not come from the projection.
    finished = projection.converged | jnp.any(norms == 0)
    return Certificate(
        primal,
        dual,
        complementarity,
        projection.iterations,
        finished & (residual <= bound),
    )
