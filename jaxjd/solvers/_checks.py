"""What do the solvers refuse, and in which precision do they work?"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def as_gramian(gramian) -> Float[Array, "m m"]:
    """Check a Gramian's shape and type; widen what is narrower than float32."""
    G = jnp.asarray(gramian)
    if G.ndim != 2 or G.shape[0] != G.shape[1] or G.shape[0] == 0:
        raise ValueError(
            f"`gramian` must be a square matrix, [m, m] with m >= 1. Got {G.shape}."
        )
    if not jnp.issubdtype(G.dtype, jnp.floating):
        raise TypeError(f"`gramian` must have a real floating type. Got {G.dtype}.")
    # Not jnp.promote_types, which keeps the weak type of a Python number.
    return G.astype(jnp.float64 if G.dtype == jnp.float64 else jnp.float32)


def check_max_iterations(max_iterations: int | None) -> None:
    """Refuse a cap that would leave nothing to return."""
    if max_iterations is not None and max_iterations < 1:
        raise ValueError(f"`max_iterations` must be at least 1. Got {max_iterations}.")
