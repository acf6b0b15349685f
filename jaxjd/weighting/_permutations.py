"""Draw the order in which each gradient meets the others."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key


def row_permutations(key: Key[Array, ""], m: int) -> Int[Array, "m m"]:
    """A random permutation of the m losses in each of m rows, independent.

    A method that treats all rows at once walks along the columns, and skips the entry
    that is the row's own loss.
    """
    # jax.random.permutation sorts long rows several times, in case two draws are equal.
    # With draws of 32 bits, this happens in one of 2^32 / m^2 rows: too few to matter.
    return jnp.argsort(jax.random.bits(key, (m, m)), axis=1)
