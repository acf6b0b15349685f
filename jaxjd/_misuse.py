"""How does a Jacobian refuse to be mistaken for a gradient?

A Jacobian is a pytree, so that it can cross `jit` and `scan`. Its leaves are the point
where it is taken and the data, not derivatives: `optax.clip_by_global_norm` in front of
the aggregator would clip the data, in silence. Two things prevent it.

- One leaf is of a type that no arithmetic accepts, a random key of an implementation
  of its own. JAX's error quotes the name of that type, so the name says what to do.
- optax walks gradients beside parameters with `jax.tree.map`. When the two trees
  differ, JAX's error prints the type of the odd one, so printing that type says it too.
"""

import jax
import jax.numpy as jnp
from jax.extend.random import define_prng_impl
from jaxtyping import Array, Key, UInt32

ADVICE = (
    "a Jacobian is not a gradient: put the aggregator, such as jaxjd.upgrad(), first "
    "in optax.chain, and wrap only what comes after it"
)


class ExplainsItself(type):
    """The metaclass of types that print with the advice."""

    def __repr__(cls) -> str:
        return f"<class '{cls.__module__}.{cls.__qualname__}' ({ADVICE})>"


def _refuse(*_: object) -> UInt32[Array, "..."]:
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


def guard() -> Key[Array, "1 1"]:
    """A leaf that arithmetic refuses; a matrix, for functions that skip vectors."""
    return jax.random.wrap_key_data(
        jnp.zeros((1, 1, 1), jnp.uint32), impl=_IMPLEMENTATION
    )
