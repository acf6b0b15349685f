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

from jaxjd.engine._operator import Blocks
from jaxjd.engine.chunked import Chunked
from jaxjd.engine.structured._backward import both_passes
from jaxjd.engine.structured._groups import Point
from jaxjd.engine.structured._jacobian import StructuredOperator
from jaxjd.engine.structured._plan import Plan


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["inputs"],
    meta_fields=["function", "argnums", "chunk_size", "plan"],
)
@dataclasses.dataclass(frozen=True)
class StructuredChunks(StructuredOperator, Chunked):
    """As `Chunked`, but no rows are formed for products of rows."""

    plan: Plan

    def points(self) -> Blocks[Point]:
        examples = self.function.num_examples(self.inputs)
        assert examples is not None
        k = self.function.losses_per_call
        size = max(1, self.block_size() // k)

        def at(start: Int[Array, ""]) -> Point:
            # The last chunk is filled up with the last example.
            places = start // k + jnp.arange(size, dtype=start.dtype)
            indices = jnp.minimum(places, examples - 1)
            inputs = self._examples_at(indices)
            _, passes = both_passes(self.plan, inputs)
            return Point(self.plan, inputs, passes, self.argnums, size * k)

        return Blocks(self.num_rows, size * k, at)
