"""Mean: every loss counts the same; Jacobian descent becomes gradient descent."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxjd.weighting._weighting import Weighting, stateless


def mean() -> Weighting:
    """Weights $w_i = 1/m$: the gradient of the mean loss.

    Of the losses that are present, if a mask is given; no loss, no update.
    """
    return stateless(mean_weights)


def mean_weights(
    gramian: Float[Array, "m m"], mask: Bool[Array, " m"]
) -> Float[Array, " m"]:
    present = mask.astype(gramian.dtype)
    return present / jnp.maximum(present.sum(), 1)
