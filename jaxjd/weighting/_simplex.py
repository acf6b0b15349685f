"""How do weights stay on the simplex when some losses are missing?"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxjd._sorting import sort
from jaxjd.weighting._mean import mean_weights


def project_onto_simplex(
    point: Float[Array, " m"], mask: Bool[Array, " m"]
) -> Float[Array, " m"]:
    """The closest weights that are nonnegative, of sum 1, and zero off the mask.

    By sorting: Held, Wolfe & Crowder (1974), Mathematical Programming 6. Not optax's,
    which cannot leave entries out.
    """
    # Only differences matter, and an entry is zero if it is 1 or more below the
    # largest: those off the mask are 2 below.
    point = point - jnp.max(point, where=mask, initial=-jnp.inf)
    point = jnp.where(mask, point, -2)
    descending = sort(point, 0)[::-1]
    counts = jnp.arange(1, point.shape[0] + 1, dtype=point.dtype)
    thresholds = (jnp.cumsum(descending) - 1) / counts
    support = jnp.sum(descending > thresholds)
    return jnp.where(mask, jnp.maximum(point - thresholds[support - 1], 0), 0)


def share_of_present(
    weights: Float[Array, " m"], mask: Bool[Array, " m"]
) -> tuple[Float[Array, " m"], Float[Array, ""]]:
    """Weights of the present losses alone, of sum 1, and what their sum was.

    Equal ones where that is zero. Multiplied by what their sum was, new weights take
    the place of the old ones, and together with those of the missing losses they are
    on the simplex as before.
    """
    weights = jnp.where(mask, weights, 0)
    share = weights.sum()
    alone = weights / jnp.where(share > 0, share, 1)
    return jnp.where(share > 0, alone, mean_weights(weights, mask)), share
