"""The linear operator that every method is: what one can ask of a Jacobian J [m, n].

Parameters come as a flat list of arrays, and each row of J as one such list. A method
says how rows are formed (`rows`, `rows_at`), how many of them may be in memory at once
(`block_size`), and what it does better than by rows: `products`, `squared_norms`,
`vjp`, `jvp`. All products of rows that are made a block at a time are made here.
"""

import abc
from collections.abc import Callable, Sequence
from typing import ClassVar, Generic, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxjd._numerics import symmetric
from jaxjd._sharding import replicated
from jaxjd.engine import _products

Method = Literal["dense", "chunked", "structured"]
Block = TypeVar("Block")


class Blocks(NamedTuple, Generic[Block]):
    """The rows of an operator, cut into blocks of equal size.

    `at` makes the block that starts at a row, for multiples of the size. Rows beyond
    the last one may be anything.

    Given `together`, each block takes that many neighbours from all over the rows: with
    c blocks, block n has every c-th group of them from the n-th on. So every device
    that has examples has some of each block.
    """

    num_rows: int
    size: int
    at: Callable[[Int[Array, ""]], Block]
    together: int | None = None

    def in_order(self, found: Float[Array, "b ..."], axis: int) -> Float[Array, "..."]:
        """What was found for one block after another, in the order of the rows."""
        if self.together is not None:
            shape = found.shape
            grouped = (-1, self.size // self.together, self.together)
            found = found.reshape(*shape[:axis], *grouped, *shape[axis + 1 :])
            found = found.swapaxes(axis, axis + 1).reshape(shape)
        return jax.lax.slice_in_dim(found, 0, self.num_rows, axis=axis)


class Operator(abc.ABC):
    """J with respect to a list of parameters. Subclasses are pytrees."""

    method: ClassVar[Method]
    # Whether `restrict([i]).rows_at(...)` forms the rows of parameter i alone. A
    # backward pass forms those of all parameters together.
    forms_parameters_apart: ClassVar[bool] = False

    @property
    @abc.abstractmethod
    def num_rows(self) -> int:
        """m, the number of losses."""

    @property
    @abc.abstractmethod
    def dtypes(self) -> list[jnp.dtype]:
        """Those of the rows, per parameter."""

    @abc.abstractmethod
    def rows(self) -> list[Array]:
        """All of J, [m, *shape] per parameter."""

    @abc.abstractmethod
    def rows_at(self, indices: Int[Array, " b"]) -> list[Array]:
        """Some rows of J, [b, *shape] per parameter."""

    @abc.abstractmethod
    def block_size(self) -> int:
        """How many rows to form at once where not all are needed together."""

    @abc.abstractmethod
    def vjp(self, weights: Float[Array, " m"]) -> list[Array]:
        """`Jᵀ w`, in the dtypes of the parameters."""

    @abc.abstractmethod
    def jvp(self, tangents: Sequence[Array]) -> Float[Array, " m"]:
        """`J d`."""

    @abc.abstractmethod
    def restrict(self, kept: Sequence[int]) -> "Operator":
        """J with respect to the parameters at these places in the list."""

    def backward(self) -> Callable[[Float[Array, " m"]], list[Array]]:
        """`vjp` where nothing else of J is needed: by one backward pass.

        Rows, or what they are made of, may cost a backward pass each. XLA leaves them
        out where nothing else depends on them. The forward pass is made at once.
        """
        return self.vjp

    def anew(self) -> "Operator":
        """The same J, with nothing computed that only some of its products need.

        In a branch of `jax.lax.cond`, what is then computed is computed only if this
        branch is taken.
        """
        return self

    def products(self, other: "Operator") -> Float[Array, "m k"]:
        """`J₁ J₂ᵀ` for another operator with k rows and the same list of parameters."""
        left = self.row_blocks()
        right = left if other is self else other.row_blocks()
        return products_by_blocks(left, right, _products.products)

    def gramian(self) -> Float[Array, "m m"]:
        """`J Jᵀ`, float32 or wider, symmetric to the bit."""
        return self.products(self)

    def squared_norms(self) -> Float[Array, " m"]:
        """The diagonal of `J Jᵀ`."""
        return by_blocks(self.row_blocks(), _products.squared_norms)

    def row_blocks(self) -> Blocks[list[Array]]:
        """The rows themselves, for a block at a time."""
        m, size = self.num_rows, self.block_size()
        if size >= m:
            return Blocks(m, m, lambda _: self.rows())

        def at(start: Int[Array, ""]) -> list[Array]:
            # The last block is filled up with the last row.
            places = start + jnp.arange(size, dtype=start.dtype)
            return self.rows_at(jnp.minimum(places, m - 1))

        return Blocks(m, size, at)


def by_blocks(
    blocks: Blocks[Block], function: Callable[[Block], Float[Array, " b"]]
) -> Float[Array, " m"]:
    """One number for each row, with one block of them in memory at a time."""
    if blocks.size >= blocks.num_rows:
        return function(blocks.at(jnp.zeros((), jnp.int32)))
    starts = jnp.arange(0, blocks.num_rows, blocks.size, dtype=jnp.int32)
    found = jax.lax.map(lambda start: function(blocks.at(start)), starts)
    return blocks.in_order(found.ravel(), 0)


def products_by_blocks(
    left: Blocks[Block],
    right: Blocks[Block],
    multiply: Callable[[Block, Block], Float[Array, "a b"]],
) -> Float[Array, "m k"]:
    """Inner products of rows, with one block of either operator in memory at a time.

    For `right is left` the result is symmetric to the bit, and only the upper triangle
    is computed: with m rows in blocks of b, (m/b + 1)/2 · m rows are formed.
    """
    m, k = left.num_rows, right.num_rows
    first = jnp.zeros((), jnp.int32)
    if left.size >= m and right.size >= k:
        x = left.at(first)
        if right is left:
            return _products.symmetric_by_rows(multiply(x, x))
        return replicated(multiply(x, right.at(first)))

    def products(x: Block, y: Block) -> Float[Array, "a b"]:
        return replicated(multiply(x, y))

    whole = right.at(first) if right.size >= k else None
    starts = jnp.arange(0, k, right.size, dtype=jnp.int32)

    def block_row(start: Int[Array, ""]) -> Float[Array, "a k"]:
        if whole is not None:
            return products(whole if right is left else left.at(start), whole)
        rows = left.at(start)

        def product(other: Int[Array, ""]) -> Float[Array, "a b"]:
            return products(rows, right.at(other))

        if right is left:
            diagonal = products(rows, rows)
            below, above = (lambda _: jnp.zeros_like(diagonal)), product

            def block(other: Int[Array, ""]) -> Float[Array, "a b"]:
                which = 1 + jnp.sign(other - start)
                return jax.lax.switch(which, [below, lambda _: diagonal, above], other)

            blocks = jax.lax.map(block, starts)
        else:
            blocks = jax.lax.map(product, starts)
        return jnp.moveaxis(blocks, 0, 1).reshape(blocks.shape[1], -1)

    if left.size >= m:
        found = block_row(first)
    else:
        found = jax.lax.map(block_row, jnp.arange(0, m, left.size, dtype=jnp.int32))
        found = found.reshape(-1, found.shape[-1])
    if right is left:
        found = symmetric(found)
    return left.in_order(right.in_order(found, 1), 0)
