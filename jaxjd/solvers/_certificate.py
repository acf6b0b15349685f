"""How far is a point from being a solution, whatever the scale of the problem?"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Certificate(NamedTuple):
    r"""How well the KKT conditions of a quadratic program hold at what was returned.

    For the projection, with $d = \sqrt{\operatorname{diag} G}$, $x = d \circ (v - u)$,
    $y = Gv / d$ and $s = \max(\|d \circ v\|_2, \|d \circ u\|_2)$, all of them computed
    anew at the end:
    """

    primal: Float[Array, "..."]
    r"""$\max_j (-x_j)_+ / s$: how far v is below its bounds."""
    dual: Float[Array, "..."]
    r"""$\max_j (-y_j)_+ / s$. Times $s / \|J^\top v\|$, it bounds the negative cosine
    between the update $J^\top v$ and any gradient."""
    complementarity: Float[Array, "..."]
    r"""$\max_j |x_j y_j| / s^2$."""
    iterations: Int[Array, ""]
    """Products of all rows with the Gramian, shared by all rows."""
    converged: Bool[Array, "..."]
    """Whether the row ended before the cap on iterations, with residuals that the
    precision explains."""


def certify(
    C: Float[Array, "m m"],
    b: Float[Array, "k m"],
    x: Float[Array, "k m"],
    y: Float[Array, "k m"],
    *,
    finished: Bool[Array, " k"],
    iterations: Int[Array, ""],
) -> Certificate:
    """The certificate of the rows `b + x` with bounds `b` and gradient `y`."""
    m = C.shape[-1]
    size = jnp.maximum(jnp.linalg.norm(b + x, axis=-1), jnp.linalg.norm(b, axis=-1))
    size = jnp.where(size > 0, size, 1)
    primal = jnp.max(jnp.maximum(-x, 0), axis=-1) / size
    dual = jnp.max(jnp.maximum(-y, 0), axis=-1) / size
    products = (x / size[:, None]) * (y / size[:, None])
    complementarity = jnp.max(jnp.abs(products), axis=-1)
    # A standing ridge alone may leave up to a third of this, at m = 512.
    bound = 32 * float(jnp.finfo(C.dtype).eps) * m**0.5
    residual = jnp.maximum(jnp.maximum(primal, dual), complementarity)
    return Certificate(
        primal, dual, complementarity, iterations, finished & (residual <= bound)
    )
