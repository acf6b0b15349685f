"""Split losses into pieces that are computed apart, and pull each piece back by itself.

A function that returns all the losses often computes them one by one and stacks them at
the end: the tasks of a network, the terms of a physics-informed one. A one-hot
cotangent of the stack would be pulled back through everything. So the function is
evaluated on values that remember how they were put together: a concatenation is a list
of its parts until something needs it whole. Each part that reaches the output is a
piece: one loss, or several that come out of one vectorised computation.

The function is linearised once, and its linear part is transposed once for each piece.
JAX then visits only the equations that this piece depends on.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jaxtyping import Array, Float

from jaxjd._sharding import abstract, mesh_of, spread_like, varying
from jaxjd.engine import _jaxpr, _repeats, _vectorised

# They work entry by entry, so they apply to each part of a concatenation by itself.
ELEMENTWISE = {
    "abs",
    "add",
    "convert_element_type",
    "copy",
    "div",
    "exp",
    "expm1",
    "integer_pow",
    "log",
    "log1p",
    "logistic",
    "max",
    "min",
    "mul",
    "neg",
    "pow",
    "rsqrt",
    "select_n",
    "sqrt",
    "square",
    "sub",
    "tanh",
}
# They put arrays together, along the axis that this parameter of theirs gives.
STACKS = {"concatenate": "dimension", "stack": "axis"}
# They keep the order of the entries, as long as they keep their number.
RESHAPES = {"broadcast_in_dim", "expand_dims", "reshape", "squeeze"}

# What a CPU is slow at in a loop: XLA has fast convolutions only outside of loops, and
# a loop in a loop has little to do in each iteration.
BETTER_TOGETHER = {"conv_general_dilated", "scan", "while"}


class Parts(NamedTuple):
    """A value of a shape, whose entries are those of its parts in row-major order."""

    arrays: tuple[Array, ...]
    shape: tuple[int, ...]


def whole(value: Any) -> Any:
    if not isinstance(value, Parts):
        return value
    flat = [jnp.ravel(array) for array in value.arrays]
    return jnp.concatenate(flat).reshape(value.shape)


def parts_of(value: Any) -> tuple[Array, ...]:
    return value.arrays if isinstance(value, Parts) else (value,)


def evaluate(jaxpr: Any, operands: Sequence[Any]) -> list[Any]:
    """Evaluate a jaxpr on values for its constants and arguments, which may be parts.

    **Returns:** arrays and parts.
    """
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), operands, strict=True))

    def read(variable: Any) -> Any:
        return variable.val if _jaxpr.is_literal(variable) else values[variable]

    for eqn in jaxpr.eqns:
        results = _equation(jaxpr, eqn, [read(v) for v in eqn.invars])
        values.update(zip(eqn.outvars, results, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _equation(jaxpr: Any, eqn: Any, operands: list[Any]) -> list[Any]:
    name = eqn.primitive.name
    if name in _jaxpr.CALLS:
        called, consts = _jaxpr.called(eqn)
        return evaluate(called, [*consts, *operands])
    if name in STACKS and _is_row_major(eqn, STACKS[name]):
        arrays = tuple(part for value in operands for part in parts_of(value))
        return [Parts(arrays, eqn.outvars[0].aval.shape)]
    if any(isinstance(value, Parts) for value in operands):
        if name in RESHAPES and _keeps_number(eqn):
            return [Parts(operands[0].arrays, eqn.outvars[0].aval.shape)]
        if _is_entrywise(eqn, operands):
            return [_elementwise(eqn, operands)]
        if name == "slice" and _is_range(eqn):
            return [_range(eqn, operands[0])]
    return list(_jaxpr.evaluate(jaxpr, eqn, [whole(value) for value in operands]))


def _is_row_major(eqn: Any, axis: str) -> bool:
    """Whether the entries of the operands follow one another in the result."""
    before = eqn.outvars[0].aval.shape[: eqn.params[axis]]
    return all(length == 1 for length in before)


def _keeps_number(eqn: Any) -> bool:
    return _jaxpr.size(eqn.outvars[0].aval) == _jaxpr.size(eqn.invars[0].aval)


def _is_range(eqn: Any) -> bool:
    """Whether a slice takes entries that follow one another: `losses[0]`."""
    taken, shape = eqn.outvars[0].aval.shape, eqn.invars[0].aval.shape
    # Behind the first axis that keeps several entries, all must be kept.
    axes = [n for n, length in enumerate(taken) if length > 1]
    behind = slice(axes[0] + 1 if axes else len(shape), None)
    strides = eqn.params["strides"] or (1,) * len(shape)
    return (
        all(length > 0 for length in taken)
        and all(stride == 1 for stride in strides)
        and taken[behind] == shape[behind]
    )


def _range(eqn: Any, value: Parts) -> Parts:
    shape = eqn.outvars[0].aval.shape
    first = int(np.ravel_multi_index(eqn.params["start_indices"], value.shape))
    last, start = first + math.prod(shape), 0
    arrays = []
    for array in value.arrays:
        kept = slice(max(first - start, 0), min(last - start, array.size))
        if kept.start < kept.stop:
            everything = kept == slice(0, array.size)
            arrays.append(array if everything else jnp.ravel(array)[kept])
        start += array.size
    return Parts(tuple(arrays), shape)


def _is_entrywise(eqn: Any, operands: Sequence[Any]) -> bool:
    """Whether it is elementwise, and broadcasts nothing but scalars that are whole.

    JAX also broadcasts axes of length 1.
    """
    shape = eqn.outvars[0].aval.shape
    return eqn.primitive.name in ELEMENTWISE and all(
        variable.aval.shape == shape
        or (variable.aval.shape == () and not isinstance(value, Parts))
        for variable, value in zip(eqn.invars, operands, strict=True)
    )


def _elementwise(eqn: Any, operands: list[Any]) -> Parts:
    split = next(value for value in operands if isinstance(value, Parts))
    sizes = [array.size for array in split.arrays]
    starts = [sum(sizes[:n]) for n in range(len(sizes))]

    def pieces(value: Any) -> list[Any]:
        if isinstance(value, Parts) and [x.size for x in value.arrays] == sizes:
            return [jnp.ravel(array) for array in value.arrays]
        value = jnp.asarray(whole(value))
        if not value.shape:
            return [value] * len(sizes)
        flat = value.ravel()
        ends = zip(starts, sizes, strict=True)
        return [flat[start : start + size] for start, size in ends]

    columns = zip(*map(pieces, operands), strict=True)
    arrays = tuple(eqn.primitive.bind(*column, **eqn.params) for column in columns)
    return Parts(arrays, split.shape)


def split(jaxpr: Any, num_losses: int) -> tuple[Any, list[Array], int]:
    """A jaxpr whose losses, its first outputs, are returned in pieces.

    **Returns:** the jaxpr, whose arguments are the constants of the given one and then
    its arguments; its own constants; and the number of pieces.
    """
    losses = jaxpr.outvars[:num_losses]
    makers = {v: eqn.primitive.name for eqn in jaxpr.eqns for v in eqn.outvars}
    names = {makers.get(v) for v in losses if not _jaxpr.is_literal(v)}
    followed = _jaxpr.CALLS | ELEMENTWISE | RESHAPES | STACKS.keys() | {"slice"}
    if not names & followed:
        inputs = [*jaxpr.constvars, *jaxpr.invars]
        return jaxpr.replace(constvars=[], invars=inputs), [], num_losses
    consts = [abstract(v.aval.shape, v.aval) for v in jaxpr.constvars]
    inputs = [abstract(v.aval.shape, v.aval) for v in jaxpr.invars]
    pieces = []

    def in_pieces(consts: list[Any], inputs: list[Any]) -> list[Any]:
        outputs = evaluate(jaxpr, [*consts, *inputs])
        pieces[:] = [part for x in outputs[:num_losses] for part in parts_of(x)]
        return [*pieces, *map(whole, outputs[num_losses:])]

    closed = jax.make_jaxpr(in_pieces)(consts, inputs)
    return closed.jaxpr, closed.consts, len(pieces)


class Piece(NamedTuple):
    """`num_losses` losses from `first` on, which depend on these parameters at most.

    The parameters are named by their places among the differentiated ones.
    """

    first: int
    num_losses: int
    parameters: tuple[int, ...]

    @property
    def places(self) -> tuple[int, ...]:
        return tuple(range(self.first, self.first + self.num_losses))


class Pieces(NamedTuple):
    """The pieces of all losses, in their order.

    - `row_size`: how many numbers their rows hold, without those known to be zero.
    - `activations`: how many numbers the function computes on its way to the losses.
    """

    pieces: list[Piece]
    row_size: int
    activations: int

    def losses_of(self, parameter: int) -> int:
        """How many losses depend on the parameter at this place, at most."""
        return sum(p.num_losses for p in self.pieces if parameter in p.parameters)


def find(jaxpr: Any, num_pieces: int, argnums: Sequence[int]) -> Pieces:
    """The first outputs of a jaxpr, and which of its inputs have gradients in each."""
    inputs = (*jaxpr.constvars, *jaxpr.invars)
    sources = {variable: {n} for n, variable in enumerate(inputs)}

    def of(variables: Sequence[Any]) -> set[int]:
        found = [sources.get(v, set()) for v in variables if not _jaxpr.is_literal(v)]
        return set[int]().union(*found)

    for eqn in jaxpr.eqns:
        everything = of(eqn.invars)
        sources.update(
            (variable, everything)
            for variable in eqn.outvars
            if _jaxpr.is_differentiable(variable.aval)
        )
    pieces, first = [], 0
    for variable in jaxpr.outvars[:num_pieces]:
        reached = of([variable])
        parameters = tuple(n for n, i in enumerate(argnums) if i in reached)
        size = _jaxpr.size(variable.aval)
        pieces.append(Piece(first, size, parameters))
        first += size
    sizes = [_jaxpr.size(inputs[i].aval) for i in argnums]
    return Pieces(
        pieces,
        sum(p.num_losses * sizes[n] for p in pieces for n in p.parameters),
        sum(_jaxpr.size(v.aval) for eqn in jaxpr.eqns for v in eqn.outvars),
    )


class Linear(NamedTuple):
    """The linear part of a function at a point, written down: tangents to tangents.

    - `jaxpr`, `consts`: it has one argument for each array of `point`, and one output
      for each of `values`.
    - `point`, `values`: where the function was linearised, and what it is there.
    """

    jaxpr: Any
    consts: Sequence[Array]
    point: Sequence[Array]
    values: Sequence[Array]

    def __call__(self, *tangents: Array) -> list[Array]:
        return jaxpr_as_fun(ClosedJaxpr(self.jaxpr, list(self.consts)))(*tangents)

    def transpose(self, cotangents: Sequence[Array]) -> list[Array]:
        """From those of all values to those of the point: one backward pass."""
        pullback = jax.linear_transpose(self, *self.point)
        typed = [
            like(cotangent, value)
            for cotangent, value in zip(cotangents, self.values, strict=True)
        ]
        return list(pullback(typed))


def like(cotangent: Array, value: Array) -> Array:
    """The cotangent of a value, in its dtype and spread over devices as it is."""
    cotangent = varying(cotangent.astype(value.dtype), value)
    return spread_like(cotangent, jax.typeof(value))


def linearised(
    losses: Callable[[Any], tuple[list[Float[Array, " k"]], Any]], point: Any
) -> tuple[Linear, Any]:
    """The linear part of a function, and what else the function returns.

    **Arguments:**

    - `losses`: from a pytree to one vector for each piece, and auxiliary output.
    """
    values, linear, aux = jax.linearize(losses, point, has_aux=True)
    leaves, structure = jax.tree.flatten(point)
    closed = jax.make_jaxpr(lambda *t: linear(jax.tree.unflatten(structure, t)))(
        *leaves
    )
    return Linear(closed.jaxpr, closed.consts, leaves, values), aux


def rows(linear: Linear) -> list[list[Float[Array, "k ..."] | None]]:
    """The rows of each piece, from a linear part whose outputs are vectors.

    **Returns:** for each piece of k losses a list of its rows, one for each array of
    the point, None where the piece does not depend on it.
    """
    parts = _parts_by_reader(linear.jaxpr)
    return [_rows_of_piece(linear, parts, n) for n in range(len(linear.values))]


def _parts_by_reader(jaxpr: Any) -> list[tuple[tuple[int, ...], _repeats.Part]]:
    """The parts of a jaxpr, and which of its outputs each of them is needed for.

    What several outputs need, as the trunk of a network, is under `jax.jit`: so it is
    transposed and lowered once, and called for each of these outputs.
    """
    readers: dict[int, tuple[int, ...]] = {}
    for n, variable in enumerate(jaxpr.outvars):
        for eqn in _jaxpr.needed(jaxpr, [variable])[0].eqns:
            readers[id(eqn)] = (*readers.get(id(eqn), ()), n)
    labels = [readers.get(id(eqn), ()) for eqn in jaxpr.eqns]
    return [
        (of, part._replace(is_called=len(of) > 1 and part.is_worth_a_call))
        for of, part in _repeats.runs(jaxpr, labels)
    ]


def _rows_of_piece(
    linear: Linear, parts: Sequence[tuple[tuple[int, ...], _repeats.Part]], n: int
) -> list[Float[Array, "k ..."] | None]:
    jaxpr, value = linear.jaxpr, linear.values[n]
    arguments, variable = jaxpr.invars, jaxpr.outvars[n]
    needed, used = _jaxpr.needed(jaxpr, [variable])
    # On a mesh, slices of an axis that is spread over devices would have to move.
    if value.size > 1 and jax.typeof(value).sharding.mesh.empty:
        slices = _vectorised.find(needed)
        if slices is not None:
            return _vectorised.rows(needed, linear.consts, slices, of_each)
    reached = [i for i, v in enumerate(arguments) if v in used]
    found: list[Any] = [None] * len(arguments)
    if reached:

        def tangent_to_piece(some: list[Array]) -> Array:
            values = dict(zip(jaxpr.constvars, linear.consts, strict=True))
            values |= zip([arguments[i] for i in reached], some, strict=True)

            def read(v: Any) -> Array:
                # A part may take more, for results that this piece does not need.
                return (
                    values[v] if v in values else jnp.zeros(v.aval.shape, v.aval.dtype)
                )

            for readers, part in parts:
                if n in readers:
                    results = part(*map(read, part.inputs))
                    values.update(zip(part.outputs, results, strict=True))
            return values[variable]

        point = [linear.point[i] for i in reached]
        pullback = jax.linear_transpose(tangent_to_piece, point)
        if value.size == 1:
            (row,) = pullback(jnp.ones_like(value))
            rows = [leaf[None] for leaf in row]
        else:
            rows = of_each(lambda x: pullback(x)[0], one_hots(value))
        for i, leaf in zip(reached, rows, strict=True):
            found[i] = leaf
    return found


def of_each(
    pullback: Callable[[Any], list[Array]], cotangents: Any
) -> list[Float[Array, "r ..."]]:
    """`jax.vmap(pullback)(cotangents)`, on a CPU one after another if that is faster.

    Nearly always it is: what one cotangent becomes stays in the cache, and each row is
    written where it belongs. Together, rows come out of a product with their axis in
    the middle, and XLA moves all of them. A GPU would have too little to do at a time.
    """
    first = jax.tree.map(lambda x: x[0], cotangents)
    closed = jax.make_jaxpr(pullback)(first)

    def one(cotangents: Any) -> list[Array]:
        return jaxpr_as_fun(closed)(*jax.tree.leaves(cotangents))

    together = jax.vmap(one)
    slow = BETTER_TOGETHER & _jaxpr.primitives(closed.jaxpr)
    if slow or mesh_of(cotangents) is not None:
        return list(together(cotangents))
    return jax.lax.platform_dependent(
        cotangents, cpu=lambda x: list(jax.lax.map(one, x)), default=together
    )


def one_hots(vector: Float[Array, " k"]) -> Float[Array, "k k"]:
    """The unit vectors, each spread over devices as the given vector is."""
    eye = varying(jnp.eye(vector.size, dtype=vector.dtype), vector)
    return spread_like(eye, abstract(eye.shape, jax.typeof(vector)))
