"""What is a weighting?

A weighting turns the Gramian $G = J J^\\top$ of m losses into m weights $w$; the update
is then $J^\\top w$. It is a pair of pure functions, named as optax names them: `init`
makes the state, `update` takes it and gives it back. A weighting without state can
simply be called:

- `mean`: $w_i = 1/m$, whatever the Gramian;
- `upgrad`: the mean of what every gradient becomes when it is projected onto the
  directions in which no loss increases;
- `dualproj`: the projection of the mean;
- `gradvac`: has a state, the cosines that it has seen between the gradients.

Losses that are missing from a batch are named by a `mask`, and a weighting gives them
the weight zero and the others what they would have had without the missing ones.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from jaxjd._checks import present_only

State = TypeVar("State")


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


@dataclasses.dataclass(frozen=True)
class Weighting:
    """From a Gramian to weights: a pair of pure functions.

    **Arguments:**

    - `init`: `init() -> state`, a pytree of arrays.
    - `update`: `update(gramian, state, *, mask=None, **extra_args) -> (weights, state)`
      with `gramian` [m, m], `mask` [m] of bools (False: this loss is missing) and
      `weights` [m]. It must accept and ignore extra arguments that it does not know.

    A weighting whose state is empty can be called: `weights = weighting(gramian)`.
    """

    # Not a NamedTuple: no tuple can be referenced weakly, as `jax.jit(weighting)` does.
    init: Callable[[], Any]
    update: WeightingUpdate

    def __iter__(self) -> Iterator[Any]:
        """As that of optax's pairs: `init, update = weighting`."""
        return iter((self.init, self.update))

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
        return weights(*present_only(gramian, mask)), state

    return Weighting(optax.EmptyState, update)


def stateful(
    init: Callable[[], State],
    weights: Callable[
        [Float[Array, "m m"], Bool[Array, " m"], State],
        tuple[Float[Array, " m"], State],
    ],
) -> Weighting:
    """A weighting from a state and a function of a checked Gramian, a mask, the state.

    The function sees zeros as that of [`stateless`][] does. One batch that is not
    finite gives NaN weights, and leaves the state as it was: it must not spoil all the
    steps that come after it.
    """

    def update(gramian, state, /, *, mask=None, **extra_args):
        del extra_args  # For other links of the chain.
        gramian, mask = present_only(gramian, mask)
        chosen, new = weights(gramian, mask, state)
        finite = jnp.isfinite(gramian).all()
        return jnp.where(finite, chosen, jnp.nan), keep_unless(finite, new, state)

    return Weighting(init, update)


def keep_unless(replace: Bool[Array, ""], new: State, old: State) -> State:
    """The new state if it is to replace the old one, in the types of the old one.

    They must not change: the state is carried by scans.
    """

    def choose(new, old):
        if not jnp.issubdtype(old.dtype, jax.dtypes.prng_key):
            new = new.astype(old.dtype)
        return jnp.where(replace, new, old)

    return jax.tree.map(choose, new, old)


def check_weighting(weighting: Weighting) -> Weighting:
    """**Raises:** `TypeError` if it is anything else, such as its transformation."""
    if not isinstance(weighting, Weighting):
        raise TypeError(
            "`weighting` must be a jaxjd.Weighting, such as jaxjd.weighting.upgrad(). "
            f"Got {type(weighting).__name__}."
        )
    return weighting
