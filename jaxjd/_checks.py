"""Check Gramians, masks and hyperparameters, and say what is wrong with them."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.tree_util import keystr
from jaxtyping import Array, Bool, Float, Int

from jaxjd._sharding import replicated
from jaxjd._typing import PerLoss, PyTree


def check_gramian(gramian: Float[Array, "m m"]) -> Float[Array, "m m"]:
    """A Gramian, in float32 if it was narrower.

    It may be a `jax.ShapeDtypeStruct` for a weighting that reads nothing else.

    **Raises:** `ValueError` if it is not square. `TypeError` if it is not a real array,
    such as the Jacobian itself.
    """
    if hasattr(gramian, "gramian"):
        raise TypeError(
            "`gramian` must be the matrix J Jᵀ, [m, m]. Got a Jacobian: write "
            "`weighting(jac.gramian())`, or give the Jacobian to a transformation, "
            "`jaxjd.NAME().update(jac, state, params)`."
        )
    try:
        shape_only = isinstance(gramian, jax.ShapeDtypeStruct)
        G: Any = gramian if shape_only else jnp.asarray(gramian)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"`gramian` must be the matrix J Jᵀ, [m, m]. Got {type(gramian).__name__}. "
            "Gradients go to a transformation: `jaxjd.NAME().update(gradients, state, "
            "params)`."
        ) from error
    if len(G.shape) != 2 or G.shape[0] != G.shape[1] or not G.size:
        raise ValueError(
            f"`gramian` must be a square matrix, [m, m]. Got shape {G.shape}."
        )
    if not jnp.issubdtype(G.dtype, jnp.floating):
        raise TypeError(f"`gramian` must be real floating-point. Got {G.dtype}.")
    # Not jnp.promote_types, which keeps the weak type of a Python number.
    dtype = jnp.float64 if G.dtype == jnp.float64 else jnp.float32
    return G.update(dtype=dtype) if shape_only else replicated(G.astype(dtype))


def check_mask(mask: Bool[Array, " m"] | None, m: int) -> Bool[Array, " m"]:
    """A mask of m losses, all true by default.

    **Raises:** `ValueError` or `TypeError` if it is not m bools.
    """
    if mask is None:
        return jnp.ones(m, bool)
    mask = jnp.asarray(replicated(jnp.asarray(mask)))
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
    if isinstance(gramian, jax.ShapeDtypeStruct):
        return gramian, mask
    return jnp.where(mask[:, None] & mask[None], gramian, 0), mask


def check_vector(
    name: str, values: PerLoss, *, nonnegative: bool
) -> Float[Array, " m"]:
    """A vector of numbers, or of scalars that may be traced.

    Those in a dict come in the order of its sorted keys, as the rows of the losses in a
    dict do. Values that are known are checked.

    **Raises:** `TypeError` if it is not real; `ValueError` if it is not a vector of
    finite numbers, or must be nonnegative and is not.
    """
    if isinstance(values, Mapping):
        values = [x for leaf in jax.tree.leaves(values) for x in jnp.ravel(leaf)]
    if isinstance(values, jax.Array):
        vector = values
    elif any(isinstance(x, Tracer) for x in jax.tree.leaves(values)):
        vector = jnp.stack([jnp.asarray(x) for x in values])
    else:
        vector = jnp.asarray(np.asarray(values))
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
    """A vector with one entry for each loss.

    **Raises:** `ValueError` if it has another length.
    """
    if vector.shape != (m,):
        raise ValueError(
            f"`{name}` must have one entry for each of the {m} losses. Got "
            f"{vector.shape[0]}."
        )
    return vector


def check_number(
    name: str, value: float | Float[Array, ""], interval: str
) -> float | Float[Array, ""]:
    """Check a number, which must be in an interval such as `"[0, 1)"` or `"(0, inf)"`.

    It may be a scalar array. If that is traced, its value is not checked.

    **Raises:** `TypeError` if it is not a real number; `ValueError` if it is NaN or
    outside.
    """
    if not _is_scalar(value, jnp.floating, jnp.integer):
        raise TypeError(f"`{name}` must be a real number. Got {_described(value)}.")
    if isinstance(value, Tracer):
        return (
            value if jnp.issubdtype(value.dtype, jnp.floating) else value.astype(float)
        )
    number = float(value)
    low, high = (float(end) for end in interval[1:-1].split(","))
    inside = low < number < high
    inside |= interval[0] == "[" and number == low
    inside |= interval[-1] == "]" and number == high
    if not inside:
        raise ValueError(f"`{name}` must be in {interval}. Got {value!r}.")
    return number


def check_integer(
    name: str, value: int | Int[Array, ""], *, least: int
) -> int | Int[Array, ""]:
    """Check an integer, which must be large enough.

    It may be a scalar array. If that is traced, its value is not checked. If a shape
    depends on it, use [`known`][].

    **Raises:** `TypeError` if it is not an integer, `ValueError` if it is too small.
    """
    if not _is_scalar(value, jnp.integer):
        raise TypeError(f"`{name}` must be an integer. Got {_described(value)}.")
    if isinstance(value, Tracer):
        return value
    if value < least:
        raise ValueError(f"`{name}` must be at least {least}. Got {value}.")
    return int(value)


def known(name: str, value: int | Int[Array, ""]) -> int:
    """Check that an integer is known, because it shapes the computation.

    **Raises:** `TypeError` if it is traced.
    """
    if isinstance(value, Tracer):
        raise TypeError(
            f"`{name}` must be a number that is known at trace time: it shapes the "
            f"computation. Got a traced array. In optax.inject_hyperparams, say "
            f"`static_args={name!r}`."
        )
    return int(value)


def dtype_of(leaf: object) -> jnp.dtype | None:
    """The dtype of an array or a Python number; None for anything else."""
    numbers = bool | int | float | complex
    arrays = jax.Array | np.ndarray | np.generic
    if not isinstance(leaf, arrays | numbers) and not hasattr(leaf, "__jax_array__"):
        return None
    try:
        return jnp.result_type(leaf)
    except TypeError:  # NumPy has arrays of strings and of objects.
        return None


def check_real(name: str, tree: PyTree) -> None:
    """**Raises:** `TypeError` if a leaf is not of real numbers or bools."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        dtype = dtype_of(leaf)
        kinds = (np.bool_, jnp.integer, jnp.floating)
        if dtype is None or not any(jnp.issubdtype(dtype, kind) for kind in kinds):
            raise TypeError(
                f"`{name}` must hold real numbers. Got {dtype or type(leaf).__name__} "
                f"at {keystr(path) or 'the top'}."
            )


def _is_scalar(value: Any, *kinds: Any) -> bool:
    """Whether it is one number, or a scalar array, of one of these kinds of dtypes."""
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        return not value.shape and any(jnp.issubdtype(value.dtype, k) for k in kinds)
    if isinstance(value, bool):
        return False
    return isinstance(value, int) or (
        isinstance(value, float) and jnp.floating in kinds
    )


def _described(value: Any) -> str:
    """Describe a value for a message: an array by its dtype and shape."""
    if isinstance(value, np.ndarray | jax.Array):
        return f"{value.dtype}{list(value.shape)}"
    return repr(value)


def check_choice(name: str, value: str, choices: Sequence[str]) -> str:
    """One of some choices.

    **Raises:** `ValueError` if it is another.
    """
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {choices}. Got {value!r}.")
    return value


def check_key(key: int | jax.Array) -> jax.Array:
    """A key of `jax.random`, given one or an integer seed.

    **Raises:** `TypeError` if it is neither.
    """
    if _is_scalar(key, jnp.integer):
        return jax.random.key(key)
    if isinstance(key, jax.Array):
        typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and not key.shape
        raw = key.dtype == jnp.uint32 and key.ndim == 1
        if typed or raw:
            return key
    raise TypeError(
        "`key` must be an integer seed or one key of jax.random. Got "
        f"{_described(key)}."
    )


def check_num_losses(num_losses: int, gramian: Float[Array, "m m"]) -> int:
    """Check that a Gramian has as many losses as the state was made for.

    **Raises:** `ValueError` if it does not.
    """
    if gramian.shape[0] != num_losses:
        raise ValueError(
            f"`gramian` must be of num_losses={num_losses} losses, for which the state "
            f"was made. Got {gramian.shape[0]}."
        )
    return num_losses


def check_max_iterations(max_iterations: int | None) -> None:
    """Check a cap on the iterations of a solver.

    **Raises:** `ValueError` if it is below 1.
    """
    if max_iterations is not None and max_iterations < 1:
        raise ValueError(f"`max_iterations` must be at least 1. Got {max_iterations}.")
