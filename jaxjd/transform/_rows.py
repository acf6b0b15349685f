"""Process the rows of J with few of them in memory at a time.

An aggregator that treats each coordinate by itself needs the rows of one parameter at a
time: `by_parameter`. One that only needs sums over rows can take a block of rows at a
time: `sum_over_rows`.

A Jacobian that has its rows, or makes them by backward passes, gives those of all
parameters together. A structured one forms them per parameter. XLA on a CPU would form
several at once, for speed, so their order is imposed.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from jaxjd.jacobian import Jacobian

Result = TypeVar("Result")


def by_parameter(
    jacobian: Jacobian,
    function: Callable[..., Result],
    *others: Sequence[Array],
) -> list[Result]:
    """`function(rows [m, *shape], *others)` for each differentiated parameter.

    **Arguments:**

    - `others`: further arguments of the function, an array per parameter.
    """
    operator, losses = jacobian._operator, jacobian._losses
    if not operator.forms_parameters_apart:
        formed = [losses.from_engine(leaf) for leaf in operator.rows()]
        return [function(*arrays) for arrays in zip(formed, *others, strict=True)]
    results: list[Result] = []
    indices = losses.from_engine(jnp.arange(jacobian.num_losses))
    for n in range(len(operator.dtypes)):
        (leaf,) = operator.restrict([n]).rows_at(indices)
        results.append(function(leaf, *[arrays[n] for arrays in others]))
        # Add a false data dependency on this result, so that XLA cannot form the next
        # rows early. On a CPU it drops `jax.lax.optimization_barrier` before it decides
        # on the order.
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
    """Sum over the losses in `mask`, for each differentiated parameter.

    **Arguments:**

    - `term`: from a block of rows of one parameter, zero where the loss is missing, and
      the same block of `vectors` to the sum over this block.
    """
    operator, m = jacobian._operator, jacobian.num_losses
    mask, vectors = jax.tree.map(jacobian._losses.to_engine, (mask, vectors))

    def sums(block: list[Array], present: Array, vectors: Any) -> list[Any]:
        return [
            term(jnp.where(along_rows(present, leaf), leaf, 0), vectors)
            for leaf in block
        ]

    size = operator.block_size()
    if size == m:
        return sums(operator.rows(), mask, vectors)

    def of_block(start: Array) -> list[Any]:
        places = start + jnp.arange(size)
        # The last block is filled up with the last row, which then counts as missing.
        indices = jnp.minimum(places, m - 1)
        present = mask[indices] & (places < m)
        taken = jax.tree.map(lambda vector: vector[indices], vectors)
        return sums(operator.rows_at(indices), present, taken)

    def add(total: list[Any], start: Array) -> tuple[list[Any], None]:
        return jax.tree.map(jnp.add, total, of_block(start)), None

    starts = jnp.arange(0, m, size)
    shapes = jax.eval_shape(of_block, starts[0])
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add, zeros, starts)[0]


def along_rows(vector: Array, rows: Float[Array, "b ..."]) -> Array:
    """Reshape a vector [b] so that it broadcasts along each of b rows."""
    return vector.reshape(-1, *[1] * (rows.ndim - 1))


def fold(
    combine: Callable[[Array, Array], Array],
    term: Callable[..., Float[Array, "b ..."]],
    *arrays: Float[Array, "m ..."],
) -> Float[Array, "..."]:
    """Combine the terms of all rows.

    XLA's own reductions on a CPU walk along single columns, and take 20 times as long.
    This combines one eighth of the rows after another, elementwise, so only the terms
    of that eighth are in memory.

    **Arguments:**

    - `term`: from a block of rows of each of the arrays to their terms.
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
