"""IMTL-G: take the update that has the same projection onto every gradient."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxjd._numerics import finite_or_nan, unit_diagonal
from jaxjd._sharding import on_every_device
from jaxjd.weighting._spectrum import cutoff, spectrum
from jaxjd.weighting._weighting import Weighting, stateless


def imtl_g() -> Weighting:
    r"""Weights of IMTL-G, impartial multi-task learning by gradients.

    $w = v / \mathbf 1^\top v$ with $v = G^+ d$ and $d = \sqrt{\operatorname{diag} G}$.
    If the gradients are independent, $J^\top w$ has equal projections onto all the unit
    gradients. Weights may be negative, and the update may conflict with all gradients.

    $G^+$ is the pseudoinverse, in which eigenvalues below m times the precision count
    as zero. Independent gradients are first scaled to norm 1. This does not change $v$
    but keeps gradients of small norm, which TorchJD drops. If $\mathbf 1^\top v$ is
    zero to rounding, relative to its terms, the weights are zero. Zero gradients have
    the weight zero.

    **Reference:** Liu et al. (2021), Towards Impartial Multi-Task Learning, section
    3.1, gradient balance; Quinton & Rey (2024), arXiv:2406.16232, who generalise it to
    dependent gradients.

    **Example:**

    >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    >>> jaxjd.weighting.imtl_g()(J @ J.T)
    Array([0.5923, 0.4077], dtype=float32)
    """
    return stateless(on_every_device(imtl_g_weights))


@jax.jit
def imtl_g_weights(
    gramian: Float[Array, "m m"], mask: Bool[Array, " m"]
) -> Float[Array, " m"]:
    del mask  # A missing loss is a zero gradient.
    scaled = unit_diagonal(gramian)
    nonzero = scaled.norms > 0
    cosines = spectrum(scaled.C)
    independent = scaled.inverse_norms * cosines.pinv(nonzero.astype(gramian.dtype))
    # A second spectrum takes as long as all the rest, so compute it only if needed.
    v = lax.cond(
        cosines.rank == nonzero.sum(),
        lambda: independent,
        lambda: spectrum(gramian).pinv(scaled.norms),
    )
    v = jnp.where(nonzero, v, 0)  # It already is, up to rounding.
    total = v.sum()
    lost = jnp.abs(total) <= cutoff(v) * jnp.abs(v).sum()
    weights = jnp.where(lost, 0, v / jnp.where(lost, 1, total))
    return finite_or_nan(gramian, weights)
