"""How does a weighting become a link of an `optax.chain`? Answered once, for all."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PyTree
from optax.experimental import aggregating

from jaxjd.transform._as_jacobian import as_jacobian
from jaxjd.weighting import Weighting

P = ParamSpec("P")


class AggregateState(NamedTuple):
    """`weighting`: the state of the weighting, whatever that is."""

    weighting: optax.OptState


def aggregate(
    weighting: Weighting | Callable[[Float[Array, "m m"]], Float[Array, " m"]],
    *,
    wrt: PyTree[bool] | Callable[[optax.Params], PyTree[bool]] | None = None,
) -> aggregating.Aggregator:
    r"""Replace a Jacobian by the combination of its rows that a weighting chooses.

    The update is $J^\top w$, where $w$ is the weighting of the Gramian $J J^\top$.
    Unlike most transformations this one does not keep the shape of the updates: in
    comes a [`jaxjd.Jacobian`][], or a pytree like the parameters with a leading axis of
    losses, and out comes a pytree like the parameters. So it comes first in a chain.

    Its `update` takes the extra argument `mask`, m bools, False for the losses that are
    missing from this batch: the update is what it would be without them. They must
    still be numbers: a missing loss that is NaN makes the update NaN.

    **Arguments:**

    - `weighting`: from [`jaxjd.weighting`][], or any function from a Gramian to m
      weights.
    - `wrt`: a pytree of bools like the parameters or a prefix of them, or a function
      from the parameters to one. The weights then come from the Gramian of the chosen
      parameters only, and are applied to all of them: partial Jacobian descent.

    **Raises:** when `update` is traced, `TypeError` if it gets neither a Jacobian nor
    arrays; `ValueError` if the arrays do not have the shapes of the parameters behind
    one leading axis (an ordinary gradient), if a part of the parameters was masked out
    by `optax.masked` or `optax.partition` (use [`jaxjd.partition`][]), or if the
    weighting does not return m weights.

    **Reference:** Quinton & Rey (2024), arXiv:2406.16232, section 2.2.
    """

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
        jacobian = as_jacobian(updates, params)
        chosen = jacobian
        if wrt is not None:
            chosen = jacobian.restrict(wrt(needed(params)) if callable(wrt) else wrt)
        gramian = chosen.gramian()
        if isinstance(weighting, Weighting):
            weights, weighting_state = weighting.update(
                gramian, state.weighting, mask=mask, **extra_args
            )
        else:
            if mask is not None:
                raise ValueError(
                    "`mask` is given, but the weighting is a plain function of the "
                    "Gramian, which cannot know it. Make it a `jaxjd.Weighting`."
                )
            weights, weighting_state = weighting(gramian), state.weighting
        if jnp.shape(weights) != (jacobian.num_losses,):
            raise ValueError(
                f"`weighting` must return one weight for each of the "
                f"{jacobian.num_losses} losses. Got shape {jnp.shape(weights)}."
            )
        return jacobian.vjp(weights), AggregateState(weighting_state)

    return aggregating.Aggregator(init_fn, update_fn)


def needed(params: optax.Params | None) -> optax.Params:
    if params is None:
        raise ValueError(
            "`params` must be given to `update`, for `wrt` or `labels` to be found: "
            "`tx.update(updates, state, params)`."
        )
    return params


def aggregator(make: Callable[P, Weighting]) -> Callable[P, aggregating.Aggregator]:
    """From the maker of a weighting that of its transformation, same signature."""

    @functools.wraps(make)
    def transformation(*args: P.args, **kwargs: P.kwargs) -> aggregating.Aggregator:
        return aggregate(make(*args, **kwargs))

    transformation.__doc__ = (
        f"`jaxjd.aggregate(jaxjd.weighting.{make.__name__}(...))`, an optax "
        f"transformation that comes first in a chain.\n\n    {make.__doc__}"
    )
    transformation.__module__ = "jaxjd"
    return transformation
