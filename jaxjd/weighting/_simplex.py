"""Keep weights on the simplex, also when some losses are missing."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxjd._sorting import sort
from jaxjd.weighting._preference import mean_weights


def project_onto_simplex(
    point: Float[Array, " m"], mask: Bool[Array, " m"]
) -> Float[Array, " m"]:
    """The closest weights that are nonnegative, of sum 1, and zero off the mask.

    By sorting, as in Held, Wolfe & Crowder (1974), Mathematical Programming 6. optax's
    projection cannot leave entries out.
    """
    # Only differences count, and an entry that is 1 or more below the largest becomes
    # zero. So entries off the mask are put 2 below.
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
    """The weights of the present losses, scaled to sum 1, and what their sum was.

    The weights are equal if the sum was zero. New weights of sum 1, multiplied by the
    old sum, are on the simplex together with the weights of the missing losses.
    """
    weights = jnp.where(mask, weights, 0)
    share = weights.sum()
    alone = weights / jnp.where(share > 0, share, 1)
    return jnp.where(share > 0, alone, mean_weights(weights, mask)), share
