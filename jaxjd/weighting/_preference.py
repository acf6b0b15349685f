"""The preference vector: its default, and its entries for missing losses."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxjd._checks import check_length
from jaxjd.weighting._mean import mean_weights


def preference_or_mean(
    preference: Float[Array, " m"] | None,
    gramian: Float[Array, "m m"],
    mask: Bool[Array, " m"],
) -> Float[Array, " m"]:
    """The preference for the losses that are present, by default 1 over their number.

    **Raises:** `ValueError` if there is not one entry per loss.
    """
    if preference is None:
        return mean_weights(gramian, mask)
    given = check_length("preference", preference, gramian.shape[0])
    return jnp.where(mask, given.astype(gramian.dtype), 0)
