"""Turn any weighting into a link of an `optax.chain`."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn, ParamSpec

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float
from optax.experimental import aggregating

from jaxjd import scalarization
from jaxjd import weighting as weightings
from jaxjd._numerics import accumulation_dtype
from jaxjd._typing import PyTree
from jaxjd.jacobian import Jacobian
from jaxjd.scalarization import Scalarizer
from jaxjd.transform._arguments import check_extra_args, needed, resolved
from jaxjd.transform._as_jacobian import as_jacobian
from jaxjd.weighting import Weighting
from jaxjd.weighting._weighting import Part

P = ParamSpec("P")


class AggregateState(NamedTuple):
    """`weighting`: the state of the weighting, whatever that is."""

    weighting: optax.OptState


def aggregate(
    weighting: Weighting
    | Scalarizer
    | Callable[[Float[Array, "m m"]], Float[Array, " m"]],
    *,
    wrt: PyTree[bool] | Callable[[optax.Params], PyTree[bool]] | None = None,
    features: str | Sequence[str] | None = None,
) -> aggregating.Aggregator:
    r"""Replace a Jacobian by the combination of its rows that a weighting chooses.

    The update is $J^\top w$, where $w$ are the weights for the Gramian $J J^\top$.
    Unlike most transformations this one does not keep the shape of the updates. It
    takes a [`jaxjd.Jacobian`][], or a pytree like the parameters with a leading axis of
    losses, and returns a pytree like the parameters. So it comes first in a chain.

    Its `update` takes the extra argument `mask`, m bools, False for the losses that are
    missing from this batch. The update is what it would be without them. Their
    gradients must still be finite: a missing loss that is NaN makes the update NaN.
    Some weightings take `losses`, `losses_after` or `cross_gramian` too. Other extra
    arguments are ignored, as the links of optax do, but a name that is close to one of
    these gives a warning.

    **Arguments:**

    - `weighting`: from [`jaxjd.weighting`][], or any function from a Gramian to m
      weights. Or a scalarizer from [`jaxjd.scalarization`][], whose weights come from
      the losses: then no Gramian is computed.
    - `wrt`: a pytree of bools like the parameters or a prefix of them, or a function
      from the parameters to one. The weights then come from the Gramian of the chosen
      parameters only, and are applied to all of them: partial Jacobian descent.
    - `features`: the name of values that the losses share, or several names. The
      weights then come from the Gramian with respect to these values, and one backward
      pass takes them through what lies before: MGDA-UB, for any weighting. In the
      function, name a value by `h = jax.ad_checkpoint.checkpoint_name(h, "features")`;
      see [`jaxjd.Jacobian.features`][]. The promise of the weighting then holds for the
      losses as functions of the features: if the features could move freely, no loss
      would increase. It does not hold for parameters, which move all features at once,
      nor for parameters that several losses share behind the features.

    **Raises:** `TypeError` if `weighting` is neither a weighting nor a function of a
    Gramian; `ValueError` if both `wrt` and `features` are given. When `update` is
    traced, `TypeError` if it gets neither a Jacobian nor arrays; `ValueError` if the
    arrays do not have the shapes of the parameters behind one leading axis (an ordinary
    gradient), if a part of the parameters was masked out by `optax.masked` or
    `optax.partition` (use [`jaxjd.partition`][]), if the weighting does not return m
    weights, or if the function does not name the features.

    **References:** Quinton & Rey (2024), arXiv:2406.16232, section 2.2; for `features`
    Sener & Koltun (2018), arXiv:1810.04650, section 3.3.
    """
    check_aggregated(weighting)
    if isinstance(weighting, Scalarizer):
        weighting = weighting.weighting
    if wrt is not None and features is not None:
        raise ValueError(
            "`wrt` and `features` both say where the weights come from. Give one."
        )

    def init_fn(params: optax.Params) -> AggregateState:
        del params
        state = weighting.init() if isinstance(weighting, Weighting) else ()
        return AggregateState(state)

    def update_fn(
        updates: Any,  # A Jacobian, or a pytree of arrays [m, ...].
        state: Any,
        params: optax.Params | None = None,
        *,
        mask: Bool[Array, " m"] | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AggregateState]:
        check_extra_args(extra_args)
        jacobian = as_jacobian(updates, params)
        chosen, vjp = jacobian, jacobian.vjp
        if wrt is not None:
            chosen = jacobian.restrict(resolved(wrt, needed(params)))
        elif features is not None:
            chosen, vjp = jacobian._split(features)
        if isinstance(weighting, Weighting):
            if weighting.reads == "shape":
                vjp = jacobian._vjp_alone
            weights, weighting_state = weighting.update(
                part_of_gramian(chosen, weighting.reads),
                state.weighting,
                mask=mask,
                **extra_args,
            )
        else:
            if mask is not None:
                raise ValueError(
                    "`mask` is given, but the weighting is a plain function of the "
                    "Gramian, which cannot know it. Make it a `jaxjd.Weighting`."
                )
            weights, weighting_state = weighting(chosen.gramian()), state.weighting
        if jnp.shape(weights) != (jacobian.num_losses,):
            raise ValueError(
                f"`weighting` must return one weight for each of the "
                f"{jacobian.num_losses} losses. Got shape {jnp.shape(weights)}."
            )
        return vjp(weights), AggregateState(weighting_state)

    return aggregating.Aggregator(init_fn, update_fn)


def part_of_gramian(jacobian: Jacobian, part: Part) -> Any:
    """What a weighting reads of the Gramian. Nothing else is computed."""
    m = jacobian.num_losses
    if part == "diagonal":
        return jnp.diag(jacobian.squared_norms())
    if part == "shape":
        like = [jnp.zeros((), dtype) for dtype in jacobian._operator.dtypes]
        return jax.ShapeDtypeStruct((m, m), accumulation_dtype(*like))
    return jacobian.gramian()


def check_aggregated(weighting: object) -> None:
    """**Raises:** `TypeError` if it is not a weighting or a function of a Gramian."""
    if isinstance(weighting, Weighting | Scalarizer):
        return
    name = getattr(weighting, "__name__", None)
    if isinstance(weighting, optax.GradientTransformation):
        got = "a transformation, which needs no `jaxjd.aggregate`: use it as it is"
    elif isinstance(weighting, Jacobian):
        got = "a Jacobian, which `update` takes"
    elif isinstance(name, str) and getattr(weightings, name, None) is weighting:
        got = f"a function that makes one: write `jaxjd.weighting.{name}(...)`"
    elif isinstance(name, str) and getattr(scalarization, name, None) is weighting:
        got = f"a function that makes one: write `jaxjd.scalarization.{name}(...)`"
    elif isinstance(name, str) and getattr(weighting, "__module__", "") == "jaxjd":
        got = f"a function that makes a transformation: write `jaxjd.{name}(...)`"
    elif callable(weighting):
        return
    else:
        got = repr(weighting)
    raise TypeError(
        "`weighting` must be a jaxjd.Weighting, such as jaxjd.weighting.upgrad(), or a "
        f"function from a Gramian to weights. Got {got}."
    )


def aggregator(
    make: Callable[P, Weighting | Scalarizer],
) -> Callable[P, aggregating.Aggregator]:
    """Turn the maker of a weighting or a scalarizer into that of its transformation."""
    name = make.__name__
    of_losses = getattr(scalarization, name, None) is make
    room = "scalarization" if of_losses else "weighting"

    def transformation(*args: P.args, **kwargs: P.kwargs) -> aggregating.Aggregator:
        return aggregate(make(*args, **kwargs))

    # Not functools.wraps, which would claim that a Weighting is returned.
    transformation.__name__ = transformation.__qualname__ = name
    transformation.__module__ = "jaxjd"
    transformation.__annotations__ = {
        **make.__annotations__,
        "return": aggregating.Aggregator,
    }
    transformation.__signature__ = inspect.signature(make).replace(
        return_annotation=aggregating.Aggregator
    )
    transformation.__doc__ = (
        f"The aggregator with the weights of [`jaxjd.{room}.{name}`][].\n\n"
        "    An optax transformation, the first link of a chain: its `update` takes a\n"
        "    [`jaxjd.Jacobian`][] and returns the update $J^\\top w$. See\n"
        "    [`jaxjd.aggregate`][] for its extra arguments and its errors.\n\n"
        f"    {make.__doc__}"
    )
    for attribute in ("init", "update"):
        setattr(transformation, attribute, functools.partial(refuse_uncalled, name))
    return transformation


def refuse_uncalled(name: str, *_: object, **__: object) -> NoReturn:
    """Raise an error if optax is given `jaxjd.NAME` in place of `jaxjd.NAME(...)`."""
    raise TypeError(f"`jaxjd.{name}` must be called: write `jaxjd.{name}(...)`.")
