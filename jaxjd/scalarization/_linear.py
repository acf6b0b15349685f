"""Weighted sums of the losses, with weights that do not depend on the gradients.

`mean`, `sum`, `constant` and `random` are the weightings of the same names: their
transformations `jaxjd.NAME` are one and the same.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from jaxjd import weighting as weightings
from jaxjd._checks import check_mask
from jaxjd._typing import PerLoss
from jaxjd.scalarization._scalarizer import Scalarizer, sum_of_present
from jaxjd.weighting import Weighting
from jaxjd.weighting._losses import flat_losses


def mean() -> Scalarizer:
    """The mean of the losses that are present: see [`jaxjd.weighting.mean`][].

    **Example:**

    >>> scalarizer = jaxjd.scalarization.mean()
    >>> jax.value_and_grad(scalarizer)(jnp.array([1.0, 4.0]))
    (Array(2.5, dtype=float32), Array([0.5, 0.5], dtype=float32))
    """
    return linear(weightings.mean())


def sum() -> Scalarizer:
    """The sum of the losses that are present: see [`jaxjd.weighting.sum`][].

    **Example:**

    >>> scalarizer = jaxjd.scalarization.sum()
    >>> jax.value_and_grad(scalarizer)(jnp.array([1.0, 4.0]))
    (Array(5., dtype=float32), Array([1., 1.], dtype=float32))
    """
    return linear(weightings.sum())


def constant(weights: PerLoss) -> Scalarizer:
    """The weighted sum of the losses: see [`jaxjd.weighting.constant`][].

    **Arguments:**

    - `weights`: m numbers, of any sign.

    **Raises:** as [`jaxjd.weighting.constant`][].

    **Example:**

    >>> scalarizer = jaxjd.scalarization.constant([1.0, 2.0])
    >>> jax.value_and_grad(scalarizer)(jnp.array([1.0, 4.0]))
    (Array(9., dtype=float32), Array([1., 2.], dtype=float32))
    """
    return linear(weightings.constant(weights))


def random(key: int | Key[Array, ""] = 0) -> Scalarizer:
    """A random convex combination of the losses: see [`jaxjd.weighting.random`][].

    **Arguments:**

    - `key`: an integer seed or a key of `jax.random`. It lives in the state.

    **Raises:** `TypeError` if `key` is neither of these.

    **Reference:** Lin et al. (2022), arXiv:2111.10603, Algorithm 2.

    **Example:**

    >>> scalarizer = jaxjd.scalarization.random(key=0)
    >>> scalar, state = scalarizer.update(jnp.array([1.0, 4.0]), scalarizer.init())
    >>> scalar
    Array(2.8009, dtype=float32)
    """
    return linear(weightings.random(key))


def linear(weighting: Weighting) -> Scalarizer:
    """The sum of the losses with the weights of a weighting of their number alone."""

    def update(losses, state, /, *, mask=None, **extra_args):
        values = flat_losses(losses)
        present = check_mask(mask, values.shape[0])
        m = values.shape[0]
        shape: Any = jax.ShapeDtypeStruct((m, m), values.dtype)
        weights, state = weighting.update(shape, state, mask=present, **extra_args)
        return sum_of_present(weights * jnp.where(present, values, 0), present), state

    return Scalarizer(weighting.init, update, weighting)
