"""Which convex combination of the gradients is the shortest?"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxjd.solvers._certificate import Certificate
from jaxjd.solvers._checks import as_gramian, check_max_iterations
from jaxjd.solvers._face_cg import matmul
from jaxjd.solvers._scaling import Scaled, unit_diagonal
from jaxjd.solvers.dual_cone import project_dual_cone


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
    gramian: Float[Array, "m m"], *, max_iterations: int | None = None
) -> SimplexMinimum:
    r"""Minimise $\tfrac12 \alpha^\top G \alpha$ over the simplex: MGDA's problem.

    $J^\top \alpha$ is the point of the convex hull of the gradients that is closest to
    the origin. It is found as a projection onto a dual cone. Give every gradient one
    more coordinate, $\sqrt t$, and let $p = (0, \ldots, 0, 1)$. The nonnegative
    combination of the longer gradients that is closest to p has weights that are
    proportional to $\alpha$, for any $t > 0$. Its residual, up to its sign, is the
    projection of $-p$ onto the dual cone of the longer gradients and of $-p$.

    Differentiable in reverse mode, as [`jaxjd.solvers.project_dual_cone`][] is. Where a
    gradient is zero the minimum is 0, and the zero gradients share the weight.

    **Arguments:**

    - `gramian`: $G = J J^\top$, symmetric positive semidefinite, which is not checked.
      Types narrower than float32 are solved in float32.
    - `max_iterations`: by default that of [`jaxjd.solvers.project_dual_cone`][].

    **Returns:** the weights, nonnegative and of sum 1, and their certificate. NaN or
    infinity in G gives NaN.

    **Raises:** `ValueError` or `TypeError` if `gramian` is not a square matrix of real
    floats, or `max_iterations` is below 1.

    **Reference:** Désidéri (2012), Comptes Rendus Math. 350, section 2, for the
    problem; Lawson & Hanson (1974), Solving Least Squares Problems, chapter 23, for
    least distance as nonnegative least squares.
    """
    G = as_gramian(gramian)
    check_max_iterations(max_iterations)
    m = G.shape[0]
    scaled = unit_diagonal(G)
    zero = scaled.norms == 0

    # With t the least squared norm, t is at least the minimum: of p a half or more is
    # left in the span, and the sum below cannot be lost in rounding.
    h = jnp.min(jnp.where(zero, jnp.inf, scaled.norms)) * scaled.inverse_norms
    h = jnp.where(jnp.isfinite(h), h, 0)
    longer = jnp.block(
        [
            [jnp.ones((1, 1), G.dtype), -h[None, :]],
            [-h[:, None], scaled.C + h[:, None] * h[None, :]],
        ]
    )
    target = jnp.zeros(m + 1, G.dtype).at[0].set(1)
    projection = project_dual_cone(target, longer, max_iterations=max_iterations)

    combined = h * projection.solution[1:]
    total = jnp.sum(combined)
    any_zero = jnp.any(zero)
    weights = jnp.where(any_zero, zero.astype(G.dtype), combined)
    weights = weights / jnp.where(any_zero, jnp.sum(zero).astype(G.dtype), total)
    weights = jnp.where(jnp.all(jnp.isfinite(G)), weights, jnp.nan)
    certificate = _certify(scaled, weights, projection.certificate)
    return SimplexMinimum(weights, certificate)


def _certify(
    scaled: Scaled, weights: Float[Array, " m"], projection: Certificate
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
