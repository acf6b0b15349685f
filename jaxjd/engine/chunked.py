"""At most `chunk_size` rows of the Jacobian in memory at a time.

Rows are computed by `jax.vjp` whenever they are needed. Without a `chunk_size`, or with
one of m or more, all of them are computed together.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxjd._numerics import accumulation_dtype
from jaxjd.engine._function import LossFunction
from jaxjd.engine._operator import Operator
from jaxjd.engine.dense import Dense, dense, pullback_at


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["inputs"],
    meta_fields=["function", "argnums", "chunk_size"],
)
@dataclasses.dataclass(frozen=True)
class Chunked(Operator):
    """A function, the point where it is differentiated, and nothing computed yet.

    `argnums` are the positions in `inputs` of the differentiated parameters.
    """

    method = "chunked"
    inputs: list[Array]
    function: LossFunction
    argnums: tuple[int, ...]
    chunk_size: int | None

    @property
    def num_rows(self) -> int:
        return self.function.num_losses(self.inputs)

    @property
    def dtypes(self) -> list[jnp.dtype]:
        return [self.inputs[i].dtype for i in self.argnums]

    def rows(self) -> list[Array]:
        return self.in_memory().rows()

    def in_memory(self) -> Dense:
        """All rows, of which some may be known to be zero."""
        return dense(self.function, self.inputs, self.argnums)

    def products(self, other: Operator) -> Float[Array, "m k"]:
        if self.block_size() < self.num_rows:
            return super().products(other)
        rows = self.in_memory()
        return rows.products(rows if other is self else other)

    def rows_at(self, indices: Int[Array, " b"]) -> list[Array]:
        """Some rows, by a backward pass each, through its own example if it has one."""
        dtype = self.function.loss_dtype
        if self.function.axes is None:
            every = jnp.arange(self.num_rows, dtype=indices.dtype)
            one_hot = indices[:, None] == every[None]
            return list(jax.vmap(self._pullback())(one_hot.astype(dtype)))
        per_example = self.function.losses_per_call

        def row(inputs, which):
            one_hot = which == jnp.arange(per_example, dtype=which.dtype)
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

    def vjp(self, weights: Float[Array, " m"]) -> list[Array]:
        """One backward pass over the weighted sum of the losses."""
        return self.backward()(weights)

    def backward(self) -> Callable[[Float[Array, " m"]], list[Array]]:
        if self.function.axes is not None and self.block_size() < self.num_rows:
            return self._vjp_by_chunks
        pullback, dtype = self._pullback(), self.function.loss_dtype
        return lambda weights: list(pullback(weights.astype(dtype)))

    def jvp(self, tangents: Sequence[Array]) -> Float[Array, " m"]:
        # The pullback is linear, so its own pullback is J. Forward mode would be as
        # cheap, but functions with a `jax.custom_vjp` have none.
        zero = jnp.zeros(self.num_rows, self.function.loss_dtype)
        _, pushforward = jax.vjp(self._pullback(), zero)
        point = zip(tangents, self.dtypes, strict=True)
        (losses,) = pushforward(tuple(t.astype(dtype) for t, dtype in point))
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
        per_example = self.function.losses_per_call
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
