"""The user's function as a pure function of flat arrays.

`trace` runs the user's Python once, on abstract values, and keeps the resulting jaxpr.
All that the function needs is then in one list of arrays, its `inputs`: first what it
closed over, then its arguments. So a Jacobian can hold the function and the point where
it is taken, leave a `jit`, and still be evaluated.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import keystr
from jaxtyping import Array, Float

from jaxjd._sharding import (
    abstract_shard,
    automatically,
    explicit_spec,
    mesh_of,
    names_in,
    spec_of,
    spread,
    varying,
    without,
)
from jaxjd.engine import _pieces, _repeats


@dataclasses.dataclass(frozen=True, eq=False)
class LossFunction:
    """A traced function from `inputs` to losses, static under `jit`.

    `axes` is None for a function that returns all the losses. Otherwise the function is
    written for one example, and `axes` says, as `jax.vmap` does, along which axis of
    each input the examples lie (None: all examples share it).

    The first `num_pieces` outputs of `jaxpr` are the losses, in their order: those that
    are computed together are one piece. `loss_avals` are the losses as `fun` returns
    them. The other outputs are the auxiliary ones.

    Two traces are equal when they are traces of the same Python function on inputs of
    the same kinds: the rule by which `jax.jit` reuses a compilation, so, as there, the
    function must be pure. It lets a Jacobian be carried by `jax.lax.scan`.
    """

    fun: Callable
    jaxpr: Any
    axes: tuple[int | None, ...] | None
    loss_avals: tuple[jax.ShapeDtypeStruct, ...]
    num_pieces: int
    key: Any

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LossFunction):
            return NotImplemented
        return self.fun == other.fun and self.key == other.key

    def __hash__(self) -> int:
        return hash((self.fun, self.key))

    @property
    def loss_dtype(self) -> jnp.dtype:
        with jax.numpy_dtype_promotion("standard"):
            return jnp.result_type(*[aval.dtype for aval in self.loss_avals])

    @property
    def losses_per_call(self) -> int:
        """k: m, or the number of losses of one example."""
        return sum(math.prod(aval.shape) for aval in self.loss_avals)

    def outputs(self, inputs: Sequence[Array]) -> tuple[list[Array], list[Array]]:
        """The leaves of the losses and of the auxiliary output."""
        pieces, others = self.pieces_of_losses(inputs)
        return self.leaves(pieces), others

    def pieces_of_losses(
        self, inputs: Sequence[Array]
    ) -> tuple[list[Array], list[Array]]:
        """The losses in pieces, and the leaves of the auxiliary output."""
        outputs = _repeats.evaluate(self.jaxpr, inputs)
        return outputs[: self.num_pieces], outputs[self.num_pieces :]

    def leaves(self, pieces: Sequence[Array]) -> list[Array]:
        """The losses as `fun` returns them, from their pieces."""
        rest, leaves = list(pieces), []
        for aval in self.loss_avals:
            if jnp.shape(rest[0]) == aval.shape:
                leaves.append(jnp.asarray(rest.pop(0)))  # It may be a number.
                continue
            flat = [jnp.ravel(rest.pop(0))]
            while sum(part.size for part in flat) < math.prod(aval.shape):
                flat.append(jnp.ravel(rest.pop(0)))
            whole = flat[0] if len(flat) == 1 else jnp.concatenate(flat)
            leaves.append(whole.reshape(aval.shape))
        return leaves

    def all_outputs(self, inputs: Sequence[Array]) -> tuple[list[Array], list[Array]]:
        """The same for all examples, with a leading axis of them if there are any."""
        if self.axes is None:
            return self.outputs(inputs)
        return jax.vmap(self.outputs, (list(self.axes),))(list(inputs))

    def num_examples(self, inputs: Sequence[Array]) -> int | None:
        if self.axes is None:
            return None
        axes = zip(inputs, self.axes, strict=True)
        return next(x.shape[axis] for x, axis in axes if axis is not None)

    def num_losses(self, inputs: Sequence[Array]) -> int:
        """m, those of all examples together."""
        return (self.num_examples(inputs) or 1) * self.losses_per_call

    def losses(self, inputs: Sequence[Array]) -> Float[Array, " k"]:
        """All k losses of one call in one vector."""
        return jnp.concatenate(self.vectors(self.pieces_of_losses(inputs)[0]))

    def vectors(self, pieces: Sequence[Array]) -> list[Float[Array, " k"]]:
        """One vector for each piece."""
        return [ravel(jnp.asarray(piece, self.loss_dtype)) for piece in pieces]

    def pieces(self, argnums: Sequence[int]) -> _pieces.Pieces:
        """Which losses are computed together, and which parameters they depend on."""
        return _pieces.find(self.jaxpr, self.num_pieces, argnums)

    def all_losses(self, inputs: Sequence[Array]) -> Float[Array, " m"]:
        """All m losses, those of the same example side by side."""
        if self.axes is None:
            return self.losses(inputs)
        losses = jax.vmap(self.losses, (list(self.axes),))(list(inputs))
        spec = PartitionSpec(spec_of(jax.typeof(losses))[0])
        return automatically(jnp.ravel, losses, spec=spec)


def ravel(piece: Array) -> Array:
    if piece.ndim > 1:
        return automatically(jnp.ravel, piece)
    return jnp.ravel(piece)


def is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


def trace(
    fun: Callable[..., tuple[Any, Any]],
    args: Sequence[Any],
    in_axes: Sequence[Any] | None,
    *,
    identity: Callable,
) -> tuple[LossFunction, list[Array], tuple[int, ...], Any, Any]:
    """Trace `fun(*args) -> (losses, aux)`.

    What is not an array (a Python number, a string, a function) is passed through
    unchanged, as `jax.grad` does.

    **Arguments:**

    - `in_axes`: one prefix tree of axes per argument, or None.
    - `identity`: the user's own function, by which traces are recognised as equal.

    **Raises:** `ValueError` if the arrays are on several meshes, or `in_axes` does not
    fit them.

    **Returns:** the function; its inputs; for each leaf of `args` its position among
    the inputs, or -1 if it is not an array; the structures (pytrees of
    `jax.ShapeDtypeStruct`) of the losses and of the auxiliary output of one call.
    """
    leaves, structure = jax.tree.flatten(args)
    arrays = [is_array(leaf) for leaf in leaves]
    traced = [leaf for leaf, array in zip(leaves, arrays, strict=True) if array]
    check_one_mesh(traced)
    # Inside `shard_map`, J is that of the losses of one device.
    traced = varying(traced, traced)
    static = tuple(
        leaf for leaf, array in zip(leaves, arrays, strict=True) if not array
    )
    if in_axes is None:
        axes = None
        examples = traced
    else:
        axes = flatten_axes(in_axes, args)
        traced = apart_from_examples(traced, axes)
        examples = [
            of_one_example(leaf, axis) for leaf, axis in zip(traced, axes, strict=True)
        ]

    def flat(*traced):
        traced_iter, static_iter = iter(traced), iter(static)
        leaves = [next(traced_iter if array else static_iter) for array in arrays]
        return fun(*jax.tree.unflatten(structure, leaves))

    closed, (losses, aux) = jax.make_jaxpr(flat, return_shape=True)(*examples)
    loss_leaves = jax.tree.leaves(losses)
    jaxpr, consts, num_pieces = closed.jaxpr, list(closed.consts), len(loss_leaves)
    if axes is None:
        jaxpr, more, num_pieces = _pieces.split(jaxpr, num_pieces)
        consts = [*more, *consts]
    consts = [jnp.asarray(c) if not is_array(c) else c for c in consts]
    offset = len(consts)
    if axes is not None:
        axes = (None,) * offset + axes
    positions = np.where(arrays, np.cumsum(arrays) - 1 + offset, -1)
    avals = tuple(
        (v.aval.shape, v.aval.dtype, explicit_spec(v.aval)) for v in closed.jaxpr.invars
    )
    function = LossFunction(
        fun=identity,
        jaxpr=jaxpr,
        axes=axes,
        loss_avals=tuple(loss_leaves),
        num_pieces=num_pieces,
        key=(structure, static, tuple(arrays), axes, avals),
    )
    inputs = [jnp.asarray(x) for x in (*varying(consts, traced), *traced)]
    return function, inputs, tuple(int(p) for p in positions), losses, aux


def check_one_mesh(leaves: Sequence[Any]) -> None:
    """**Raises:** `ValueError` if arrays are on several meshes."""
    meshes = {mesh.shape_tuple: mesh for mesh in map(mesh_of, leaves) if mesh}
    if len(meshes) > 1:
        described = " and ".join(str(dict(shape)) for shape in meshes)
        raise ValueError(
            "All arguments, parameters and examples alike, must be on one mesh. Got "
            f"arrays on {described}."
        )


def of_one_example(leaf: Any, axis: int | None) -> jax.ShapeDtypeStruct:
    """The type that a function of one example sees of an argument."""
    shape, aval = leaf.shape, jax.typeof(leaf)
    spec = explicit_spec(aval)
    if axis is not None:
        shape = tuple(np.delete(shape, axis))
    if spec is None:
        return abstract_shard(shape, aval)
    if axis is not None:
        spec = PartitionSpec(*np.delete(np.array(spec, object), axis))
    sharding = NamedSharding(aval.sharding.mesh, spec)
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)


def apart_from_examples(leaves: Sequence[Any], axes: Sequence[int | None]) -> list[Any]:
    """Gather what all examples share along the axes of the mesh that hold examples.

    With Explicit axes no array can be spread twice along an axis of the mesh, as the
    gradients of examples on different devices would be.
    """
    specs = [explicit_spec(jax.typeof(leaf)) for leaf in leaves]
    taken = {
        name
        for spec, axis in zip(specs, axes, strict=True)
        if spec is not None and axis is not None
        for name in names_in(spec[axis])
    }
    gathered = []
    for leaf, spec, axis in zip(leaves, specs, axes, strict=True):
        if (
            spec is not None
            and axis is None
            and taken.intersection(
                *[{name for entry in spec for name in names_in(entry)}]
            )
        ):
            leaf = spread(leaf, without(spec, taken), jax.typeof(leaf).sharding.mesh)
        gathered.append(leaf)
    return gathered


def flatten_axes(in_axes: Sequence[Any], args: Sequence[Any]) -> tuple[int | None, ...]:
    """One axis per array in `args`, from one prefix tree of axes per argument.

    **Raises:** `ValueError` if `in_axes` does not fit the arguments, or the arguments
    do not agree on the number of examples.
    """
    axes: list[int | None] = []
    sizes: dict[str, int] = {}
    # Arguments may hold None too, where a layer has no bias. That is not a leaf.
    shared = object()

    def visit(position, axis, path, leaf):
        name = f"argument {position}{keystr(path)}"
        if axis is not None:
            if isinstance(axis, bool) or not hasattr(axis, "__index__"):
                raise TypeError(
                    f"`in_axes` must hold integers and None. Got {axis!r} for {name}."
                )
            if not is_array(leaf) or not -leaf.ndim <= axis < leaf.ndim:
                got = f"shape {leaf.shape}" if is_array(leaf) else repr(leaf)
                raise ValueError(
                    f"`in_axes` puts the examples of {name} on axis {axis}, but it has "
                    f"no such axis. Got {got}."
                )
            sizes[name] = leaf.shape[axis]
        if is_array(leaf):
            axes.append(axis)

    for position, (prefix, arg) in enumerate(zip(in_axes, args, strict=True)):
        leaves = jax.tree_util.tree_leaves_with_path(arg)
        marked = jax.tree.map(
            lambda axis: shared if axis is None else axis,
            prefix,
            is_leaf=lambda x: x is None,
        )
        try:
            flat = jax.tree.leaves(jax.tree.broadcast(marked, arg))
        except ValueError as error:
            raise ValueError(
                f"`in_axes` must be a prefix of the arguments. For argument {position} "
                f"got {prefix!r}, the argument is {jax.tree.structure(arg)}."
            ) from error
        for axis, (path, leaf) in zip(flat, leaves, strict=True):
            visit(position, None if axis is shared else axis, path, leaf)
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"All arguments must hold the same number of examples. Got {sizes}."
        )
    return tuple(axes)
