"""Aligned-MTL: replace the gradients by the closest orthogonal ones of equal norm."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxjd._checks import check_choice
from jaxjd._numerics import finite_or_nan
from jaxjd._sharding import on_every_device
from jaxjd._typing import PerLoss
from jaxjd.weighting._preference import Preference
from jaxjd.weighting._spectrum import Spectrum, spectrum
from jaxjd.weighting._weighting import Weighting, stateless

SCALE_MODES = ("min", "median", "rmse")


def aligned_mtl(
    preference: PerLoss | None = None,
    *,
    scale_mode: Literal["min", "median", "rmse"] = "min",
) -> Weighting:
    r"""Weights of Aligned-MTL, independent component alignment.

    $w = B u$ with the preference $u$ and the balance transformation
    $B = \sqrt\sigma \, V \Lambda^{-1/2} V^\top$, where $G = V \Lambda V^\top$ over the
    eigenvalues above m times the precision, relative to the largest. The gradients
    $B J$ are as near to $J$ as gradients of condition number 1 can be. If all gradients
    are zero, $B = I$.

    **Arguments:**

    - `preference`: $u \succeq 0$, m numbers. By default $1/m$ for each loss.
    - `scale_mode`: what $\sigma$ is: the smallest of the eigenvalues (`"min"`), their
      median, the lower one of two (`"median"`), or their mean (`"rmse"`).

    **Raises:** `ValueError` or `TypeError` if `preference` is not a vector of finite
    nonnegative reals, or `scale_mode` is not one of these. When used, `ValueError` if
    the preference does not have m entries.

    **Reference:** Senushkin et al. (2023), Independent Component Alignment for
    Multi-Task Learning, Algorithm 1; its code for the other scale modes.

    **Example:**

    >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    >>> jaxjd.weighting.aligned_mtl()(J @ J.T)
    Array([0.5591, 0.4083], dtype=float32)
    """
    chosen = Preference(preference)
    check_choice("scale_mode", scale_mode, SCALE_MODES)

    def aligned_mtl_weights(gramian, mask, preferred):
        of_gramian = spectrum(gramian)
        scale = chosen_scale(of_gramian, scale_mode)
        balanced = of_gramian.inverse_root(preferred, scale)
        weights = jnp.where(of_gramian.rank == 0, preferred, balanced)
        # Eigenvectors are zero for missing losses only to rounding.
        return finite_or_nan(gramian, jnp.where(mask, weights, 0))

    return stateless(on_every_device(aligned_mtl_weights), preference=chosen)


def chosen_scale(of_gramian: Spectrum, scale_mode: str) -> Float[Array, ""]:
    """The number that replaces all eigenvalues: one of them, or their mean."""
    values, rank = of_gramian.values, of_gramian.rank
    # The values ascend, so those kept are the last ones.
    least = values.shape[0] - jnp.maximum(rank, 1)
    if scale_mode == "min":
        return values[least]
    if scale_mode == "median":
        return values[least + (jnp.maximum(rank, 1) - 1) // 2]
    total = jnp.where(of_gramian.kept, values, 0).sum()
    return total / jnp.maximum(rank, 1).astype(values.dtype)
