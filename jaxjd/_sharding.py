"""Where arrays are, as their types say, and how to say it for results.

JAX knows three kinds of axes of a mesh. With `Auto` axes, XLA decides how the results
of operations are spread over the devices, and the type of an array says only which mesh
that is. With `Explicit` axes, the type says how the array is spread, and an operation
raises an error if its operands do not settle that for its result. Inside `shard_map`
axes are `Manual`: arrays are the shards of one device, and nothing here touches them.

The rule is: the rows of examples are where their examples are; the Gramian and the
weights are on every device; an update is spread as its parameter is.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array

P = ParamSpec("P")
R = TypeVar("R")


def is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array)


def mesh_of(*trees: Any) -> AbstractMesh | None:
    """The mesh that arrays are spread over.

    None if that is a single device, or if the arrays are shards inside `shard_map`.
    """
    for leaf in jax.tree.leaves(trees):
        if not is_array(leaf):
            continue
        mesh = jax.typeof(leaf).sharding.mesh
        if not mesh.empty:
            alone = math.prod(mesh.axis_sizes) == 1
            return None if alone or AxisType.Manual in mesh.axis_types else mesh
    return None


def explicit_spec(aval: Any) -> PartitionSpec | None:
    """How an array is spread, or None if its type does not say it."""
    sharding = getattr(aval, "sharding", None)
    mesh = getattr(sharding, "mesh", None)
    if mesh is None or mesh.empty or AxisType.Explicit not in mesh.axis_types:
        return None
    return PartitionSpec(*sharding.spec, *[None] * (aval.ndim - len(sharding.spec)))


def spread(array: Array, spec: PartitionSpec, mesh: AbstractMesh | None) -> Array:
    """The array, spread over a mesh in this way."""
    if mesh is None:
        return array
    sharding = NamedSharding(mesh, spec)
    if AxisType.Explicit in mesh.axis_types:
        return jax.sharding.reshard(array, sharding)
    return jax.lax.with_sharding_constraint(array, sharding)


def replicated(tree: Any) -> Any:
    """Every array of a tree, whole on every device."""
    mesh = mesh_of(tree)
    if mesh is None:
        return tree
    return jax.tree.map(
        lambda x: spread(x, PartitionSpec(), mesh) if is_array(x) else x, tree
    )


def spread_like(array: Array, other: Any) -> Array:
    """The array, spread as another one, or as an abstract one, if that is Explicit."""
    spec = explicit_spec(other)
    if spec is None or spec == explicit_spec(jax.typeof(array)):
        return array
    return jax.sharding.reshard(array, NamedSharding(other.sharding.mesh, spec))


def on_every_device(function: Callable[P, R]) -> Callable[P, R]:
    """Let each device compute the whole result by itself, from whole operands.

    For searches: their loops then contain no communication. They take hundreds of
    iterations, and one is faster than a message.
    """

    @functools.wraps(function)
    def on_every(*args: P.args, **kwargs: P.kwargs) -> R:
        mesh = mesh_of(args, kwargs)
        if mesh is None:
            return function(*args, **kwargs)
        leaves, structure = jax.tree.flatten((args, kwargs))
        places = [n for n, leaf in enumerate(leaves) if is_array(leaf)]

        def of_arrays(arrays: list[Array]) -> R:
            for n, array in zip(places, arrays, strict=True):
                leaves[n] = array
            args, kwargs = jax.tree.unflatten(structure, leaves)
            return function(*args, **kwargs)

        return jax.shard_map(
            of_arrays,
            mesh=mesh,
            in_specs=PartitionSpec(),
            out_specs=PartitionSpec(),
            check_vma=False,
        )([spread(leaves[n], PartitionSpec(), mesh) for n in places])

    return on_every


def rows_apart(
    function: Callable[[Any, Any], Any], rows: Any, shared: Any, num_rows: int
) -> Any:
    """`function(rows, shared)`, where each device computes its share of the rows.

    No device waits for another until all are done.

    **Arguments:**

    - `rows`: arrays with a leading axis of `num_rows`.
    - `shared`: arrays that every device has a copy of.

    **Returns:** what the function returns: arrays with a leading axis of rows, and
    scalars, of which the largest of all devices is taken.
    """
    mesh = mesh_of(rows, shared)
    if mesh is None:
        return function(rows, shared)
    devices = math.prod(mesh.axis_sizes)
    if num_rows < devices:
        return on_every_device(function)(rows, shared)
    missing = -num_rows % devices
    if missing:
        rows = jax.tree.map(
            lambda x: jnp.concatenate([x, jnp.zeros_like(x[:missing])]),
            replicated(rows),
        )
    by_rows, whole = PartitionSpec(mesh.axis_names), PartitionSpec()

    def of_shard(rows: Any, shared: Any) -> Any:
        return jax.tree.map(
            lambda x: x if x.ndim else jax.lax.pmax(x, mesh.axis_names),
            function(rows, shared),
        )

    results = jax.eval_shape(function, rows, shared)
    found = jax.shard_map(
        of_shard,
        mesh=mesh,
        in_specs=(by_rows, whole),
        out_specs=jax.tree.map(lambda x: by_rows if x.ndim else whole, results),
        check_vma=False,
    )(
        jax.tree.map(lambda x: spread(x, by_rows, mesh), rows),
        jax.tree.map(lambda x: spread(x, whole, mesh), shared),
    )
    if missing:
        found = jax.tree.map(lambda x: x[:num_rows] if x.ndim else x, replicated(found))
    return found
