"""Constant: weights chosen beforehand, known as linear scalarization."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxjd._checks import check_length, check_vector
from jaxjd.weighting._weighting import Weighting, stateless


def constant(weights: Float[Array, " m"] | Sequence[float]) -> Weighting:
    """The given weights, whatever the Gramian.

    **Arguments:**

    - `weights`: m numbers, of any sign. Losses that a mask leaves out get zero, the
      others keep theirs.

    **Raises:** `ValueError` or `TypeError` if they are not a vector of finite reals,
    and, when used, `ValueError` if there are not m of them.
    """
    checked = check_vector("weights", weights, nonnegative=False)

    def constant_weights(gramian, mask):
        given = check_length("weights", checked, gramian.shape[0])
        return jnp.where(mask, given.astype(gramian.dtype), 0)

    return stateless(constant_weights)
