"""How do aggregators look at rows of J with few of them in memory?

Coordinate by coordinate, so that no two parameters are needed at once: `by_parameter`.
And where only sums over rows are needed, no two blocks of rows: `sum_over_rows`.

A Jacobian that has its rows, or makes them by backward passes, gives those of all
parameters together. A structured one forms them per parameter. XLA alone would form
several at once on a CPU, for speed, so there their order is imposed.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from jaxjd import engine
from jaxjd.jacobian import Jacobian

Result = TypeVar("Result")

# A sum over the positive entries of a block, and likewise any other, takes a copy of
# the block in memory.
BLOCKS_PER_PARAMETER = 4


def by_parameter(
    jacobian: Jacobian,
    function: Callable[..., Result],
    *others: Sequence[Array],
) -> list[Result]:
    """`function(rows [m, *shape], *others)` for each differentiated parameter.

    **Arguments:**

    - `others`: further arguments of the function, an array per parameter.
    """
    rows, losses = jacobian._rows, jacobian._losses
    if not isinstance(rows, engine.Structured):
        formed = [losses.from_engine(leaf) for leaf in rows.rows()]
        return [function(*arrays) for arrays in zip(formed, *others, strict=True)]
    results: list[Result] = []
    indices = losses.from_engine(jnp.arange(jacobian.num_losses))
    for n in range(len(rows.argnums)):
        (leaf,) = rows.restrict([n]).rows_at(indices)
        results.append(function(leaf, *[arrays[n] for arrays in others]))
        # The next rows must wait for this result, which XLA would not know to be no
        # part of them. It drops `jax.lax.optimization_barrier` on a CPU before it
        # decides on the order.
        impossible = [
            (jnp.isnan(x) & jnp.isinf(x)).any() for x in jax.tree.leaves(results[-1])
        ]
        indices += jnp.stack(impossible).any().astype(indices.dtype)
    return results


def sum_over_rows(
    jacobian: Jacobian,
    mask: Bool[Array, " m"],
    vectors: PyTree[Float[Array, " m"]],
    term: Callable[[Float[Array, "b ..."], Any], PyTree[Float[Array, "..."]]],
) -> list[PyTree[Float[Array, "..."]]]:
    """Sums over the losses that `mask` names, for each differentiated parameter.

    **Arguments:**

    - `term`: from a block of rows of one parameter, zero where the loss is missing, and
      the same block of `vectors` to the sum over this block.
    """
    rows, m = jacobian._rows, jacobian.num_losses
    mask, vectors = jax.tree.map(jacobian._losses.to_engine, (mask, vectors))

    def sums(block: list[Array], present: Array, vectors: Any) -> list[Any]:
        return [
            term(jnp.where(along_rows(present, leaf), leaf, 0), vectors)
            for leaf in block
        ]

    size = _block_size(jacobian)
    if size == m:
        return sums(rows.rows(), mask, vectors)

    def of_block(start: Array) -> list[Any]:
        places = start + jnp.arange(size)
        # The last block is filled up with the last row, which then counts as missing.
        indices = jnp.minimum(places, m - 1)
        present = mask[indices] & (places < m)
        taken = jax.tree.map(lambda vector: vector[indices], vectors)
        return sums(rows.rows_at(indices), present, taken)

    def add(total: list[Any], start: Array) -> tuple[list[Any], None]:
        return jax.tree.map(jnp.add, total, of_block(start)), None

    starts = jnp.arange(0, m, size)
    shapes = jax.eval_shape(of_block, starts[0])
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add, zeros, starts)[0]


def row_dtypes(jacobian: Jacobian) -> list[jnp.dtype]:
    """Those of the differentiated parameters, without forming any row."""
    rows = jacobian._rows
    if isinstance(rows, engine.Dense):
        return [leaf.dtype for leaf in rows.leaves]
    return [rows.inputs[i].dtype for i in rows.argnums]


def along_rows(vector: Array, rows: Float[Array, "b ..."]) -> Array:
    """[b] with as many axes as the rows, to be broadcast along each."""
    return vector.reshape(-1, *[1] * (rows.ndim - 1))


def fold(
    combine: Callable[[Array, Array], Array],
    term: Callable[..., Float[Array, "b ..."]],
    *arrays: Float[Array, "m ..."],
) -> Float[Array, "..."]:
    """Combine the terms of all rows.

    XLA's own reductions walk along single columns on a CPU, and take 20 times as long.
    Here the terms of an eighth of the rows after another are combined, elementwise, and
    no others are in memory.

    **Arguments:**

    - `term`: of a block of rows of each of the arrays.
    """
    m = len(arrays[0])
    parts = min(m, 8)
    size = m // parts

    def part(first: int, number: int) -> Array:
        return term(*[x[first : first + number] for x in arrays])

    folded = functools.reduce(combine, [part(n * size, size) for n in range(parts)])
    if m > parts * size:
        folded = jnp.concatenate([folded, part(parts * size, m - parts * size)])
    if len(folded) > 1:
        return fold(combine, lambda x: x, folded)
    return folded[0]


def _block_size(jacobian: Jacobian) -> int:
    """Few enough rows to take, with copies, no more memory than those of a parameter.

    Where rows come from backward passes, as many as their `chunk_size` allows: smaller
    blocks put the passes into a loop, where convolutions are much slower on a CPU.
    """
    if not isinstance(jacobian._rows, engine.Structured):
        return jacobian._rows.block_size()
    parameters = jacobian._parameters
    sizes = [math.prod(parameters.shapes[i]) for i in parameters.kept]
    num_blocks = BLOCKS_PER_PARAMETER * sum(sizes) // max(*sizes, 1)
    return math.ceil(jacobian.num_losses / max(num_blocks, 1))
