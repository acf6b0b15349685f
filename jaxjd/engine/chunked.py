"""The Gramian from at most `chunk_size` rows of the Jacobian at a time.

Rows are computed anew whenever they are needed, by `jax.vjp`, so that J is never in
memory as a whole. Pairs of blocks of rows meet in `jax.lax.map`, the upper triangle
only: with m rows in blocks of b, (m/b + 1)/2 · m rows are computed instead of m.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxjd._numerics import accumulation_dtype, symmetric
from jaxjd.engine import _products
from jaxjd.engine._function import LossFunction
from jaxjd.engine.dense import dense, pullback_at


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["inputs"],
    meta_fields=["function", "argnums", "chunk_size", "num_rows"],
)
@dataclasses.dataclass(frozen=True)
class Chunked:
    """A function, the point where it is differentiated, and nothing computed yet.

    `argnums` are the positions in `inputs` of the differentiated parameters.
    """

    inputs: list[Array]
    function: LossFunction
    argnums: tuple[int, ...]
    chunk_size: int | None
    num_rows: int

    @property
    def method(self) -> str:
        return "chunked"

    def rows(self) -> list[Array]:
        return dense(self.function, self.inputs, self.argnums).leaves

    def rows_at(self, indices: Int[Array, " b"]) -> list[Array]:
        """Some rows, one backward pass each: of one example only, if there are any."""
        dtype = self.function.loss_dtype
        if self.function.axes is None:
            one_hot = indices[:, None] == jnp.arange(self.num_rows)[None]
            return list(jax.vmap(self._pullback())(one_hot.astype(dtype)))
        examples = self.function.num_examples(self.inputs)
        assert examples is not None
        per_example = self.num_rows // examples

        def row(inputs, which):
            one_hot = which == jnp.arange(per_example)
            _, pullback = pullback_at(self.function.losses, inputs, self.argnums)
            return pullback(one_hot.astype(dtype))

        rows = jax.vmap(row, (list(self.function.axes), 0))
        inputs = self._examples_at(indices // per_example)
        return list(rows(inputs, indices % per_example))

    def block_size(self) -> int:
        """Two blocks of rows are in memory at once, hence half of `chunk_size`."""
        if self.chunk_size is None or self.chunk_size >= self.num_rows:
            return self.num_rows
        return max(1, self.chunk_size // 2)

    def gramian(self) -> Float[Array, "m m"]:
        return gramian_by_blocks(self)

    def vjp(self, weights: Float[Array, " m"]) -> list[Array]:
        """One backward pass over the weighted sum of the losses."""
        if self.function.axes is None or self.block_size() == self.num_rows:
            return list(self._pullback()(weights.astype(self.function.loss_dtype)))
        return self._vjp_by_chunks(weights)

    def jvp(self, tangents: Sequence[Array]) -> Float[Array, " m"]:
        # The pullback is linear, so its own pullback is J. Forward mode would be as
        # cheap, but functions with a `jax.custom_vjp` have none.
        zero = jnp.zeros(self.num_rows, self.function.loss_dtype)
        _, pushforward = jax.vjp(self._pullback(), zero)
        (losses,) = pushforward(tuple(tangents))
        return losses

    def restrict(self, kept: Sequence[int]) -> "Chunked":
        return dataclasses.replace(self, argnums=tuple(self.argnums[i] for i in kept))

    def _examples_at(self, indices: Int[Array, " b"]) -> list[Array]:
        assert self.function.axes is not None
        return [
            x if axis is None else jnp.take(x, indices, axis)
            for x, axis in zip(self.inputs, self.function.axes, strict=True)
        ]

    def _pullback(self, examples: Sequence[Array] | None = None):
        """The map from cotangents of the losses (of some examples) to parameters."""
        inputs = self.inputs if examples is None else examples
        return pullback_at(self.function.all_losses, inputs, self.argnums)[1]

    def _vjp_by_chunks(self, weights: Float[Array, " m"]) -> list[Array]:
        """`Jᵀ w` with the activations of one chunk of examples at a time in memory."""
        examples = self.function.num_examples(self.inputs)
        assert examples is not None
        per_example = self.num_rows // examples
        size = max(1, self.block_size() // per_example)
        # The last chunk is filled up with the last example, at weight zero.
        starts = jnp.arange(0, examples, size)
        indices = starts[:, None] + jnp.arange(size)[None]
        present = indices < examples
        indices = jnp.minimum(indices, examples - 1)
        weights = weights.reshape(examples, per_example)[indices]
        weights = jnp.where(present[..., None], weights, 0).astype(
            self.function.loss_dtype
        )

        def add_chunk(total, chunk):
            indices, weights = chunk
            gradient = self._pullback(self._examples_at(indices))(weights.ravel())
            summed = [
                t + g.astype(t.dtype) for t, g in zip(total, gradient, strict=True)
            ]
            return summed, None

        point = [self.inputs[i] for i in self.argnums]
        zeros = [jnp.zeros(x.shape, accumulation_dtype(x)) for x in point]
        total, _ = jax.lax.scan(add_chunk, zeros, (indices, weights))
        return [t.astype(x.dtype) for t, x in zip(total, point, strict=True)]


class Rows(Protocol):
    """What the products of blocks ask of a Jacobian."""

    @property
    def num_rows(self) -> int: ...
    def rows(self) -> list[Array]: ...
    def rows_at(self, indices: Int[Array, " b"]) -> list[Array]: ...
    def block_size(self) -> int: ...


def gramian_by_blocks(jacobian: Rows) -> Float[Array, "m m"]:
    """`J Jᵀ`, one pair of blocks of rows at a time."""
    m, size = jacobian.num_rows, jacobian.block_size()
    if size == m:
        return _products.gramian(jacobian.rows())
    starts = jnp.arange(0, m, size)

    def block_row(start):
        rows = jacobian.rows_at(_indices(start, size, m))

        def block(other):
            return jax.lax.switch(
                1 + jnp.sign(other - start),
                [
                    lambda: jnp.zeros_like(diagonal),
                    lambda: diagonal,
                    lambda: _products.products(
                        rows, jacobian.rows_at(_indices(other, size, m))
                    ),
                ],
            )

        diagonal = _products.products(rows, rows)
        blocks = jax.lax.map(block, starts)
        return jnp.moveaxis(blocks, 0, 1).reshape(size, -1)

    upper = jax.lax.map(block_row, starts)
    return symmetric(upper.reshape(-1, upper.shape[-1])[:m, :m])


def products_by_blocks(left: Rows, right: Rows) -> Float[Array, "a b"]:
    """`J₁ J₂ᵀ`, one pair of blocks of rows at a time."""
    m, n = left.num_rows, right.num_rows
    m_size, n_size = left.block_size(), right.block_size()

    def block_row(start):
        rows = left.rows_at(_indices(start, m_size, m))

        def block(other):
            return _products.products(rows, right.rows_at(_indices(other, n_size, n)))

        blocks = jax.lax.map(block, jnp.arange(0, n, n_size))
        return jnp.moveaxis(blocks, 0, 1).reshape(m_size, -1)

    result = jax.lax.map(block_row, jnp.arange(0, m, m_size))
    return result.reshape(-1, result.shape[-1])[:m, :n]


def _indices(start: Int[Array, ""], size: int, m: int) -> Int[Array, " b"]:
    # The last block is filled up with the last row; the caller cuts it off again.
    return jnp.minimum(start + jnp.arange(size), m - 1)
