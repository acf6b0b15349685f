"""What is a weighting, and how are its arguments checked?

A weighting turns the Gramian $G = J J^\\top$ of m losses into m weights $w$; the update
is then $J^\\top w$. It is a pair of pure functions, named as optax names them: `init`
makes the state, `update` takes it and gives it back. A weighting without state can
simply be called:

- `mean`: $w_i = 1/m$, whatever the Gramian;
- `upgrad`: the mean of what every gradient becomes when it is projected onto the
  directions in which no loss increases;
- `dualproj`: the projection of the mean.

Losses that are missing from a batch are named by a `mask`, and a weighting gives them
the weight zero and the others what they would have had without the missing ones.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

from jaxjd.engine import accumulation_dtype


class WeightingUpdate(Protocol):
    def __call__(
        self,
        gramian: Float[Array, "m m"],
        state: Any,
        /,
        *,
        mask: Bool[Array, " m"] | None = None,
        **extra_args: Any,
    ) -> tuple[Float[Array, " m"], Any]: ...


class Weighting(NamedTuple):
    """From a Gramian to weights: a pair of pure functions.

    **Arguments:**

    - `init`: `init() -> state`, a pytree of arrays.
    - `update`: `update(gramian, state, *, mask=None, **extra_args) -> (weights, state)`
      with `gramian` [m, m], `mask` [m] of bools (False: this loss is missing) and
      `weights` [m]. It must accept and ignore extra arguments that it does not know.

    A weighting whose state is empty can be called: `weights = weighting(gramian)`.
    """

    init: Callable[[], Any]
    update: WeightingUpdate

    def __call__(
        self,
        gramian: Float[Array, "m m"],
        *,
        mask: Bool[Array, " m"] | None = None,
    ) -> Float[Array, " m"]:
        state = self.init()
        if jax.tree.leaves(state):
            raise TypeError(
                "This weighting has a state and cannot simply be called. Use `state = "
                "weighting.init()` and `weights, state = weighting.update(gramian, "
                "state)`."
            )
        return self.update(gramian, state, mask=mask)[0]


def stateless(
    weights: Callable[[Float[Array, "m m"], Bool[Array, " m"]], Float[Array, " m"]],
) -> Weighting:
    """A weighting from a function of a checked Gramian and a mask.

    The function sees zeros in the rows and columns of the losses that are missing.
    """

    def update(gramian, state, /, *, mask=None, **extra_args):
        del extra_args  # For other links of the chain.
        gramian = check_gramian(gramian)
        mask = check_mask(mask, gramian.shape[0])
        present = mask[:, None] & mask[None]
        return weights(jnp.where(present, gramian, 0), mask), state

    return Weighting(optax.EmptyState, update)


def check_gramian(gramian: Float[Array, "m m"]) -> Float[Array, "m m"]:
    """**Raises:** `ValueError` if it is not square, `TypeError` if it is not real."""
    gramian = jnp.asarray(gramian)
    if gramian.ndim != 2 or gramian.shape[0] != gramian.shape[1] or not gramian.size:
        raise ValueError(
            f"`gramian` must be a square matrix, [m, m]. Got shape {gramian.shape}."
        )
    if not jnp.issubdtype(gramian.dtype, jnp.floating):
        raise TypeError(f"`gramian` must be real floating-point. Got {gramian.dtype}.")
    return gramian.astype(accumulation_dtype(gramian))


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
