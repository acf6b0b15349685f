"""Turn any weighting into a link of an `optax.chain`."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn, ParamSpec

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float
from optax.experimental import aggregating

from jaxjd import scalarization
from jaxjd import weighting as weightings
from jaxjd._checks import check_integer, check_mask, known
from jaxjd._diagnostics import Diagnostics
from jaxjd._diagnostics import diagnostics as compute_diagnostics
from jaxjd._numerics import accumulation_dtype
from jaxjd._typing import PyTree
from jaxjd.jacobian import Jacobian
from jaxjd.scalarization import Scalarizer
from jaxjd.transform._arguments import check_extra_args, in_order, preference_in
from jaxjd.transform._as_jacobian import as_jacobian
from jaxjd.transform._grouping import Grouping, check_group, groups_of
from jaxjd.transform._parts import applied_to, joined, parts_of
from jaxjd.transform._reuse import Computed, Reused, in_every
from jaxjd.weighting import Weighting
from jaxjd.weighting._weighting import GramianPart

P = ParamSpec("P")


class AggregateState(NamedTuple):
    """The state of an aggregator.

    - `weighting`: the state of the weighting, whatever that is. With `group`, its
      arrays have a leading axis of groups.
    - `reused`: the weights in use, and for how long, if they are not computed in every
      step. Else empty.
    - `diagnostics`: of the last step that computed weights, if they are kept. Else
      empty.
    """

    weighting: optax.OptState
    reused: Reused | tuple[()] = ()
    diagnostics: Diagnostics | tuple[()] = ()


def aggregate(
    weighting: Weighting
    | Scalarizer
    | Callable[[Float[Array, "m m"]], Float[Array, " m"]],
    *,
    wrt: PyTree[bool] | Callable[[optax.Params], PyTree[bool]] | None = None,
    features: str | Sequence[str] | None = None,
    group: Grouping | None = None,
    every: int | None = None,
    diagnostics: bool = False,
    num_losses: int | None = None,
) -> aggregating.Aggregator:
    r"""Replace a Jacobian by the combination of its rows that a weighting chooses.

    The update is $J^\top w$, where $w$ are the weights for the Gramian $J J^\top$.
    Unlike most transformations this one does not keep the shape of the updates. It
    takes a [`jaxjd.Jacobian`][], or a pytree like the parameters with a leading axis of
    losses, and returns a pytree like the parameters. So it comes first in a chain.

    Its `update` takes the extra argument `mask`, m bools or a pytree of them like the
    losses, False for the losses that are missing from this batch. The update is what it
    would be without them. Their gradients must still be finite: a missing loss that is
    NaN makes the update NaN. Some weightings take `losses`, `losses_after` or
    `cross_gramian` too. Those that are made with a `preference` also take one here, m
    numbers or a pytree of them like the losses, and this one is used. It may be traced:
    so a schedule or `jax.vmap` can change it without another compilation. Other extra
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
      function, name a value by `h = checkpoint_name(h, "features")`, with `from
      jax.ad_checkpoint import checkpoint_name`; see [`jaxjd.Jacobian.features`][]. The
      promise of the weighting then holds for the losses as functions of the features:
      if the features could move freely, no loss would increase. It does not hold for
      parameters, which move all features at once, nor for parameters that several
      losses share behind the features.
    - `group`: groups of parameters that have a Gramian, weights and a state of the
      weighting each. `"leaf"`: every array is a group; `"layer"`: the arrays of one
      module or dict; a depth: those whose paths begin with the same so many keys; a
      function from the path of a parameter, such as `"Dense_0/kernel"`, to a label; or
      a pytree of labels like the parameters or a prefix of them. The weights of all
      groups are computed together, by `jax.vmap`. For other weightings in other groups
      there is [`jaxjd.partition`][].
    - `every`: weights are computed in every so many steps, and used again in the steps
      between, each of which costs a backward pass of the weighted losses. A loss that
      is missing when they are computed has the weight zero until they are computed
      again. Weights that are not finite are not kept: the next step computes them.
    - `diagnostics`: whether the state keeps the [`jaxjd.Diagnostics`][] of the last
      Gramian and weights. `optax.tree.get(opt_state, "diagnostics")` finds them in the
      state of a chain. The Gramian is then computed even if the weighting needs none.
    - `num_losses`: m, which the state needs with `every` and with `diagnostics`.

    **Raises:** `TypeError` if `weighting` is neither a weighting nor a function of a
    Gramian; `ValueError` if more than one of `wrt`, `features` and `group` are given;
    `ValueError` or `TypeError` if `group`, `every` or `num_losses` are not as they
    should be. When `update` is traced, `TypeError` if it gets neither a Jacobian nor
    arrays; `ValueError` if the arrays do not have the shapes of the parameters behind
    one leading axis (an ordinary gradient), if there are not `num_losses` losses, if a
    part of the parameters was masked out by `optax.masked` or `optax.partition` (use
    [`jaxjd.partition`][]), if the weighting does not return m weights, if it is given a
    `preference` and has none, or if the function does not name the features.

    **References:** Quinton & Rey (2024), arXiv:2406.16232, section 2.2; for `features`
    Sener & Koltun (2018), arXiv:1810.04650, section 3.3; for `group` Wang et al.
    (2021), arXiv:2010.05874, section 3.

    **Example:**

    >>> tx = jaxjd.aggregate(lambda gramian: 1 / jnp.diag(gramian))
    >>> params, J = jnp.zeros(2), jnp.array([[2.0, 0.0], [0.0, 4.0]])
    >>> tx.update(J, tx.init(params), params)[0]
    Array([0.5 , 0.25], dtype=float32)
    """
    check_aggregated(weighting)
    if isinstance(weighting, Scalarizer):
        weighting = weighting.weighting
    places = {"wrt": wrt, "features": features, "group": group}
    given = [f"`{name}`" for name, value in places.items() if value is not None]
    if len(given) > 1:
        raise ValueError(
            f"{' and '.join(given)} all say where the weights come from. Give one."
        )
    if group is not None:
        check_group(group)
    sometimes = every is not None and period_of(every) > 1
    kept = kept_losses(sometimes or diagnostics, num_losses)

    def init_fn(params: optax.Params) -> AggregateState:
        state = weighting.init() if isinstance(weighting, Weighting) else ()
        groups = () if group is None else (len(groups_of(group, params)),)
        if groups:
            state = for_each(state, *groups)
        if kept is None:
            return AggregateState(state)
        like = map(jnp.asarray, jax.tree.leaves(params))
        weights = jnp.zeros((*groups, kept), accumulation_dtype(*like))
        reused = Reused(weights, jnp.zeros((), jnp.int32)) if sometimes else ()
        shown = describe(weights[..., None] * weights[..., None, :], weights, None)
        return AggregateState(state, reused, shown if diagnostics else ())

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
        m = jacobian.num_losses
        mask = in_order("mask", mask, jacobian)
        extra_args |= {
            name: in_order(name, extra_args[name], jacobian)
            for name in ("losses", "losses_after")
            if name in extra_args
        }
        takes = weighting.takes if isinstance(weighting, Weighting) else ()
        preference = preference_in(extra_args, jacobian, has_one="preference" in takes)
        extra_args.pop("preference", None)
        if preference is not None:
            extra_args["preference"] = preference
        if "loss_names" in takes:
            extra_args["loss_names"] = jacobian._losses.names
        if isinstance(weighting, Weighting):
            reads = weighting.reads
            weigh: Any = partial(weighting.update, mask=mask, **extra_args)
        elif mask is None:
            reads, weigh = "gramian", lambda gramian, state: (weighting(gramian), state)
        else:
            raise ValueError(
                "`mask` is given, but the weighting is a plain function of the "
                "Gramian, which cannot know it. Make it a `jaxjd.Weighting`."
            )
        if group is not None and "cross_gramian" in extra_args:
            raise ValueError(
                "`cross_gramian` is that of all parameters, but with `group` each "
                "group needs its own. Use `jaxjd.partition`."
            )
        split = partial(
            parts_of, params=params, wrt=wrt, features=features, group=group
        )

        def computed(jacobian: Jacobian) -> Computed:
            parts = split(jacobian)
            needs = "gramian" if diagnostics else reads
            gramians = [part_of_gramian(part.chosen, needs) for part in parts]
            if group is None:
                weights, new = weigh(gramians[0], state.weighting)
            elif needs == "shape":
                of_group = partial(weigh, gramians[0])
                weights, new = jax.vmap(of_group, axis_size=len(parts))(state.weighting)
            else:
                weights, new = jax.vmap(weigh)(jnp.stack(gramians), state.weighting)
            expected = (m,) if group is None else (len(parts), m)
            if jnp.shape(weights) != expected:
                raise ValueError(
                    f"`weighting` must return one weight for each of the {m} losses. "
                    f"Got shape {jnp.shape(weights)[len(expected) - 1 :]}."
                )
            alone = needs == "shape"
            vjps = [part.applied._backward() if alone else part.vjp for part in parts]
            if diagnostics:
                several = gramians[0] if group is None else jnp.stack(gramians)
                shown = jax.tree.map(
                    lambda x, before: x.astype(before.dtype),
                    describe(several, weights, mask),
                    state.diagnostics,
                )
            else:
                shown = ()
            return Computed(combined(vjps, weights), weights, new, shown)

        def reuse(
            vjps: Sequence[Callable[[Float[Array, " m"]], PyTree]],
            weights: Float[Array, "... m"],
        ) -> Computed:
            present = jnp.where(check_mask(mask, m), weights, 0)
            update = combined(vjps, present)
            return Computed(update, weights, state.weighting, state.diagnostics)

        if kept is not None and m != kept:
            raise ValueError(
                f"`num_losses` must be the number of losses, {m}. Got {kept}."
            )
        if every is None or not sometimes:
            update, _, new, shown = computed(jacobian)
            return update, AggregateState(new, (), shown)
        # Their forward pass is that of the losses: outside of the branches.
        vjps = [own._backward() for own in applied_to(jacobian, params, group)]
        (update, _, new, shown), reused = in_every(
            every,
            state.reused,
            lambda: computed(jacobian._anew()),
            partial(reuse, vjps),
        )
        return update, AggregateState(new, reused, shown)

    return aggregating.Aggregator(init_fn, update_fn)


def describe(
    gramian: Float[Array, "... m m"],
    weights: Float[Array, "... m"],
    mask: Bool[Array, " m"] | None,
) -> Diagnostics:
    """The diagnostics, of all groups if there are any."""
    of_one = partial(compute_diagnostics, mask=mask)
    return (jax.vmap(of_one) if weights.ndim > 1 else of_one)(gramian, weights)


def period_of(every: int) -> int:
    return known("every", check_integer("every", every, least=1))


def kept_losses(needed: bool, num_losses: int | None) -> int | None:
    """For how many losses the state keeps numbers, or None if it keeps none.

    **Raises:** `ValueError` or `TypeError` if `num_losses` is needed and is not a
    positive integer.
    """
    if not needed:
        return None
    if num_losses is None:
        raise ValueError(
            "`num_losses` must be given with `every` and with `diagnostics`: the state "
            "keeps numbers for each loss. Got None."
        )
    return known("num_losses", check_integer("num_losses", num_losses, least=1))


def combined(
    vjps: Sequence[Callable[[Float[Array, " m"]], PyTree]],
    weights: Float[Array, "... m"],
) -> optax.Updates:
    """The update from the weights of all parts."""
    of_parts = weights.reshape(len(vjps), -1)
    return joined([vjp(w) for vjp, w in zip(vjps, of_parts, strict=True)])


def for_each(state: Any, groups: int) -> Any:
    """The state of a weighting for each of some groups, each with a key of its own."""

    def repeated(leaf: Any) -> Array:
        leaf = jnp.asarray(leaf)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.split(leaf, groups)
        return jnp.broadcast_to(leaf, (groups, *leaf.shape))

    return jax.tree.map(repeated, state)


def part_of_gramian(jacobian: Jacobian, part: GramianPart) -> Any:
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

    signature = inspect.signature(make)

    def transformation(*args: P.args, **kwargs: P.kwargs) -> aggregating.Aggregator:
        made = aggregate(make(*args, **kwargs))
        given = signature.bind(*args, **kwargs).arguments
        trees = {x: tree for x, tree in given.items() if isinstance(tree, Mapping)}
        return with_names(made, trees) if trees else made

    # Not functools.wraps, which would claim that a Weighting is returned.
    transformation.__name__ = transformation.__qualname__ = name
    transformation.__module__ = "jaxjd"
    transformation.__annotations__ = {
        **make.__annotations__,
        "return": aggregating.Aggregator,
    }
    transformation.__signature__ = signature.replace(
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
        setattr(transformation, attribute, partial(refuse_uncalled, name))
    return transformation


def with_names(
    made: aggregating.Aggregator, trees: Mapping[str, Mapping[str, Any]]
) -> aggregating.Aggregator:
    """An aggregator that was given numbers for named losses, and compares the names.

    **Raises:** `ValueError` in `update`, if they are not those of the losses.
    """

    def update_fn(updates, state, params=None, **extra_args):
        jacobian = as_jacobian(updates, params)
        for name, tree in trees.items():
            in_order(name, tree, jacobian)
        return made.update(jacobian, state, params, **extra_args)

    return aggregating.Aggregator(made.init, update_fn)


def refuse_uncalled(name: str, *_: object, **__: object) -> NoReturn:
    """Raise an error if optax is given `jaxjd.NAME` in place of `jaxjd.NAME(...)`."""
    raise TypeError(f"`jaxjd.{name}` must be called: write `jaxjd.{name}(...)`.")
