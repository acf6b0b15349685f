"""Constant: use weights chosen beforehand, also known as linear scalarization."""

import jax.numpy as jnp

from jaxjd._checks import check_length, check_vector
from jaxjd._typing import PerLoss
from jaxjd.weighting._weighting import Weighting, stateless


def constant(weights: PerLoss) -> Weighting:
    """The given weights, whatever the Gramian.

    **Arguments:**

    - `weights`: m numbers, of any sign. Missing losses get the weight zero, the others
      keep theirs.

    **Raises:** `ValueError` or `TypeError` if `weights` is not a vector of finite
    reals. When used, `ValueError` if it does not have m entries.

    **Example:**

    >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    >>> jaxjd.weighting.constant([1.0, 2.0])(J @ J.T)
    Array([1., 2.], dtype=float32)
    """
    checked = check_vector("weights", weights, nonnegative=False)

    def constant_weights(gramian, mask):
        given = check_length("weights", checked, gramian.shape[0])
        return jnp.where(mask, given.astype(gramian.dtype), 0)

    return stateless(constant_weights, reads="shape")
