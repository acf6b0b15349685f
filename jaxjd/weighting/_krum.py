"""Krum: average the gradients that lie closest to their neighbours."""

import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from jaxjd._checks import check_integer
from jaxjd._numerics import finite_or_nan
from jaxjd._sharding import on_every_device
from jaxjd._sorting import sort
from jaxjd.weighting._weighting import Weighting, stateless


def krum(
    num_byzantine: int | Int[Array, ""], num_selected: int | Int[Array, ""] = 1
) -> Weighting:
    r"""Weights of (Multi-)Krum: the mean of the gradients that lie closest to others.

    The score of a gradient is the sum of its distances $\|g_i - g_j\|$ to its
    $m - f - 2$ nearest neighbours, where $f$ gradients may come from an adversary. The
    `num_selected` with the lowest scores get equal weights. Among equal scores the
    first ones count as lower.

    If a mask leaves m' gradients, each has $m' - f - 2$ neighbours, but at least 1, and
    at most m' are selected. The weights are piecewise constant, so their
    derivative is zero.

    **Arguments:**

    - `num_byzantine`: $f$, at least 0. There must be at least $f + 3$ losses.
    - `num_selected`: how many gradients are averaged, at least 1.

    **Raises:** `TypeError` or `ValueError` if an argument is not an integer, or is too
    small. When used, `ValueError` if there are fewer than $f + 3$ or `num_selected`
    losses, unless these numbers are traced.

    **Reference:** Blanchard et al. (2017), Machine Learning with Adversaries, section
    4, whose score sums squared distances. Here they are not squared, as in TorchJD.

    **Example:**

    >>> J = jnp.array([[1.0, 0.0], [1.0, 0.1], [0.9, 0.0], [-9.0, 5.0]])
    >>> jaxjd.weighting.krum(num_byzantine=1, num_selected=2)(J @ J.T)
    Array([0.5, 0.5, 0. , 0. ], dtype=float32)
    """
    byzantine = check_integer("num_byzantine", num_byzantine, least=0)
    selected = check_integer("num_selected", num_selected, least=1)

    def weights(gramian, mask):
        m, needed = gramian.shape[0], (byzantine + 3, selected)
        if m < max(n if not isinstance(n, Tracer) else 0 for n in needed):
            raise ValueError(
                f"`gramian` must be of at least {max(needed)} losses for num_byzantine="
                f"{byzantine} and num_selected={selected}. Got {m}."
            )
        return finite_or_nan(gramian, krum_weights(gramian, mask, byzantine, selected))

    return stateless(on_every_device(weights))


def krum_weights(
    gramian: Float[Array, "m m"],
    mask: Bool[Array, " m"],
    num_byzantine: int | Int[Array, ""],
    num_selected: int | Int[Array, ""],
) -> Float[Array, " m"]:
    """Equal weights for the gradients with the lowest scores."""
    squares = jnp.diagonal(gramian)
    distances = jnp.sqrt(jnp.maximum(squares[:, None] + squares[None] - 2 * gramian, 0))
    # A missing loss is not a neighbour. After sorting, the first distance of each row
    # is 0, that to itself.
    distances = sort(jnp.where(mask[None], distances, jnp.inf), 1)
    present = mask.sum()
    neighbours = jnp.maximum(present - num_byzantine - 2, 1)
    position = jnp.arange(gramian.shape[0])
    nearest = (position >= 1) & (position <= neighbours)
    scores = jnp.where(nearest[None], distances, 0).sum(axis=1)
    # `lexsort` sorts by its last key first, so the missing losses come last.
    order = jnp.lexsort((scores, ~mask))
    selected = jnp.minimum(num_selected, present)
    chosen = jnp.zeros(mask.shape, bool).at[order].set(position < selected)
    count = jnp.maximum(selected, 1).astype(gramian.dtype)
    return chosen.astype(gramian.dtype) / count
