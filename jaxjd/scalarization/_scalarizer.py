"""The type of all scalarizers, and how to make one from a function.

A scalarizer turns m losses $\\ell$ into one scalar $s(\\ell)$, which
`jax.value_and_grad` differentiates. The gradient of $s(\\ell(\\theta))$ is
$J^\\top \\nabla s(\\ell)$: a combination of the rows of J whose weights come from the
losses alone. So each scalarizer is also a weighting, which reads no more of the Gramian
than its shape:

- `mean`: the mean of the losses, whose weights are $1/m$;
- `geometric_mean`: its weights are in the proportions of $1/\\ell_i$;
- `uw`: has a state, the scales that it has learned.

A `mask` says which losses are missing from a batch. The scalar is that of the others.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from jaxjd._checks import check_mask, present_only
from jaxjd._typing import PyTree
from jaxjd.weighting import Weighting
from jaxjd.weighting._losses import flat_losses, needed_losses
from jaxjd.weighting._preference import Preference
from jaxjd.weighting._weighting import Taken, preferred_by, taken


class ScalarizerUpdate(Protocol):
    def __call__(
        self,
        losses: PyTree[Float[Array, "..."]],
        state: Any,
        /,
        *,
        mask: Bool[Array, " m"] | None = None,
        **extra_args: Any,
    ) -> tuple[Float[Array, ""], Any]: ...


@dataclasses.dataclass(frozen=True)
class Scalarizer:
    """From losses to a scalar: a pair of pure functions.

    **Arguments:**

    - `init`: `init() -> state`, a pytree of arrays.
    - `update`: `update(losses, state, *, mask=None, **extra_args) -> (scalar, state)`
      with `losses` an array of m numbers or a pytree of arrays, as the function of the
      losses returns them, and `mask` [m] of bools (False: this loss is missing). It
      must accept and ignore extra arguments that it does not know.
    - `weighting`: the same as a [`jaxjd.Weighting`][]. By default it differentiates
      `update`, so its weights are the gradient of the scalar in the losses.
    - `takes`: which extra arguments `update` has, as for [`jaxjd.Weighting`][].

    A scalarizer whose state is empty can be called: `scalar = scalarizer(losses)`.
    [`jaxjd.aggregate`][] makes a transformation of it. One with a state goes through
    the auxiliary output:

    ```python
    def loss(params, state, batch):
        return scalarizer.update(losses(params, batch), state)

    (value, state), gradient = jax.value_and_grad(loss, has_aux=True)(
        params, state, batch
    )
    ```

    **Example:**

    >>> scalarizer = jaxjd.Scalarizer(
    ...     tuple, lambda losses, state, **extra_args: (losses.max(), state)
    ... )
    >>> scalarizer(jnp.array([1.0, 4.0]))
    Array(4., dtype=float32)
    >>> tx = optax.chain(jaxjd.aggregate(scalarizer), optax.adam(1e-3))
    """

    init: Callable[[], Any]
    update: ScalarizerUpdate
    weighting: Weighting = None  # type: ignore[assignment]
    takes: Collection[Taken] = ()

    def __post_init__(self) -> None:
        if self.weighting is None:
            weighting = gradient_of(
                self.init, self.update, "this scalarizer", takes=self.takes
            )
            object.__setattr__(self, "weighting", weighting)

    def __iter__(self) -> Iterator[Any]:
        """Unpack it like a pair of optax: `init, update = scalarizer`."""
        return iter((self.init, self.update))

    def __call__(
        self,
        losses: PyTree[Float[Array, "..."]],
        *,
        mask: Bool[Array, " m"] | None = None,
    ) -> Float[Array, ""]:
        """The scalar, if the state is empty.

        **Raises:** `TypeError` if it is not.
        """
        state = self.init()
        if jax.tree.leaves(state):
            raise TypeError(
                "This scalarizer has a state and cannot simply be called. Use `state = "
                "scalarizer.init()` and `scalar, state = scalarizer.update(losses, "
                "state)`."
            )
        return self.update(losses, state, mask=mask)[0]


def gradient_of(
    init: Callable[[], Any],
    update: ScalarizerUpdate,
    method: str,
    check: Callable[[Float[Array, " m"], Bool[Array, " m"]], None] | None = None,
    takes: Collection[Taken] = (),
) -> Weighting:
    """The weighting whose weights are the gradient of a scalarizer in the losses.

    Losses that are not finite make the weights NaN, even where the gradient does not
    depend on them.
    """

    def weights(gramian, state, /, *, mask=None, losses=None, **extra_args):
        gramian, present = present_only(gramian, mask)
        values = needed_losses(method, losses, gramian.shape[0]).astype(gramian.dtype)
        if check is not None:
            check(values, present)

        def scalar(values):
            return update(values, state, mask=present, **extra_args)

        gradient, new = jax.grad(scalar, has_aux=True)(values)
        return jnp.where(finite_losses(values, present), gradient, jnp.nan), new

    return Weighting(init, weights, "shape", takes)


def finite_losses(
    values: Float[Array, " m"], mask: Bool[Array, " m"]
) -> Bool[Array, ""]:
    """Whether the losses that are present are finite."""
    return jnp.where(mask, jnp.isfinite(values), True).all()


def scalarizer(
    method: str,
    scalar: Callable[..., tuple[Float[Array, ""], Any]],
    init: Callable[[], Any] = optax.EmptyState,
    *,
    check: Callable[[Float[Array, " m"], Bool[Array, " m"]], None] | None = None,
    takes: Collection[Taken] = (),
) -> Scalarizer:
    """Make a scalarizer from a function.

    **Arguments:**

    - `method`: its name, for messages.
    - `scalar`: `scalar(values, mask, state, **extra_args) -> (scalar, state)`. The
      values are one vector, float32 or wider, and 1 for the losses that are missing.
    - `init`: makes the state.
    - `check`: raises an error if the values, which may be traced, are out of range.
    - `takes`: which extra arguments `scalar` has.
    """

    def update(losses, state, /, *, mask=None, **extra_args):
        values = flat_losses(losses)
        present = check_mask(mask, values.shape[0])
        if check is not None:
            check(values, present)
        # Whatever a missing loss is, nothing depends on it.
        values = jnp.where(present, values, 1)
        return scalar(values, present, state, **extra_args)

    weighting = gradient_of(init, update, method, check, takes)
    return Scalarizer(init, update, weighting, takes)


def stateless(
    method: str,
    scalar: Callable[..., Float[Array, ""]],
    *,
    check: Callable[[Float[Array, " m"], Bool[Array, " m"]], None] | None = None,
    preference: Preference | None = None,
) -> Scalarizer:
    """Make a scalarizer from a function of the losses and the mask.

    For a method that has a preference, the preferred weights are its last argument.
    """

    def with_state(values, mask, state, **extra_args):
        preferred = preferred_by(preference, values, mask, extra_args)
        return scalar(values, mask, *preferred), state

    return scalarizer(method, with_state, check=check, takes=taken(preference))


def sum_of_present(
    terms: Float[Array, " m"], mask: Bool[Array, " m"]
) -> Float[Array, ""]:
    return jnp.where(mask, terms, 0).sum()
