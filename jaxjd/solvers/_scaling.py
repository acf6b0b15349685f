"""In which coordinates is a Gramian safe to work with, whatever its scale?"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


class Scaled(NamedTuple):
    """A Gramian in the coordinates in which every gradient has norm 1."""

    C: Float[Array, "m m"]  # G / (norms norms^T): a matrix of cosines.
    norms: Float[Array, " m"]  # sqrt(diag(G)), 0 where a gradient is zero.
    inverse_norms: Float[Array, " m"]  # 0 there as well.


def unit_diagonal(gramian: Float[Array, "m m"]) -> Scaled:
    """Scale a Gramian to unit diagonal. A zero gradient keeps a zero row.

    Separable bounds survive a diagonal scaling, and so does the exact minimiser.
    Therefore its derivative does not depend on the norms, and they are held constant.
    """
    diagonal = jnp.diagonal(gramian)
    # Not `diagonal <= 0`, which is false for NaN: NaN must stay visible.
    zero = diagonal <= 0
    norms = lax.stop_gradient(jnp.sqrt(jnp.where(zero, 1, diagonal)))
    inverse = jnp.where(zero, 0, 1 / norms)
    # One factor after the other: their product may overflow.
    C = gramian * inverse[:, None] * inverse[None, :]
    return Scaled(C, jnp.where(zero, 0, norms), inverse)


def normalise_and_regularise(
    gramian: Float[Array, "m m"], norm_eps: float, reg_eps: float
) -> Float[Array, "m m"]:
    """`G / trace(G) + reg_eps I`, with 0 for G where its trace is below `norm_eps`.

    This is TorchJD's rule.
    """
    trace = jnp.trace(gramian)
    zero = (trace < norm_eps) | (trace == 0)
    normalised = jnp.where(zero, 0, gramian / jnp.where(zero, 1, trace))
    return normalised + reg_eps * jnp.eye(gramian.shape[0], dtype=gramian.dtype)
