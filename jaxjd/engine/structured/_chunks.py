"""The structured Jacobian when the activations of all examples do not fit in memory.

Then nothing is kept: the passes of a chunk of examples are made anew whenever their
factors are needed. With c chunks each example goes through (c + 1)/2 passes for the
Gramian, and one more for a combination.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxjd.engine._derivative import DROPPED
from jaxjd.engine._operator import Blocks
from jaxjd.engine.chunked import Chunked
from jaxjd.engine.structured._backward import both_passes
from jaxjd.engine.structured._groups import Point
from jaxjd.engine.structured._jacobian import Structured, StructuredOperator
from jaxjd.engine.structured._plan import Plan


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["inputs"],
    meta_fields=["function", "argnums", "chunk_size", "plan"],
    drop_fields=DROPPED,
)
@dataclasses.dataclass(frozen=True)
class StructuredChunks(StructuredOperator, Chunked):
    """As `Chunked`, but no rows are formed for products of rows."""

    plan: Plan

    def rows(self) -> list[Array]:
        return self.rows_of_examples(self.inputs)

    def rows_of_examples(self, inputs: list[Array]) -> list[Array]:
        return self._kept(inputs).rows()

    def rows_at(self, indices: Int[Array, " b"]) -> list[Array]:
        k = self.function.losses_per_call
        kept = self._kept(self._examples_at(indices // k))
        first = k * jnp.arange(len(indices), dtype=indices.dtype)
        return kept.rows_at(first + indices % k)

    def _kept(self, inputs: list[Array]) -> Structured:
        _, passes = both_passes(self.plan, inputs)
        return Structured(inputs, passes, self.plan, self.argnums)

    def points(self) -> Blocks[Point]:
        k, chunks = self.function.losses_per_call, self.chunks()

        def at(start: Int[Array, ""]) -> Point:
            inputs = chunks.at(start // (chunks.size * k))
            _, passes = both_passes(self.plan, inputs)
            return Point(self.plan, inputs, passes, self.argnums, chunks.size, k)

        return Blocks(self.num_rows, chunks.size * k, at, together=k)
