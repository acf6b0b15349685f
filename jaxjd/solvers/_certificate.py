"""Bound the distance between what a solver returned and the solution."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxjd._numerics import matmul


class Certificate(NamedTuple):
    r"""How far the update of a solver can be from the exact one.

    The fields mean the same for every solver.
    """

    residual: Float[Array, "..."]
    r"""A bound on the distance between the update $J^\top w$ and that of the exact
    solution for the same Gramian, relative to a norm that each solver names. It is
    computed anew from the returned weights, and includes its own rounding. So float32
    cannot prove much less than $10^{-3}$, nor float64 much less than $10^{-7}$. The
    distance itself is usually hundreds of times smaller."""
    iterations: Int[Array, ""]
    """The iterations of the method, for all rows together."""
    converged: Bool[Array, "..."]
    r"""Whether the method ended by itself and the residual is at most
    $256 \sqrt{\epsilon}$: 0.09 in float32, 4e-6 in float64. It is also False if the
    gradients are so nearly opposed that the precision cannot prove that."""


def certificate(
    residual: Float[Array, "..."],
    iterations: Int[Array, ""],
    finished: Bool[Array, "..."],
) -> Certificate:
    """Make the certificate of a residual, which must be small to count as converged.

    A residual of NaN means that nothing is known: not converged.
    """
    residual, iterations, finished = lax.stop_gradient((residual, iterations, finished))
    explained = 256 * float(jnp.finfo(residual.dtype).eps) ** 0.5
    return Certificate(residual, iterations, finished & (residual <= explained))


def rounding(z: Float[Array, "... m"]) -> Float[Array, "..."]:
    """Estimate the rounding of each entry of C z, for a matrix C of cosines."""
    return 2 * float(jnp.finfo(z.dtype).eps) * jnp.linalg.norm(z, axis=-1)


def distance_bound(
    C: Float[Array, "m m"],
    x: Float[Array, "k m"],
    y: Float[Array, "k m"],
    noise: Float[Array, " k"],
    descent: Float[Array, ""],
    size: Float[Array, " k"],
) -> Float[Array, " k"]:
    r"""Bound $\|d - d^*\|$ from how well the KKT conditions hold.

    Here $d = \hat J^\top (b + x)$ minimises $\tfrac12 \|d\|^2 - h^\top x$ over $x
    \succeq 0$, with gradient $y = C (b + x) - h$, and $\hat J$ has unit rows. The
    objective is strongly convex in d, and convex in x, so

    $$\tfrac12 \|d - d^*\|^2 \leq f(x) - f(x^*) \leq y^\top (x - x^*) \leq
      \sum_j (y_j)_+ x_j + \max_j (-y_j)_+ \sum_j x^*_j.$$

    The last sum is bounded by a unit vector e with $\hat J e \succeq \kappa$, the
    common descent: $\hat J^\top x^*$ has a norm of at most `size` and a projection onto
    e of at least $\kappa \sum_j x^*_j$.

    **Arguments:**

    - `noise`: how much each entry of y may be off.
    - `descent`: $\kappa$, or 0 if there is no such direction: the bound is infinite.
    - `size`: an upper bound on the norm of $\hat J^\top x^*$.
    """
    present = jnp.diagonal(C) > 0
    above = jnp.where(present, jnp.maximum(y, 0) + noise[:, None], 0)
    below = jnp.where(present, jnp.maximum(-y, 0) + noise[:, None], 0)
    gap = jnp.sum(above * x, axis=-1)
    known = descent > 0
    total = jnp.where(known, size / jnp.where(known, descent, 1), jnp.inf)
    below = jnp.max(below, axis=-1)
    # With size 0 the solution is 0, whatever the gradients are.
    gap += jnp.where((below > 0) & (size > 0), below * total, 0)
    return jnp.sqrt(2 * gap)


def smallest_cosine(
    C: Float[Array, "m m"], weights: Float[Array, " m"]
) -> Float[Array, ""]:
    """The smallest cosine between a combination of the gradients and any of them.

    It is 0 if rounding leaves no proof that all these cosines are positive.
    """
    products = matmul(C, weights)
    noise = rounding(weights)
    squared = jnp.vdot(weights, products) + noise * jnp.sum(jnp.abs(weights))
    smallest = jnp.min(jnp.where(jnp.diagonal(C) > 0, products, jnp.inf)) - noise
    proven = (smallest > 0) & jnp.isfinite(smallest) & (squared > 0)
    return jnp.where(
        proven, smallest / jnp.sqrt(jnp.where(proven, squared, 1)), 0
    ).astype(C.dtype)
