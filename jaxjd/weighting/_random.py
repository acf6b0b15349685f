"""Random: other weights at each step, whatever the gradients."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from jaxjd._checks import check_key, present_only
from jaxjd.weighting._weighting import Weighting


class RandomState(NamedTuple):
    """`key`: of `jax.random`, split at each step."""

    key: Key[Array, ""]


def random(key: int | Key[Array, ""] = 0) -> Weighting:
    r"""Random weights, positive and of sum 1: what a better method must beat.

    $w = \operatorname{softmax}(z)$ with $z \sim N(0, I)$, of the losses that are
    present; no loss, no update.

    **Arguments:**

    - `key`: an integer seed or a key of `jax.random`. It lives in the state.

    **Raises:** `TypeError` if `key` is neither.

    **Reference:** Lin et al. (2022), arXiv:2111.10603, Algorithm 2.
    """
    start = check_key(key)

    def update(gramian, state, /, *, mask=None, **extra_args):
        del extra_args  # For other links of the chain.
        gramian, mask = present_only(gramian, mask)
        key, now = jax.random.split(state.key)
        normals = jax.random.normal(now, mask.shape, gramian.dtype)
        return random_weights(normals, mask), RandomState(key)

    return Weighting(lambda: RandomState(start), update)


def random_weights(
    normals: Float[Array, " m"], mask: Bool[Array, " m"]
) -> Float[Array, " m"]:
    # Without the maximum of a softmax: no normal number overflows.
    shares = jnp.where(mask, jnp.exp(normals), 0)
    return shares / jnp.where(mask.any(), shares.sum(), 1)
