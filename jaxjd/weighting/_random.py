"""Random: draw new weights at each step, whatever the gradients."""

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
    r"""Random weights, positive and of sum 1: a baseline for other methods.

    $w = \operatorname{softmax}(z)$ with $z \sim N(0, I)$, over the losses that are
    present. If there are none, the weights are zero.

    **Arguments:**

    - `key`: an integer seed or a key of `jax.random`. It lives in the state.

    A key from outside of `jax.vmap` gives every run the same random numbers. To train
    several seeds at once, make the transformation from a key of each run:

    ```python
    def train(key):
        tx = jaxjd.random(key=key)
        ...

    jax.vmap(train)(jax.random.split(jax.random.key(0), 8))
    ```

    **Raises:** `TypeError` if `key` is neither of these.

    **Reference:** Lin et al. (2022), arXiv:2111.10603, Algorithm 2.

    **Example:**

    >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    >>> weighting = jaxjd.weighting.random(key=0)
    >>> weights, state = weighting.update(J @ J.T, weighting.init())
    >>> weights
    Array([0.3997, 0.6003], dtype=float32)
    """
    start = check_key(key)

    def update(gramian, state, /, *, mask=None, **extra_args):
        del extra_args  # For other links of the chain.
        gramian, mask = present_only(gramian, mask)
        key, now = jax.random.split(state.key)
        normals = jax.random.normal(now, mask.shape, gramian.dtype)
        return random_weights(normals, mask), RandomState(key)

    return Weighting(lambda: RandomState(start), update, reads="shape")


def random_weights(
    normals: Float[Array, " m"], mask: Bool[Array, " m"]
) -> Float[Array, " m"]:
    """The softmax of given numbers, over the losses that are present."""
    # A softmax need not subtract the maximum here: normal numbers do not overflow.
    shares = jnp.where(mask, jnp.exp(normals), 0)
    return shares / jnp.where(mask.any(), shares.sum(), 1)
