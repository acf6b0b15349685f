"""Products of rows of Jacobians with each other, and combinations of them.

Rows come as one array per parameter, [rows, *shape of the parameter].
"""

import functools
from collections.abc import Sequence
from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxjd._numerics import accumulation_dtype, symmetric
from jaxjd._sharding import (
    automatically,
    mesh_of,
    replicated,
    spec_by_rows,
    spec_of,
    spread,
    sum_over_entries,
)

# As `jax.lax.dot_general` takes them: the contracted axes, and the batch axes.
Axes = tuple[Sequence[int], Sequence[int]]

FEW_ROWS = 16


def contract(x: Array, y: Array, contracted: Axes, batch: Axes = ((), ())) -> Array:
    """`jax.lax.dot_general` in full precision, float32 or wider.

    The products are accumulated in the dtype of the result, and never in the reduced
    precision that accelerators use for float32 by default: a Gramian that is off by
    1e-3 has no dual cone left to speak of.
    """
    dtype = accumulation_dtype(x, y)

    def product(x: Array, y: Array) -> Array:
        return jax.lax.dot_general(
            x,
            y,
            (contracted, batch),
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=dtype,
        )

    def widened(x: Array, y: Array) -> Array:
        return product(x.astype(dtype), y.astype(dtype))

    if x.dtype != y.dtype or x.dtype == dtype:
        return widened(x, y)
    # Accelerators multiply narrow types in hardware. On a CPU, XLA's matrix product
    # refuses bfloat16 operands with a float32 result, except in shapes that it handles
    # by other code.
    return jax.lax.platform_dependent(x, y, cpu=widened, default=product)


@partial(jax.jit, inline=True)
def products(left: Sequence[Array], right: Sequence[Array]) -> Float[Array, "a b"]:
    """Inner products of every row of `left` with every row of `right`.

    On a mesh, each device takes a part of the entries of a row and all rows, and the
    products are summed over devices. So no device needs all of a row. The sum is spread
    by rows: adding up such sums moves nothing, and takes little memory.
    """
    dtype = accumulation_dtype(*left, *right)

    def of_entries(left: Sequence[Array], right: Sequence[Array]) -> Array:
        same = left is right
        left = _joined(left) if on_mesh else left
        right = left if same else _joined(right) if on_mesh else right
        return functools.reduce(
            jnp.add,
            [
                contract(_flat(x), _flat(y), ((1,), (1,))).astype(dtype)
                for x, y in zip(left, right, strict=True)
            ],
        )

    on_mesh = mesh_of(left, right) is not None
    return sum_over_entries(of_entries, left, right)


def _joined(rows: Sequence[Float[Array, "m ..."]]) -> list[Array]:
    """The rows of parameters with fewer than m entries as those of a single one.

    Their products, m² numbers each, would be larger than they are.
    """
    small = [_flat(x) for x in rows if x[0].size < len(x)]
    large = [x for x in rows if x[0].size >= len(x)]
    return [*large, jnp.concatenate(small, axis=1)] if small else large


def _flat(rows: Float[Array, "m ..."]) -> Float[Array, "m n"]:
    return rows.reshape(len(rows), -1)


@partial(jax.jit, inline=True)
def gramian(parts: Sequence[Array]) -> Float[Array, "m m"]:
    """Inner products of all rows of some parts, whose upper triangle is computed."""
    sizes = [len(part) for part in parts]
    zeros = accumulation_dtype(*parts)
    upper = [
        [
            products([x], [y]) if i <= j else jnp.zeros((sizes[i], sizes[j]), zeros)
            for j, y in enumerate(parts)
        ]
        for i, x in enumerate(parts)
    ]
    return symmetric(jnp.block(upper))


def symmetric_by_rows(upper: Float[Array, "m m"]) -> Float[Array, "m m"]:
    """The symmetric matrix with this upper triangle, spread by rows, on every device.

    It is made symmetric while it is spread: each device then has no other array of this
    size in memory.
    """
    mesh = mesh_of(upper)
    spec = PartitionSpec() if mesh is None else spec_by_rows(len(upper), mesh)
    if mesh is None or spec == PartitionSpec():
        return symmetric(replicated(upper))
    names = mesh.axis_names

    def of_shard(rows: Float[Array, "r m"]) -> Float[Array, "m m"]:
        columns = jax.lax.all_to_all(rows, names, 1, 0, tiled=True)
        first = jax.lax.axis_index(names) * len(rows)
        number = first + jnp.arange(len(rows), dtype=first.dtype)
        below = jnp.arange(rows.shape[1], dtype=first.dtype) < number[:, None]
        mirrored = jnp.where(below, columns.T, rows)
        return jax.lax.all_gather(mirrored, names, tiled=True)

    return jax.shard_map(
        of_shard, mesh=mesh, in_specs=spec, out_specs=PartitionSpec(), check_vma=False
    )(spread(upper, spec, mesh))


@partial(jax.jit, inline=True)
def squared_norms(rows: Sequence[Array]) -> Float[Array, " r"]:
    """Squared Euclidean norms of the rows: the diagonal of `products(rows, rows)`."""
    dtype = accumulation_dtype(*rows)

    def of_entries(rows: Sequence[Array]) -> Array:
        squares = [jnp.square(_flat(x).astype(dtype)).sum(1) for x in rows]
        return functools.reduce(jnp.add, squares)

    return replicated(sum_over_entries(of_entries, rows))


@partial(jax.jit, inline=True)
def combine(weights: Float[Array, " m"], rows: Sequence[Array]) -> list[Array]:
    """`Jᵀ w`, in the dtypes of the rows.

    A few rows are added up one by one: XLA then reads each where it was made, and makes
    one loop of this and of what the optimizer does with the sum.
    """

    def combination(weights: Float[Array, " m"], leaf: Array) -> Array:
        if not 0 < len(leaf) <= FEW_ROWS or mesh_of(leaf) is not None:
            return _weighted_sum(weights, leaf)
        return _added_one_by_one(weights, leaf)

    return [
        automatically(
            combination,
            weights,
            leaf,
            spec=PartitionSpec(*spec_of(jax.typeof(leaf))[1:]),
        )
        for leaf in rows
    ]


def combine_parts(weights: Float[Array, " m"], parts: Sequence[Array]) -> Array:
    """`Jᵀ w` of a single parameter, whose rows come in parts."""
    if len(parts) == 1:
        return combine(weights, parts)[0]
    bounds = np.cumsum([len(part) for part in parts])[:-1]
    total, *others = map(_weighted_sum, jnp.split(weights, bounds), parts)
    for other in others:
        total = total + other
    return total


# Called, not inlined: the parameters of repeated layers have the same shapes.
@jax.jit
def _added_one_by_one(weights: Float[Array, " m"], leaf: Array) -> Array:
    dtype = accumulation_dtype(leaf)
    # Two equations for each row. Each operator of `jnp` would add a few of its own.
    scales = jax.lax.broadcast_in_dim(weights.astype(dtype), leaf.shape, (0,))
    scaled = map(jax.lax.mul, jnp.unstack(scales), jnp.unstack(leaf.astype(dtype)))
    return reduce(jax.lax.add, scaled).astype(leaf.dtype)


def _weighted_sum(weights: Float[Array, " m"], leaf: Array) -> Array:
    dtype = accumulation_dtype(leaf)
    highest = jax.lax.Precision.HIGHEST
    scales, wide = weights.astype(dtype), leaf.astype(dtype)
    return jnp.tensordot(scales, wide, 1, precision=highest).astype(leaf.dtype)
