"""Where arrays are, as their types say, and how to say it for results.

JAX knows three kinds of axes of a mesh. With `Auto` axes, XLA decides how the results
of operations are spread over the devices, and the type of an array says only which mesh
that is. With `Explicit` axes, the type says how the array is spread, and an operation
raises an error if its operands do not settle that for its result. Inside `shard_map`
axes are `Manual`: arrays are the shards of one device, and nothing here touches them.

The rule is: the rows of examples are where their examples are; the Gramian and the
weights are on every device; an update is spread as its parameter is.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array

P = ParamSpec("P")
R = TypeVar("R")

# From so many rows on, sums of products are spread by their rows until they are whole.
# This takes less memory and moves less, but in three messages instead of one, and the
# time for a few megabytes is that of the messages.
LARGE = 1024


def is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array)


def mesh_of(*trees: Any) -> AbstractMesh | None:
    """The mesh that arrays are spread over.

    None if that is a single device, or if the arrays are shards inside `shard_map`. If
    Explicit axes are Auto for some of the arrays, it is the mesh with Explicit axes.
    """
    found = None
    for leaf in jax.tree.leaves(trees):
        mesh = jax.typeof(leaf).sharding.mesh if is_array(leaf) else None
        if mesh is None or mesh.empty:
            continue
        if AxisType.Manual in mesh.axis_types:
            return None
        explicit = AxisType.Explicit in mesh.axis_types
        if explicit or (found is None and math.prod(mesh.axis_sizes) > 1):
            found = mesh
    return found


def explicit_spec(aval: Any) -> PartitionSpec | None:
    """How an array is spread, or None if its type does not say it."""
    sharding: Any = getattr(aval, "sharding", None)
    mesh = getattr(sharding, "mesh", None)
    if mesh is None or mesh.empty or AxisType.Explicit not in mesh.axis_types:
        return None
    return PartitionSpec(*sharding.spec, *[None] * (aval.ndim - len(sharding.spec)))


def spread(array: Array, spec: PartitionSpec, mesh: AbstractMesh | None) -> Array:
    """The array, spread over a mesh in this way."""
    if mesh is None:
        return array
    sharding, current = NamedSharding(mesh, spec), jax.typeof(array).sharding.mesh
    if AxisType.Explicit in (*mesh.axis_types, *current.axis_types):
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

        def of_arrays(arrays: list[Array]) -> Any:
            for n, array in zip(places, arrays, strict=True):
                leaves[n] = array
            args, kwargs = jax.tree.unflatten(structure, leaves)
            whole: Callable[..., Any] = function
            return whole(*args, **kwargs)

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


def automatically(function: Callable[..., R], *operands: Any, spec: Any = None) -> R:
    """`function(*operands)`, where XLA spreads values even along Explicit axes.

    A contraction merges axes of any kind, and leaves to XLA how that is done.

    **Arguments:**

    - `spec`: how the results are spread, a prefix of their tree; by default they are
      whole on every device. For Auto axes it is not needed, and not looked at.
    """
    mesh = mesh_of(operands)
    if mesh is None or AxisType.Explicit not in mesh.axis_types:
        with in_mesh_of(*operands):
            return function(*operands)
    spec = PartitionSpec() if spec is None else spec
    shardings = jax.tree.map(
        lambda leaf: NamedSharding(mesh, leaf),
        spec,
        is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
    )
    spread_by_xla: Any = jax.sharding.auto_axes(function, out_sharding=shardings)
    return spread_by_xla(*operands)


def in_mesh_of(*operands: Any) -> contextlib.AbstractContextManager:
    """The context for operations on values from where Explicit axes were Auto.

    They come from a function under `jax.sharding.auto_axes`, as a lookup with
    `out_sharding` is. With the Explicit mesh as context, JAX refuses them.
    """
    mesh, context = mesh_of(operands), jax.sharding.get_abstract_mesh()
    if mesh in (None, context) or AxisType.Explicit not in context.axis_types:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh)


def spec_of(aval: Any) -> PartitionSpec:
    """How an array is spread, as its type says it: not at all, for Auto axes."""
    return explicit_spec(aval) or PartitionSpec(*[None] * aval.ndim)


def zeros_like(aval: Any, leading: tuple[int, ...] = ()) -> Array:
    """Zeros of an abstract array's shape behind other axes, spread as it is."""
    wanted = abstract((*leading, *aval.shape), aval)
    zeros = jnp.zeros(wanted.shape, wanted.dtype)
    if wanted.sharding is None or jax.typeof(zeros).sharding == wanted.sharding:
        return zeros
    return jax.sharding.reshard(zeros, wanted.sharding)


def abstract(shape: tuple[int, ...], like: Any) -> jax.ShapeDtypeStruct:
    """The type of an array with new leading axes, otherwise like another one."""
    mesh = getattr(getattr(like, "sharding", None), "mesh", None)
    if mesh is None or mesh.empty or AxisType.Manual in mesh.axis_types:
        return abstract_shard(shape, like)
    spec = PartitionSpec(*[None] * (len(shape) - like.ndim), *spec_of(like))
    sharding = NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(shape, like.dtype, sharding=sharding)


def abstract_shard(shape: tuple[int, ...], like: Any) -> jax.ShapeDtypeStruct:
    """A type that says nothing of a mesh, but what differs between devices."""
    for name in ("manual_axis_type", "vma"):  # The second is of older versions.
        if getattr(like, name, None) and like.sharding is not None:
            spec = PartitionSpec(*[None] * len(shape))
            return jax.ShapeDtypeStruct(
                shape,
                like.dtype,
                sharding=NamedSharding(like.sharding.mesh, spec),
                **{name: getattr(like, name)},
            )
    return jax.ShapeDtypeStruct(shape, like.dtype)


def names_in(entry: Any) -> tuple[str, ...]:
    """The axes of the mesh that one entry of a `PartitionSpec` names."""
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def sizes_of(entry: Any, mesh: AbstractMesh) -> int:
    """Over how many devices one entry of a `PartitionSpec` spreads an axis."""
    return math.prod(mesh.shape[name] for name in names_in(entry))


def entry_for(entry: Any, length: int, mesh: AbstractMesh) -> Any:
    """An entry of a `PartitionSpec` for an axis of a length that devices may divide."""
    return None if length % sizes_of(entry, mesh) else entry


def without(spec: PartitionSpec, names: set[str]) -> PartitionSpec:
    """A spec that does not spread anything along some axes of the mesh."""
    kept = [tuple(n for n in names_in(entry) if n not in names) for entry in spec]
    return PartitionSpec(*[entry or None for entry in kept])


def spec_by_rows(num_rows: int, mesh: AbstractMesh) -> PartitionSpec:
    """Spread a large matrix by its rows over all devices, if these divide their number.

    Any other matrix is not spread.
    """
    divided = num_rows % math.prod(mesh.axis_sizes) == 0
    large = divided and num_rows >= LARGE
    return PartitionSpec(mesh.axis_names) if large else PartitionSpec()


def by_rows(matrix: Array) -> Array:
    """A matrix, spread as `spec_by_rows` says, or as it was if that is not at all."""
    mesh = mesh_of(matrix)
    spec = PartitionSpec() if mesh is None else spec_by_rows(len(matrix), mesh)
    return matrix if spec == PartitionSpec() else spread(matrix, spec, mesh)


def sum_over_entries(function: Callable[..., Array], *rows: Sequence[Array]) -> Array:
    """`function(*rows)`, by devices that each have some entries of all the rows.

    On a mesh the result is spread by its leading axis, as `spec_by_rows` says.

    **Arguments:**

    - `function`: from lists of rows to an array [m, ...]. That of all entries must be
      the sum of those of their parts, and zero if the first list is.
    - `rows`: lists of rows of the same parameters, [m, *shape] per parameter.
    """
    mesh = mesh_of(rows)
    if mesh is None:
        return function(*rows)
    specs = [spec_of_entries(leaf.shape[1:], mesh) for leaf in rows[0]]
    spec_of_sum = spec_by_rows(len(rows[0][0]), mesh)

    def counted_once(leaf: Array, spec: PartitionSpec) -> Array:
        """Zeros on all but one of the devices that have the same entries."""
        used = {name for entry in spec for name in names_in(entry)}
        for name in mesh.axis_names:
            if name not in used:
                leaf = jnp.where(jax.lax.axis_index(name) == 0, leaf, 0)
        return leaf

    def of_shard(first: Sequence[Array], *others: Sequence[Array]) -> Array:
        first = [counted_once(*pair) for pair in zip(first, specs, strict=True)]
        total = function(first, *others)
        if spec_of_sum == PartitionSpec():
            return jax.lax.psum(total, mesh.axis_names)
        return jax.lax.psum_scatter(total, mesh.axis_names, tiled=True)

    return jax.shard_map(
        of_shard,
        mesh=mesh,
        in_specs=(specs,) * len(rows),
        out_specs=spec_of_sum,
        check_vma=False,
    )(*[[spread(x, s, mesh) for x, s in zip(of, specs, strict=True)] for of in rows])


def as_examples(rows: Array) -> Array:
    """Rows of examples [m, ...], each on the device that formed it.

    Explicit axes say which that is. With Auto axes they are spread over as many devices
    as divide m. Unless this is said, XLA rather moves the activations to where the
    entries of the rows are needed next.
    """
    mesh = mesh_of(rows)
    if mesh is None or AxisType.Explicit in mesh.axis_types:
        return rows
    names, devices = [], 1
    for name, size in zip(mesh.axis_names, mesh.axis_sizes, strict=True):
        if len(rows) % (devices * size) == 0:
            names.append(name)
            devices *= size
    return spread(rows, PartitionSpec(tuple(names)), mesh) if names else rows


def flat_rows(rows: Array) -> Array:
    """Rows of examples [m, ...] as [m, n], with zeros until devices divide n.

    Unchanged if their entries are spread: a reshape would gather them.
    """
    mesh, spec = mesh_of(rows), spec_of(jax.typeof(rows))
    if mesh is None or any(entry is not None for entry in spec[1:]):
        return rows
    devices = math.prod(mesh.axis_sizes)

    def flat(rows: Array) -> Array:
        rows = rows.reshape(len(rows), -1)
        few = rows.shape[1] < devices
        missing = 0 if few else -rows.shape[1] % devices
        return jnp.pad(rows, ((0, 0), (0, missing))) if missing else rows

    flattened = automatically(flat, rows, spec=PartitionSpec(spec[0], None))
    # Else XLA moves the rows before they are flat, and then may have to gather them.
    return as_examples(flattened)


def spec_of_entries(shape: tuple[int, ...], mesh: AbstractMesh) -> PartitionSpec:
    """Spread rows [m, *shape] by their entries, over as many devices as divide them."""
    parts: list[tuple[str, ...]] = [()] * len(shape)
    left = list(shape)
    for name, size in zip(mesh.axis_names, mesh.axis_sizes, strict=True):
        divided = [n for n in range(len(shape)) if left[n] % size == 0]
        if divided:
            axis = max(divided, key=lambda n: (left[n], n))
            parts[axis] += (name,)
            left[axis] //= size
    return PartitionSpec(None, *[part or None for part in parts])


def varying(start: R, *like: Any) -> R:
    """The start of a loop, of the type that the loop gives it inside `shard_map`.

    There JAX tells values that differ between devices from those that do not. What a
    loop makes from arrays that differ does so too, and must do so from the start on.
    """
    arrays = [x for x in jax.tree.leaves(like) if is_array(x) and x.size]
    meshes = [jax.typeof(x).sharding.mesh for x in arrays]
    if not any(AxisType.Manual in mesh.axis_types for mesh in meshes):
        return start
    # Never true, which XLA knows, but JAX does not.
    never = [jnp.ravel(x)[0] != jnp.ravel(x)[0] for x in arrays]
    never = functools.reduce(jnp.logical_or, never) & False
    return jax.tree.map(lambda x: jnp.where(never, x, x), start)
