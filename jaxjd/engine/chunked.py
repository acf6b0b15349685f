"""At most `chunk_size` rows of the Jacobian in memory at a time.

Rows are computed by `jax.vjp` whenever they are needed. Without a `chunk_size`, or with
one of m or more, all of them are computed together.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import typeof
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxjd._numerics import accumulation_dtype
from jaxjd._sharding import (
    automatically,
    entry_for,
    explicit_spec,
    mesh_of,
    spread,
    spread_like,
    varying,
    zeros_like,
)
from jaxjd.engine._convolutions import check_chunks
from jaxjd.engine._derivative import DROPPED, Derivative
from jaxjd.engine._function import LossFunction
from jaxjd.engine._operator import Blocks, Operator
from jaxjd.engine.dense import Dense, dense, in_memory, pullback_at, taken_along


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["inputs"],
    meta_fields=["function", "argnums", "chunk_size"],
    drop_fields=DROPPED,
)
@dataclasses.dataclass(frozen=True)
class Chunked(Operator):
    """A function, the point where it is differentiated, and no rows computed yet.

    - `argnums`: the positions in `inputs` of the differentiated parameters.
    - `derivative`: that of a function of all losses, whose forward pass they share. It
      is as large as all activations, so nothing that takes the operator apart, such as
      a loop that carries it, takes it along. Without it there are forward passes.
    """

    method = "chunked"
    inputs: list[Array]
    function: LossFunction
    argnums: tuple[int, ...]
    chunk_size: int | None
    derivative: Derivative | None = dataclasses.field(default=None, kw_only=True)

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
        if self.derivative is not None:
            rows = in_memory(self.derivative.of_losses(()))
            return rows.restrict(
                [self.derivative.argnums.index(i) for i in self.argnums]
            )
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
            return list(jax.vmap(self._pullback())(one_hot))
        per_example = self.function.losses_per_call

        def row(inputs, which):
            one_hot = which == jnp.arange(per_example, dtype=which.dtype)
            _, pullback = pullback_at(self.function.losses, inputs, self.argnums)
            return pullback(one_hot.astype(dtype))

        rows = jax.vmap(row, (list(self.function.axes), 0))
        inputs = self._examples_at(indices // per_example)
        which = indices % per_example
        for x, axis in zip(inputs, self.function.axes, strict=True):
            spec = None if axis is None else explicit_spec(typeof(x))
            if spec is not None:  # `jax.vmap` wants all of them spread alike.
                which = spread(which, PartitionSpec(spec[axis]), mesh_of(x))
        return list(rows(inputs, which))

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
        pullback = self._pullback()
        return lambda weights: list(pullback(weights))

    def jvp(self, tangents: Sequence[Array]) -> Float[Array, " m"]:
        # The pullback is linear, so its own pullback is J. Forward mode would be as
        # cheap, but functions with a `jax.custom_vjp` have none.
        zero = jnp.zeros(self.num_rows, self.function.loss_dtype)
        zero = varying(zero, self.inputs)
        _, pushforward = jax.vjp(self._pullback(), zero)
        point = zip(tangents, self.dtypes, strict=True)
        (losses,) = pushforward(tuple(t.astype(dtype) for t, dtype in point))
        return losses

    def restrict(self, kept: Sequence[int]) -> "Chunked":
        return dataclasses.replace(self, argnums=tuple(self.argnums[i] for i in kept))

    def _examples_at(self, indices: Int[Array, " b"]) -> list[Array]:
        assert self.function.axes is not None
        return [
            x if axis is None else taken_along(x, indices, axis)
            for x, axis in zip(self.inputs, self.function.axes, strict=True)
        ]

    def _pullback(self, examples: Sequence[Array] | None = None):
        """The map from cotangents of the losses (of some examples) to parameters."""
        if self.derivative is not None and examples is None:
            return self.derivative.pullback(self.argnums)
        inputs = self.inputs if examples is None else examples
        losses, pullback = pullback_at(self.function.all_losses, inputs, self.argnums)

        def pull(weights: Float[Array, " m"]) -> tuple[Array, ...]:
            weights = varying(weights.astype(losses.dtype), losses)
            return pullback(spread_like(weights, typeof(losses)))

        return pull

    def row_blocks(self) -> Blocks[list[Array]]:
        k = self.function.losses_per_call
        if self.function.axes is None or not k <= self.block_size() < self.num_rows:
            return super().row_blocks()
        chunks = self.chunks()

        def at(start: Int[Array, ""]) -> list[Array]:
            return self.rows_of_examples(chunks.at(start // (chunks.size * k)))

        return Blocks(self.num_rows, chunks.size * k, at, together=k)

    def rows_of_examples(self, inputs: list[Array]) -> list[Array]:
        return dense(self.function, inputs, self.argnums).rows()

    def chunks(self) -> "Chunks":
        """The examples, cut into chunks that all devices have some examples of."""
        function = self.function
        assert function.axes is not None
        examples = function.num_examples(self.inputs) or 0
        size = max(1, self.block_size() // function.losses_per_call)
        number = -(-examples // size)
        size = -(-examples // number)
        missing = size * number - examples

        def split(x: Array, axis: int) -> Array:
            """[size, number, ...]: of one chunk are those `number` examples apart."""
            axis %= x.ndim

            def apart(x: Array) -> Array:
                x = jnp.moveaxis(x, axis, 0)
                if missing:  # Filled up with the last example.
                    x = jnp.concatenate([x, jnp.repeat(x[-1:], missing, 0)])
                return x.reshape(size, number, *x.shape[1:])

            found = automatically(apart, x, spec=spec_of_chunks(x, axis, size))
            mesh = mesh_of(found)
            if mesh is not None and size % math.prod(mesh.axis_sizes):
                # Not the same number for every device: each takes all of them.
                check_chunks(function, x, size)
                return spread(found, PartitionSpec(), mesh)
            return found

        parts = [
            x if axis is None else split(x, axis)
            for x, axis in zip(self.inputs, function.axes, strict=True)
        ]

        def at(n: Int[Array, ""]) -> list[Array]:
            return [
                x
                if axis is None
                else jnp.moveaxis(
                    jax.lax.dynamic_index_in_dim(x, n, 1, keepdims=False),
                    0,
                    axis % (x.ndim - 1),
                )
                for x, axis in zip(parts, function.axes or (), strict=True)
            ]

        return Chunks(number, size, at)

    def _vjp_by_chunks(self, weights: Float[Array, " m"]) -> list[Array]:
        """`Jᵀ w` with the activations of one chunk of examples at a time in memory."""
        k, chunks = self.function.losses_per_call, self.chunks()
        # The last examples may be repeated, at weight zero.
        missing = chunks.number * chunks.size * k - len(weights)
        weights = jnp.pad(weights, (0, missing))
        weights = weights.reshape(chunks.size, chunks.number, k).swapaxes(0, 1)

        def add_chunk(total, chunk):
            n, weights = chunk
            gradient = self._pullback(chunks.at(n))(weights.ravel())
            summed = [
                t + g.astype(t.dtype) for t, g in zip(total, gradient, strict=True)
            ]
            return summed, None

        point = [self.inputs[i] for i in self.argnums]
        zeros = [zeros_like(typeof(x)).astype(accumulation_dtype(x)) for x in point]
        places = jnp.arange(chunks.number, dtype=jnp.int32)
        start = varying(zeros, self.inputs)
        total, _ = jax.lax.scan(add_chunk, start, (places, weights))
        return [t.astype(x.dtype) for t, x in zip(total, point, strict=True)]


class Chunks(NamedTuple):
    """A number of chunks of examples, each of the same size."""

    number: int
    size: int
    at: Callable[[Int[Array, ""]], list[Array]]


def spec_of_chunks(x: Array, axis: int, size: int) -> Any:
    """How [size, number, ...] is spread, if x is spread along its axis of examples."""
    spec = explicit_spec(typeof(x))
    if spec is None:
        return None
    examples, rest = spec[axis], (*spec[:axis], *spec[axis + 1 :])
    examples = entry_for(examples, size, typeof(x).sharding.mesh)
    return PartitionSpec(examples, None, *rest)
