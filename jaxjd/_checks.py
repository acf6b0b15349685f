"""Checks of Gramians, masks and hyperparameters, and what their messages say."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float


def check_gramian(gramian: Float[Array, "m m"]) -> Float[Array, "m m"]:
    """A Gramian, in float32 if it was narrower.

    **Raises:** `ValueError` if it is not square, `TypeError` if it is not real.
    """
    G = jnp.asarray(gramian)
    if G.ndim != 2 or G.shape[0] != G.shape[1] or not G.size:
        raise ValueError(
            f"`gramian` must be a square matrix, [m, m]. Got shape {G.shape}."
        )
    if not jnp.issubdtype(G.dtype, jnp.floating):
        raise TypeError(f"`gramian` must be real floating-point. Got {G.dtype}.")
    # Not jnp.promote_types, which keeps the weak type of a Python number.
    return G.astype(jnp.float64 if G.dtype == jnp.float64 else jnp.float32)


def check_mask(mask: Bool[Array, " m"] | None, m: int) -> Bool[Array, " m"]:
    """**Raises:** `ValueError` or `TypeError` if it is not m bools."""
    if mask is None:
        return jnp.ones(m, bool)
    mask = jnp.asarray(mask)
    if mask.shape != (m,):
        raise ValueError(
            f"`mask` must have one entry for each of the {m} losses. Got shape "
            f"{mask.shape}."
        )
    if mask.dtype != bool:
        raise TypeError(f"`mask` must be of bools. Got {mask.dtype}.")
    return mask


def present_only(
    gramian: Float[Array, "m m"], mask: Bool[Array, " m"] | None
) -> tuple[Float[Array, "m m"], Bool[Array, " m"]]:
    """A checked Gramian, zero in the rows and columns of missing losses, and the mask.

    **Raises:** as [`check_gramian`][] and [`check_mask`][].
    """
    gramian = check_gramian(gramian)
    mask = check_mask(mask, gramian.shape[0])
    return jnp.where(mask[:, None] & mask[None], gramian, 0), mask


def check_vector(
    name: str, values: Float[Array, " m"] | Sequence[float], *, nonnegative: bool
) -> Float[Array, " m"]:
    """A vector that a factory was given, checked as far as its values are known.

    **Raises:** `TypeError` if it is not real; `ValueError` if it is not a vector of
    finite numbers, or has a negative one where none may be.
    """
    vector = (
        values if isinstance(values, jax.Array) else jnp.asarray(np.asarray(values))
    )
    if jnp.issubdtype(vector.dtype, jnp.integer):
        vector = vector.astype(float)
    if not jnp.issubdtype(vector.dtype, jnp.floating):
        raise TypeError(f"`{name}` must be real numbers. Got {vector.dtype}.")
    if vector.ndim != 1 or not vector.size:
        raise ValueError(f"`{name}` must be a vector, [m]. Got shape {vector.shape}.")
    if isinstance(vector, Tracer):
        return vector
    concrete = np.asarray(vector)
    if not np.isfinite(concrete).all():
        raise ValueError(f"`{name}` must be finite. Got {concrete}.")
    if nonnegative and (concrete < 0).any():
        raise ValueError(f"`{name}` must not be negative. Got {concrete}.")
    return vector


def check_length(name: str, vector: Float[Array, " m"], m: int) -> Float[Array, " m"]:
    """**Raises:** `ValueError` if it has not one entry per loss."""
    if vector.shape != (m,):
        raise ValueError(
            f"`{name}` must have one entry for each of the {m} losses. Got "
            f"{vector.shape[0]}."
        )
    return vector


def check_number(name: str, value: float, interval: str) -> float:
    """A number in an interval such as `"[0, 1)"` or `"(0, inf)"`.

    **Raises:** `TypeError` if it is not a real number that is known when traced;
    `ValueError` if it is NaN or outside.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise TypeError(f"`{name}` must be a real number. Got {value!r}.")
    low, high = (float(end) for end in interval[1:-1].split(","))
    inside = low < value < high
    inside |= interval[0] == "[" and value == low
    inside |= interval[-1] == "]" and value == high
    if not inside:
        raise ValueError(f"`{name}` must be in {interval}. Got {value!r}.")
    return float(value)


def check_integer(name: str, value: int, *, least: int) -> int:
    """**Raises:** `TypeError` if it is no integer, `ValueError` if it is too small."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"`{name}` must be an integer. Got {value!r}.")
    if value < least:
        raise ValueError(f"`{name}` must be at least {least}. Got {value}.")
    return int(value)


def check_choice(name: str, value: str, choices: Sequence[str]) -> str:
    """**Raises:** `ValueError` if it is not one of the choices."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {choices}. Got {value!r}.")
    return value


def check_key(key: int | jax.Array) -> jax.Array:
    """A key of `jax.random` from itself or from an integer seed.

    **Raises:** `TypeError` if it is neither.
    """
    if isinstance(key, jax.Array):
        typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and not key.shape
        raw = key.dtype == jnp.uint32 and key.ndim == 1
        if typed or raw:
            return key
    elif isinstance(key, int | np.integer) and not isinstance(key, bool):
        return jax.random.key(key)
    raise TypeError(f"`key` must be an integer seed or one jax.random key. Got {key!r}")


def check_num_losses(num_losses: int, gramian: Float[Array, "m m"]) -> None:
    """**Raises:** `ValueError` if a state was made for another number of losses."""
    if gramian.shape[0] != num_losses:
        raise ValueError(
            f"`gramian` must be of num_losses={num_losses} losses, for which the state "
            f"was made. Got {gramian.shape[0]}."
        )


def check_max_iterations(max_iterations: int | None) -> None:
    """**Raises:** `ValueError` if the cap would leave nothing to return."""
    if max_iterations is not None and max_iterations < 1:
        raise ValueError(f"`max_iterations` must be at least 1. Got {max_iterations}.")
