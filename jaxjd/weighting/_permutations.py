"""In which order does each gradient meet the others?"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key


def row_permutations(key: Key[Array, ""], m: int) -> Int[Array, "m m"]:
    """A random permutation of the m losses in each of m rows, independent.

    A method that treats all its rows at once walks along the columns, and passes over
    the entry that is the row's own loss.
    """
    # Not jax.random.permutation, which sorts several times for long rows: here two of
    # the 32 bits are equal once in 2^32 / m^2 rows.
    return jnp.argsort(jax.random.bits(key, (m, m)), axis=1)
