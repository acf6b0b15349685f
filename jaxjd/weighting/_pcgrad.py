"""PCGrad: remove from every gradient its conflicts with the others, then sum."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from jaxjd._checks import check_key
from jaxjd._sharding import on_every_device, varying
from jaxjd.weighting._permutations import row_permutations
from jaxjd.weighting._weighting import Weighting, stateful


class PCGradState(NamedTuple):
    """`key`: of `jax.random`, split at each step."""

    key: Key[Array, ""]


def pcgrad(key: int | Key[Array, ""] = 0) -> Weighting:
    r"""Weights of PCGrad, also known as gradient surgery.

    Each gradient $g_i^{PC}$ starts as $g_i$ and meets the others in a random order.
    Where $g_i^{PC} \cdot g_j < 0$ it loses its part along $g_j$: $g_i^{PC} \leftarrow
    g_i^{PC} - (g_i^{PC} \cdot g_j) g_j / \|g_j\|^2$. The update is the sum
    $\sum_i g_i^{PC}$. A later projection can bring back a conflict that an earlier one
    removed.

    **Arguments:**

    - `key`: an integer seed or a key of `jax.random`. It lives in the state. Under
      `jax.vmap`, make the key in the mapped function, or all runs draw the same: see
      [`jaxjd.weighting.random`][].

    **Raises:** `TypeError` if `key` is neither of these.

    **Reference:** Yu et al. (2020), arXiv:2001.06782, Algorithm 1.

    **Example:**

    >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    >>> weighting = jaxjd.weighting.pcgrad(key=0)
    >>> weights, state = weighting.update(J @ J.T, weighting.init())
    >>> weights
    Array([2.2222, 1.5789], dtype=float32)
    """
    start = check_key(key)

    def weights(gramian, mask, state):
        key, now = jax.random.split(state.key)
        orders = row_permutations(now, gramian.shape[0])
        return pcgrad_weights(gramian, mask, orders), PCGradState(key)

    return stateful(lambda: PCGradState(start), on_every_device(weights))


@jax.jit
def pcgrad_weights(
    gramian: Float[Array, "m m"],
    mask: Bool[Array, " m"],
    permutations: Int[Array, "m m"],
) -> Float[Array, " m"]:
    """The weights where gradient i meets the others in the order of row i."""
    own = jnp.arange(gramian.shape[0])
    squares = jnp.diagonal(gramian)

    def meet(coefficients, others):
        # g_i^PC is row i of `coefficients` times J. It meets the other gradients as
        # they were at the start, so all rows can be treated at once.
        inner = (coefficients * gramian[others]).sum(axis=1)
        conflict = (inner < 0) & (others != own) & (squares[others] > 0)
        part = jnp.where(conflict, inner / jnp.where(conflict, squares[others], 1), 0)
        return coefficients.at[own, others].add(-part), None

    start = jnp.eye(gramian.shape[0], dtype=gramian.dtype)
    coefficients, _ = lax.scan(meet, varying(start, gramian), permutations.T)
    return jnp.where(mask, coefficients.sum(axis=0), 0)
