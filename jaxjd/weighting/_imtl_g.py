"""IMTL-G: the update that has the same projection onto every gradient."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxjd._numerics import finite_or_nan, unit_diagonal
from jaxjd.weighting._spectrum import cutoff, spectrum
from jaxjd.weighting._weighting import Weighting, stateless


def imtl_g() -> Weighting:
    r"""Weights of IMTL-G, impartial multi-task learning by gradients.

    $w = v / \mathbf 1^\top v$ with $v = G^+ d$ and $d = \sqrt{\operatorname{diag} G}$:
    where the gradients are independent, $J^\top w$ has equal projections onto all the
    unit gradients. Weights may be negative, and the update may conflict with all.

    $G^+$ is the pseudoinverse, up to eigenvalues of m times the precision. Independent
    gradients are first scaled to norm 1, which does not change $v$ but keeps those
    whose norms are small; TorchJD drops these. Zero weights where $\mathbf 1^\top v$
    is zero to rounding, relative to its terms; gradients that are zero weigh nothing.

    **Reference:** Liu et al. (2021), Towards Impartial Multi-Task Learning, section
    3.1, gradient balance; Quinton & Rey (2024), arXiv:2406.16232, who generalise it to
    dependent gradients.
    """
    return stateless(imtl_g_weights)


@jax.jit
def imtl_g_weights(
    gramian: Float[Array, "m m"], mask: Bool[Array, " m"]
) -> Float[Array, " m"]:
    del mask  # A loss that is missing is a gradient that is zero.
    scaled = unit_diagonal(gramian)
    nonzero = scaled.norms > 0
    cosines = spectrum(scaled.C)
    independent = scaled.inverse_norms * cosines.pinv(nonzero.astype(gramian.dtype))
    # A second spectrum takes as long as all the rest: only where it is needed.
    v = lax.cond(
        cosines.rank == nonzero.sum(),
        lambda: independent,
        lambda: spectrum(gramian).pinv(scaled.norms),
    )
    v = jnp.where(nonzero, v, 0)  # Already so, but for rounding.
    total = v.sum()
    lost = jnp.abs(total) <= cutoff(v) * jnp.abs(v).sum()
    weights = jnp.where(lost, 0, v / jnp.where(lost, 1, total))
    return finite_or_nan(gramian, weights)
