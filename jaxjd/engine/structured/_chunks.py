"""The same, when the activations of all examples do not fit in memory?

Then nothing is kept: the passes of a chunk of examples are made anew whenever their
factors are needed. Pairs of chunks meet in `jax.lax.map`, the upper triangle only, so
that with c chunks each example goes through (c + 1)/2 passes for the Gramian, and one
more for a combination.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxjd._numerics import symmetric
from jaxjd.engine.chunked import Chunked
from jaxjd.engine.structured._backward import both_passes
from jaxjd.engine.structured._jacobian import Structured
from jaxjd.engine.structured._plan import Plan


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["inputs"],
    meta_fields=["function", "argnums", "chunk_size", "num_rows", "plan"],
)
@dataclasses.dataclass(frozen=True)
class StructuredChunks(Chunked):
    """As `Chunked`, but no rows are formed for the Gramian."""

    plan: Plan

    @property
    def method(self) -> str:
        return "structured"

    def gramian(self) -> Float[Array, "m m"]:
        examples = self.function.num_examples(self.inputs)
        assert examples is not None
        per_example = self.num_rows // examples
        size = max(1, self.block_size() // per_example)
        starts = jnp.arange(0, examples, size)

        def chunk(start: Int[Array, ""]) -> Structured:
            # The last chunk is filled up with the last example, and cut off again.
            indices = jnp.minimum(start + jnp.arange(size), examples - 1)
            inputs = self._examples_at(indices)
            _, passes = both_passes(self.plan, inputs)
            rows = size * per_example
            return Structured(inputs, passes, self.plan, self.argnums, rows)

        def block_row(start: Int[Array, ""]) -> Float[Array, "b m"]:
            left = chunk(start)
            diagonal = left.products(left)

            def block(other: Int[Array, ""]) -> Float[Array, "b b"]:
                return jax.lax.switch(
                    1 + jnp.sign(other - start),
                    [
                        lambda: jnp.zeros_like(diagonal),
                        lambda: diagonal,
                        lambda: left.products(chunk(other)),
                    ],
                )

            blocks = jax.lax.map(block, starts)
            return jnp.moveaxis(blocks, 0, 1).reshape(len(diagonal), -1)

        upper = jax.lax.map(block_row, starts).reshape(
            -1, len(starts) * size * per_example
        )
        return symmetric(upper[: self.num_rows, : self.num_rows])
