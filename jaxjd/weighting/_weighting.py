"""The type of all weightings, and how to make one from a function.

A weighting turns the Gramian $G = J J^\\top$ of m losses into m weights $w$; the update
is then $J^\\top w$. It is a pair of pure functions, named as in optax: `init` makes the
state, `update` takes it and returns it. A weighting without state can simply be called:

- `mean`: $w_i = 1/m$, whatever the Gramian;
- `upgrad`: projects every gradient onto the directions in which no loss increases, and
  takes the mean;
- `dualproj`: projects the mean;
- `gradvac`: has a state, the cosines that it has seen between the gradients.

A `mask` says which losses are missing from a batch. A weighting gives them the weight
zero, and the others the weights that they would have without them.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterator
from typing import Any, Literal, Protocol, TypeVar, get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from jaxjd._checks import check_choice, check_gramian, present_only
from jaxjd._numerics import all_finite
from jaxjd._sharding import spread_like
from jaxjd.weighting._preference import Preference

State = TypeVar("State")
GramianPart = Literal["gramian", "diagonal", "shape"]
Taken = Literal["preference", "loss_names"]


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
    - `reads`: the part of the Gramian that `update` looks at. [`jaxjd.aggregate`][]
      computes no other. With `"diagonal"`, the squared norms of the gradients, the
      other entries are zero. With `"shape"` no gradient is looked at: `gramian` is a
      `jax.ShapeDtypeStruct`, and the update costs one backward pass.
    - `takes`: which of these extra arguments `update` has. `"preference"`: m numbers,
      the preference of this step. [`jaxjd.aggregate`][] refuses it if a weighting has
      none. `"loss_names"`: a tuple of m strings, the paths of the losses in the tree
      that holds them. [`jaxjd.aggregate`][] always gives them to a weighting that takes
      them.

    A weighting whose state is empty can be called: `weights = weighting(gramian)`. A
    weighting is not an optax transformation: [`jaxjd.aggregate`][] makes one of it.

    **Raises:** `ValueError` if `reads`, or a name in `takes`, is not one of these.

    **Example:**

    >>> def inverse_norms(gramian, state, *, mask=None, **extra_args):
    ...     return 1 / jnp.sqrt(jnp.diag(gramian)), state
    >>> weighting = jaxjd.Weighting(tuple, inverse_norms)
    >>> weighting(jnp.diag(jnp.array([1.0, 4.0])))
    Array([1. , 0.5], dtype=float32)
    >>> tx = optax.chain(jaxjd.aggregate(weighting), optax.adam(1e-3))
    """

    # Not a NamedTuple, because `jax.jit(weighting)` needs weak references to it.
    init: Callable[[], Any]
    update: WeightingUpdate
    reads: GramianPart = "gramian"
    takes: Collection[Taken] = ()

    def __post_init__(self) -> None:
        check_choice("reads", self.reads, get_args(GramianPart))
        check_takes(self.takes)
        if not isinstance(self.init, _Init):
            object.__setattr__(self, "init", _Init(self.init))

    def __iter__(self) -> Iterator[Any]:
        """Unpack it like a pair of optax: `init, update = weighting`."""
        return iter((self.init, self.update))

    def __call__(
        self,
        gramian: Float[Array, "m m"],
        *,
        mask: Bool[Array, " m"] | None = None,
    ) -> Float[Array, " m"]:
        """The weights, if the state is empty.

        **Raises:** `TypeError` if it is not, or if `gramian` is not an array.
        """
        if hasattr(gramian, "_fields"):
            # optax.inject_hyperparams takes it for a schedule with a state.
            raise TypeError(
                "A weighting must be called with a Gramian, [m, m]. Got a state, "
                f"{type(gramian).__name__}. In optax.inject_hyperparams, which takes "
                "whatever can be called for a schedule, say `static_args='weighting'`."
            )
        check_gramian(gramian)
        state = self.init()
        if jax.tree.leaves(state):
            raise TypeError(
                "This weighting has a state and cannot simply be called. Use `state = "
                "weighting.init()` and `weights, state = weighting.update(gramian, "
                "state)`."
            )
        return self.update(gramian, state, mask=mask)[0]


@dataclasses.dataclass(frozen=True)
class _Init:
    """An `init` that says what is wrong if optax calls it."""

    function: Callable[[], Any]

    def __call__(self, *params: Any) -> Any:
        if params:
            raise TypeError(
                "A weighting is not an optax transformation, so `init` takes no "
                "parameters. In optax.chain use `jaxjd.NAME(...)` in place of "
                "`jaxjd.weighting.NAME(...)`, or `jaxjd.aggregate(weighting)`."
            )
        return self.function()


def check_takes(takes: Collection[Taken]) -> None:
    """**Raises:** `ValueError` if it does not hold names of extra arguments."""
    names = [takes] if isinstance(takes, str) else takes
    for name in names:
        check_choice("takes", name, get_args(Taken))


def stateless(
    weights: Callable[..., Float[Array, " m"]],
    *,
    reads: GramianPart = "gramian",
    preference: Preference | None = None,
) -> Weighting:
    """Make a weighting from a function of a checked Gramian and a mask.

    The function sees zeros in the rows and columns of the losses that are missing. For
    a method that has a preference, the preferred weights are its last argument.
    """

    def update(gramian, state, /, *, mask=None, **extra_args):
        gramian, mask = present_only(gramian, mask)
        preferred = preferred_by(preference, gramian, mask, extra_args)
        return weights(gramian, mask, *preferred), state

    return Weighting(optax.EmptyState, update, reads, taken(preference))


def taken(preference: Preference | None) -> Collection[Taken]:
    """The extra arguments of a method, with a preference or without one."""
    return () if preference is None else get_args(Taken)


def preferred_by(
    preference: Preference | None,
    gramian: Float[Array, "m ..."],
    mask: Bool[Array, " m"],
    extra_args: dict[str, Any],
) -> tuple[Float[Array, " m"], ...]:
    """The preferred weights, or nothing for a method that has no preference."""
    if preference is None:
        return ()  # All extra arguments are for other links of the chain.
    own = {name: extra_args[name] for name in get_args(Taken) if name in extra_args}
    return (preference.among(gramian, mask, **own),)


def stateful(
    init: Callable[[], State],
    weights: Callable[..., tuple[Float[Array, " m"], State]],
    *,
    reads: GramianPart = "gramian",
    preference: Preference | None = None,
) -> Weighting:
    """Make a weighting from a state and a function of a checked Gramian, a mask and it.

    The function sees zeros in the rows and columns of the losses that are missing. For
    a method that has a preference, the preferred weights are its last argument. A batch
    that is not finite gives NaN weights and leaves the state as it was, so that it does
    not spoil all later steps.
    """

    def update(gramian, state, /, *, mask=None, **extra_args):
        gramian, mask = present_only(gramian, mask)
        preferred = preferred_by(preference, gramian, mask, extra_args)
        chosen, new = weights(gramian, mask, state, *preferred)
        finite = all_finite(gramian)
        return jnp.where(finite, chosen, jnp.nan), keep_unless(finite, new, state)

    return Weighting(init, update, reads, taken(preference))


def keep_unless(replace: Bool[Array, ""], new: State, old: State) -> State:
    """The new state, or the old one, in the dtypes of the old one.

    They must not change, because scans carry the state.
    """

    def choose(new, old):
        if not jnp.issubdtype(old.dtype, jax.dtypes.prng_key):
            new = new.astype(old.dtype)
        return jnp.where(replace, spread_like(new, jax.typeof(old)), old)

    return jax.tree.map(choose, new, old)


def check_weighting(weighting: Weighting) -> Weighting:
    """**Raises:** `TypeError` if it is anything else, such as a transformation."""
    if isinstance(weighting, Weighting):
        return weighting
    name = getattr(weighting, "__name__", "")
    module = getattr(weighting, "__module__", None) or ""
    if isinstance(weighting, optax.GradientTransformation):
        got = (
            "an optax transformation: write `jaxjd.weighting.NAME(...)` in place of "
            "`jaxjd.NAME(...)`"
        )
    elif module == "jaxjd" or module.startswith("jaxjd.weighting."):
        got = f"a function that makes one: write `jaxjd.weighting.{name}(...)`"
    elif hasattr(weighting, "gramian"):
        got = "a Jacobian, which the update of the transformation takes"
    elif callable(weighting):
        got = "a function: one of a Gramian becomes `jaxjd.Weighting(init, update)`"
    else:
        got = repr(weighting)
    raise TypeError(
        "`weighting` must be a jaxjd.Weighting, such as jaxjd.weighting.upgrad(). Got "
        f"{got}."
    )
