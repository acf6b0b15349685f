"""Sort floats as integers, which XLA compares without a call per pair on a CPU.

XLA compares floats by a function of its own, which ranks NaN and both zeros, and calls
it for every pair on a CPU. Integers it compares directly, 4 times as fast.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def sort(values: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    """As `jnp.sort`: ascending, NaN last."""
    bits = 8 * values.dtype.itemsize
    signed = jnp.dtype(f"int{bits}")
    integers = _flipped(values.view(signed), bits)
    # A NaN may have the sign of negative numbers, which would come first.
    integers = jnp.where(jnp.isnan(values), jnp.iinfo(signed).max, integers)
    ordered = lax.sort(integers, dimension=axis)
    return _flipped(ordered, bits).view(values.dtype)


@sort.defjvp
def _sort_jvp(axis, primals, tangents):
    return jax.jvp(functools.partial(jnp.sort, axis=axis), primals, tangents)


def _flipped(integers: Array, bits: int) -> Array:
    """From the bits of floats integers of the same order, and back.

    All bits but the sign are the magnitude, so negative ones are in reverse order.
    """
    magnitude = jnp.array(2 ** (bits - 1) - 1, integers.dtype)
    return jnp.where(integers < 0, integers ^ magnitude, integers)
