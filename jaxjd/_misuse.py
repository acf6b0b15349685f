"""Make a Jacobian that is mistaken for a gradient raise an error that says what to do.

A Jacobian is a pytree, so that it can cross `jit` and `scan`. Its leaves are the point
where it is taken and the data, not derivatives: `optax.clip_by_global_norm` in front of
the aggregator would clip the data, in silence. Three things prevent it.

- One leaf is a random key of an implementation of its own, a type that no arithmetic
  accepts. JAX's error quotes the name of that type, so the name says what to do.
- Methods of such a key, which optax calls outside of `jit`, raise an error that quotes
  nothing. So before it comes an array whose methods raise the advice themselves.
- optax walks gradients beside parameters with `jax.tree.map`. When the two trees
  differ, JAX's error prints the type of the odd one, so printing that type says it too.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.random import define_prng_impl
from jaxtyping import Array, Key

ADVICE = (
    "a Jacobian is not a gradient: put the aggregator, such as jaxjd.upgrad(), first "
    "in optax.chain, and wrap only what comes after it"
)


class ExplainsItself(type):
    """The metaclass of types that print with the advice."""

    def __repr__(cls) -> str:
        return f"<class '{cls.__module__}.{cls.__qualname__}' ({ADVICE})>"


def _refuse(*_: object, **__: object) -> Any:
    raise TypeError(ADVICE)


_IMPLEMENTATION = define_prng_impl(
    key_shape=(1,),
    seed=_refuse,
    split=_refuse,
    random_bits=_refuse,
    fold_in=_refuse,
    name="jaxjd.Jacobian",
    tag=ADVICE,
)


class Refusal(np.ndarray):
    """Zeros that JAX may carry, and that refuse to be computed with in Python."""

    __array_ufunc__ = _refuse


# What JAX looks at to carry an array, and what prints it.
_CARRIED = {
    "base", "copy", "data", "device", "dtype", "flags", "itemsize", "nbytes", "ndim",
    "shape", "size", "strides", "tobytes", "tolist", "view", "astype", "reshape",
}  # fmt: skip
for _name in set(dir(np.ndarray)) - _CARRIED:
    if not _name.startswith("_"):
        setattr(Refusal, _name, property(_refuse))


class Guards(NamedTuple):
    """The leaves that refuse arithmetic, in the order in which it meets them."""

    refusal: Any  # A `Refusal`, or what a transformation of JAX has put in its place.
    key: Key[Array, "1 1"]

    def renewed(self) -> "Guards":
        """With a `Refusal` again, after a transformation has returned a plain array."""
        refusal = self.refusal
        if not isinstance(refusal, jax.Array) or isinstance(refusal, Tracer):
            return self
        if refusal.dtype != jnp.float32:  # optax makes trees of keys, for one.
            return self
        return self._replace(refusal=_refusal(refusal.shape))


def _refusal(shape: tuple[int, ...]) -> Refusal:
    # Of floats: optax draws noise in the type of each leaf, and the error must be ours.
    return np.zeros(shape, np.float32).view(Refusal)


def guards() -> Guards:
    """Leaves for a Jacobian: matrices, for functions that skip vectors."""
    key = jax.random.wrap_key_data(
        jnp.zeros((1, 1, 1), jnp.uint32), impl=_IMPLEMENTATION
    )
    return Guards(_refusal((1, 1)), key)
