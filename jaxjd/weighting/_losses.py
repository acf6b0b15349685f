"""Read the extra argument `losses`: the values of the losses, in the order of rows."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxjd._numerics import accumulation_dtype


def flat_losses(
    losses: PyTree[Float[Array, "..."]], *, name: str = "losses"
) -> Float[Array, " m"]:
    """The losses as one vector, row-major, in float32 or wider.

    **Raises:** `TypeError` if they are not arrays of reals, `ValueError` if there is
    none.
    """
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(losses)]
    for leaf in leaves:
        if not jnp.issubdtype(leaf.dtype, jnp.floating) and not jnp.issubdtype(
            leaf.dtype, jnp.integer
        ):
            raise TypeError(f"`{name}` must be real numbers. Got {leaf.dtype}.")
    if not sum(leaf.size for leaf in leaves):
        raise ValueError(f"`{name}` must hold at least one loss. Got {losses!r}.")
    dtype = accumulation_dtype(*leaves)
    return jnp.concatenate([jnp.ravel(leaf).astype(dtype) for leaf in leaves])


def needed_losses(
    method: str, losses: Any, m: int, *, name: str = "losses"
) -> Float[Array, " m"]:
    """The losses that the update of a method must be given.

    **Raises:** `ValueError` if they are not given or there are not m of them, and as
    [`flat_losses`][].
    """
    if losses is None:
        raise ValueError(
            f"`{name}` must be given to the update of {method}, as "
            "`jaxjd.value_and_jac` returns them."
        )
    values = flat_losses(losses, name=name)
    if values.shape != (m,):
        raise ValueError(
            f"`{name}` must have one entry for each of the {m} losses. Got "
            f"{values.shape[0]}."
        )
    return values
