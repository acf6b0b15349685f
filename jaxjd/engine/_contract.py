"""How are rows of Jacobians multiplied with each other?

Rows come as one array per parameter, [rows, *shape of the parameter]. Products are
accumulated in float32 or wider, whatever the parameters are, and never in the reduced
precision that accelerators use for float32 by default: a Gramian that is off by 1e-3
has no dual cone left to speak of.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxjd._numerics import accumulation_dtype, symmetric


def products(left: Sequence[Array], right: Sequence[Array]) -> Float[Array, "a b"]:
    """Inner products of every row of `left` with every row of `right`."""
    dtype = accumulation_dtype(*left, *right)
    total = jnp.zeros((left[0].shape[0], right[0].shape[0]), dtype)
    for x, y in zip(left, right, strict=True):
        total += jax.lax.dot_general(
            x.reshape(x.shape[0], -1),
            y.reshape(y.shape[0], -1),
            (((1,), (1,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=dtype,
        )
    return total


def gramian(rows: Sequence[Array]) -> Float[Array, "m m"]:
    """`J Jᵀ`, symmetric to the bit."""
    return symmetric(products(rows, rows))


def combine(weights: Float[Array, " m"], rows: Sequence[Array]) -> list[Array]:
    """`Jᵀ w`, in the dtypes of the rows."""

    def combination(leaf: Array) -> Array:
        dtype = accumulation_dtype(leaf)
        combined = jnp.tensordot(
            weights.astype(dtype),
            leaf.astype(dtype),
            1,
            precision=jax.lax.Precision.HIGHEST,
        )
        return combined.astype(leaf.dtype)

    return [combination(leaf) for leaf in rows]
