"""Krum: trust the gradients that have the nearest neighbours."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxjd._checks import check_integer
from jaxjd._numerics import finite_or_nan
from jaxjd._sorting import sort
from jaxjd.weighting._weighting import Weighting, stateless


def krum(num_byzantine: int, num_selected: int = 1) -> Weighting:
    r"""Weights of (Multi-)Krum: the mean of the gradients that lie closest to others.

    The score of a gradient is the sum of its distances $\|g_i - g_j\|$ to its
    $m - f - 2$ nearest neighbours, where $f$ gradients may come from an adversary. The
    `num_selected` with the lowest scores get equal weights, the first ones of a tie.

    A mask leaves fewer gradients, m' say: they have $m' - f - 2$ neighbours, at least
    1, and the selected ones are as many as there are.

    **Arguments:**

    - `num_byzantine`: $f$, at least 0. There must be at least $f + 3$ losses.
    - `num_selected`: how many gradients are averaged, at least 1.

    **Raises:** `TypeError` or `ValueError` if one is no integer or too small, and, when
    used, `ValueError` if there are fewer than $f + 3$ or `num_selected` losses.

    **Reference:** Blanchard et al. (2017), Machine Learning with Adversaries, section
    4, whose score sums squared distances. Here they are not squared, as in TorchJD.
    """
    check_integer("num_byzantine", num_byzantine, least=0)
    check_integer("num_selected", num_selected, least=1)

    def weights(gramian, mask):
        m, least = gramian.shape[0], max(num_byzantine + 3, num_selected)
        if m < least:
            raise ValueError(
                f"`gramian` must be of at least {least} losses for num_byzantine="
                f"{num_byzantine} and num_selected={num_selected}. Got {m}."
            )
        return finite_or_nan(
            gramian, krum_weights(gramian, mask, num_byzantine, num_selected)
        )

    return stateless(weights)


def krum_weights(
    gramian: Float[Array, "m m"],
    mask: Bool[Array, " m"],
    num_byzantine: int,
    num_selected: int,
) -> Float[Array, " m"]:
    squares = jnp.diagonal(gramian)
    distances = jnp.sqrt(jnp.maximum(squares[:, None] + squares[None] - 2 * gramian, 0))
    # A loss that is missing is nobody's neighbour. Each row's own distance, 0, comes
    # first of the sorted ones.
    distances = sort(jnp.where(mask[None], distances, jnp.inf), 1)
    present = mask.sum()
    neighbours = jnp.maximum(present - num_byzantine - 2, 1)
    position = jnp.arange(gramian.shape[0])
    nearest = (position >= 1) & (position <= neighbours)
    scores = jnp.where(nearest[None], distances, 0).sum(axis=1)
    # The last key counts first: a missing loss is behind any other.
    order = jnp.lexsort((scores, ~mask))
    selected = jnp.minimum(num_selected, present)
    chosen = jnp.zeros(mask.shape, bool).at[order].set(position < selected)
    count = jnp.maximum(selected, 1).astype(gramian.dtype)
    return chosen.astype(gramian.dtype) / count
