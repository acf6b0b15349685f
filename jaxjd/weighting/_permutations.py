"""In which order does each gradient meet the others?"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key


def row_permutations(key: Key[Array, ""], m: int) -> Int[Array, "m m"]:
    """A random permutation of the m losses in each of m rows, independent.

    A method that treats all its rows at once walks along the columns, and passes over
    the entry that is the row's own loss.
    """
    losses = jnp.broadcast_to(jnp.arange(m), (m, m))
    return jax.random.permutation(key, losses, axis=1, independent=True)
