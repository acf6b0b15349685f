"""Pull back the losses of one vectorised computation, each through its own slice.

Under `jax.vmap`, the heads of many tasks are one computation. Its arrays have an axis
of losses: loss i depends on slice i alone. A one-hot cotangent would be pulled back
through the slices of all the others, where it is zero. So a cotangent of ones is pulled
back, for all losses at once, down to where the axis ends. There the losses meet what
they share, and each slice becomes the cotangent of its own loss.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jaxtyping import Array, Float

from jaxjd._sharding import zeros_like
from jaxjd.engine import _jaxpr

# In a linear jaxpr these work entry by entry. They repeat an axis of length 1.
ENTRYWISE = {
    "add",
    "add_any",
    "convert_element_type",
    "copy",
    "div",
    "mul",
    "neg",
    "select_n",
    "sub",
}


class Shared(NamedTuple):
    """Operand `place` of an equation lacks the axis of losses that the result has.

    `axis` is that of the result, and `others` those of the other operands, or None.
    """

    eqn: Any
    place: int
    axis: int
    others: tuple[int | None, ...]

    @property
    def variable(self) -> Any:
        return self.eqn.invars[self.place]


class Slices(NamedTuple):
    """Where a linear jaxpr treats the losses apart.

    - `eqns`: the equations whose results have an axis of losses, in order.
    - `axes`: the axis of each variable that is one of these results, or an argument of
      which each loss depends on its own slice.
    - `shared`: the operands where the axis ends.
    """

    eqns: list[Any]
    axes: dict[Any, int]
    shared: list[Shared]


def find(jaxpr: Any) -> Slices | None:
    """The slices of the losses that are the one output of a linear jaxpr.

    **Returns:** `None` if the losses are not known to be computed apart.
    """
    tangents = set(jaxpr.invars)
    for eqn in jaxpr.eqns:
        if not tangents.isdisjoint(_variables(eqn)):
            tangents.update(eqn.outvars)
    (losses,) = jaxpr.outvars
    axes: dict[Any, int] = {losses: 0}
    eqns: list[Any] = []
    shared: list[Shared] = []
    whole = set()  # What some loss may depend on all of.
    for eqn in reversed(jaxpr.eqns):
        moving = tangents.intersection(_variables(eqn))
        if not moving:
            continue
        if axes.keys().isdisjoint(eqn.outvars):
            whole |= moving
            continue
        if len(eqn.outvars) > 1:
            return None
        result = axes[eqn.outvars[0]]
        operands = _axes_of_operands(eqn, result)
        if operands is None:
            return None
        eqns.append(eqn)
        for place, (v, axis) in enumerate(zip(eqn.invars, operands, strict=True)):
            if _jaxpr.is_literal(v) or v not in moving:
                continue
            if axis is None:
                shared.append(Shared(eqn, place, result, operands))
                whole.add(v)
            elif axes.setdefault(v, axis) != axis:
                return None
    if not eqns or not whole.isdisjoint(axes):
        return None
    return Slices(eqns[::-1], axes, shared)


def _variables(eqn: Any) -> list[Any]:
    return [v for v in eqn.invars if not _jaxpr.is_literal(v)]


def _axes_of_operands(eqn: Any, axis: int) -> tuple[int | None, ...] | None:
    """The axis of each operand that an axis of the result goes along.

    It is None for an operand without such an axis, of which each slice may need all.

    **Returns:** `None` if nothing is known of this equation.
    """
    name, params = eqn.primitive.name, eqn.params
    shape = eqn.outvars[0].aval.shape
    shapes = [v.aval.shape for v in eqn.invars]
    if name in ENTRYWISE:
        return tuple(
            axis if len(of) == len(shape) and of[axis] == shape[axis] else None
            for of in shapes
        )
    if name == "transpose":
        return (params["permutation"][axis],)
    if name in ("reduce_sum", "squeeze"):
        gone = params["axes" if name == "reduce_sum" else "dimensions"]
        return ([n for n in range(len(shapes[0])) if n not in gone][axis],)
    if name == "reshape":
        before = math.prod(shape[:axis])
        same = [
            n
            for n, length in enumerate(shapes[0])
            if length == shape[axis] and math.prod(shapes[0][:n]) == before
        ]
        return (same[0],) if same else None
    if name == "broadcast_in_dim":
        kept = params["broadcast_dimensions"]
        if axis not in kept:
            return (None,)
        place = kept.index(axis)
        return (place,) if shapes[0][place] == shape[axis] else None
    if name == "dot_general":
        return _axes_of_factors(eqn, axis)
    if name == "gather":
        return _axes_of_gathered(eqn, axis)
    return None


def _axes_of_factors(eqn: Any, axis: int) -> tuple[int | None, ...]:
    contracted, batch = eqn.params["dimension_numbers"]
    if axis < len(batch[0]):
        return batch[0][axis], batch[1][axis]
    axis -= len(batch[0])
    free = [
        [n for n in range(v.aval.ndim) if n not in (*contracted[i], *batch[i])]
        for i, v in enumerate(eqn.invars)
    ]
    if axis < len(free[0]):
        return free[0][axis], None
    return None, free[1][axis - len(free[0])]


def _axes_of_gathered(eqn: Any, axis: int) -> tuple[int | None, int | None] | None:
    numbers, shape = eqn.params["dimension_numbers"], eqn.invars[0].aval.shape
    offset, together = numbers.offset_dims, numbers.operand_batching_dims
    if axis in offset:
        gone = {*numbers.collapsed_slice_dims, *together}
        kept = [n for n in range(len(shape)) if n not in gone]
        place = kept[offset.index(axis)]
        whole = eqn.params["slice_sizes"][place] == shape[place]
        return (place, None) if whole and place not in numbers.start_index_map else None
    place = [n for n in range(eqn.outvars[0].aval.ndim) if n not in offset].index(axis)
    if place not in numbers.start_indices_batching_dims:
        return None
    return together[numbers.start_indices_batching_dims.index(place)], place


def rows(
    jaxpr: Any,
    consts: Sequence[Array],
    slices: Slices,
    of_each: Callable[[Callable[[Any], list[Array]], Any], list[Array]],
) -> list[Float[Array, "k ..."] | None]:
    """The rows of the losses, one array for each argument, None if no loss needs it.

    **Arguments:**

    - `of_each`: applies a function to each of some arrays along their first axis.
    """
    values = _constants(jaxpr, consts)
    own, of_ends = _at_the_ends(jaxpr, values, slices)
    found = {v: _apart(entries, slices.axes[v]) for v, entries in own.items()}
    if slices.shared:
        part, used = _jaxpr.needed(
            jaxpr, list(dict.fromkeys(of.variable for of in slices.shared))
        )
        reached = [v for v in jaxpr.invars if v in used]
        trunk = jaxpr_as_fun(ClosedJaxpr(part.replace(invars=reached), list(consts)))
        pullback = jax.linear_transpose(trunk, *[v.aval for v in reached])
        others, in_slices = zip(
            *[
                _operands(of, cotangent, values)
                for of, cotangent in zip(slices.shared, of_ends, strict=True)
            ],
            strict=True,
        )

        def of_one(parts: Any) -> list[Array]:
            total: dict[Any, Array] = {}
            for of, same, some in zip(slices.shared, others, parts, strict=True):
                cotangent = _pulled_back(of, same, *some)
                total[of.variable] = total.get(of.variable, 0) + cotangent
            return list(pullback([total[v] for v in part.outvars]))

        more = of_each(of_one, list(in_slices))
        for variable, of_losses in zip(reached, more, strict=True):
            found[variable] = found.get(variable, 0) + of_losses
    return [found.get(v) for v in jaxpr.invars]


def _constants(jaxpr: Any, consts: Sequence[Array]) -> dict[Any, Array]:
    """The values of a linear jaxpr that no argument of it changes."""
    values = dict(zip(jaxpr.constvars, consts, strict=True))
    for eqn in jaxpr.eqns:
        if all(v in values for v in _variables(eqn)):
            operands = [
                v.val if _jaxpr.is_literal(v) else values[v] for v in eqn.invars
            ]
            results = _jaxpr.evaluate(jaxpr, eqn, operands)
            values.update(zip(eqn.outvars, results, strict=True))
    return values


def _at_the_ends(
    jaxpr: Any, values: dict[Any, Array], slices: Slices
) -> tuple[dict[Any, Array], list[Array]]:
    """Pull ones back through all slices at once.

    **Returns:** what comes out at arguments with an axis of losses, and for each shared
    operand what comes out at the result of its equation.
    """
    arguments = [v for v in jaxpr.invars if v in slices.axes]
    places = {id(eqn): n for n, eqn in enumerate(slices.eqns)}
    ends = [places[id(of.eqn)] for of in slices.shared]

    def losses(own: list[Array], added: dict[int, Array]) -> Array:
        current = values | dict(zip(arguments, own, strict=True))

        def read(v: Any) -> Array:
            if _jaxpr.is_literal(v):
                return v.val
            # What the losses share is zero here.
            return current[v] if v in current else zeros_like(v.aval)

        for n, eqn in enumerate(slices.eqns):
            (result,) = _jaxpr.evaluate(jaxpr, eqn, [read(v) for v in eqn.invars])
            current[eqn.outvars[0]] = result + added.get(n, 0)
        return current[jaxpr.outvars[0]]

    results = {n: slices.eqns[n].outvars[0].aval for n in ends}
    zeros = jax.tree.map(zeros_like, ([v.aval for v in arguments], results))
    value, pullback = jax.vjp(losses, *zeros)
    own, of_ends = pullback(jnp.ones_like(value))
    return dict(zip(arguments, own, strict=True)), [of_ends[n] for n in ends]


def _operands(
    shared: Shared, cotangent: Array, values: dict[Any, Array]
) -> tuple[list[Any], list[Array]]:
    """What pulls a cotangent back to a shared operand: the same for all losses, or not.

    **Returns:** the other operands, None where they have an axis of losses; then the
    cotangent and those that have it, with this axis as the first.
    """
    others: list[Any] = []
    apart = [jnp.moveaxis(cotangent, shared.axis, 0)]
    for v, axis in zip(shared.eqn.invars, shared.others, strict=True):
        value = v.val if _jaxpr.is_literal(v) else values.get(v)
        if value is None:
            # It depends on the arguments. As the equation is linear, no matter how.
            value = zeros_like(v.aval)
        if axis is not None:
            apart.append(jnp.moveaxis(value, axis, 0))
        others.append(value if axis is None else None)
    return others, apart


def _pulled_back(
    shared: Shared, others: list[Any], cotangent: Array, *apart: Array
) -> Array:
    """Pull the cotangent of one loss back to the operand that all of them share."""
    eqn, place, axis, axes = shared
    entrywise = eqn.primitive.name in ENTRYWISE
    params = eqn.params if entrywise else _params_of_one_loss(shared)

    def part(array: Array, axis: int) -> Array:
        # Entry by entry, arrays have the same axes.
        return jnp.expand_dims(array, axis) if entrywise else array

    remaining = iter(apart)
    operands = [
        other if axis is None else part(next(remaining), axis)
        for other, axis in zip(others, axes, strict=True)
    ]

    def function(x: Array) -> Array:
        return eqn.primitive.bind(
            *operands[:place], x, *operands[place + 1 :], **params
        )

    _, pullback = jax.vjp(function, zeros_like(shared.variable.aval))
    return pullback(part(cotangent, axis))[0]


def _params_of_one_loss(shared: Shared) -> dict[str, Any]:
    """The parameters of the equation without the axis of losses."""
    params, axis = dict(shared.eqn.params), shared.axis

    def without(axes: Sequence[int], gone: int | None) -> tuple[int, ...]:
        return tuple(n - (gone is not None and n > gone) for n in axes)

    if shared.eqn.primitive.name == "broadcast_in_dim":
        shape = params["shape"]
        params["shape"] = (*shape[:axis], *shape[axis + 1 :])
        params["broadcast_dimensions"] = without(params["broadcast_dimensions"], axis)
    else:
        params["dimension_numbers"] = tuple(
            tuple(map(without, both, shared.others))
            for both in params["dimension_numbers"]
        )
    return params


def _apart(entries: Array, axis: int) -> Float[Array, "k ..."]:
    """For each loss its slice, with zeros for those of the others."""

    def one(n: Array, part: Array) -> Array:
        return jax.lax.dynamic_update_index_in_dim(
            jnp.zeros_like(entries), part, n, axis
        )

    return jax.vmap(one, (0, axis))(jnp.arange(entries.shape[axis]), entries)
