"""What is the structured Jacobian, and how is it multiplied?"""

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxjd._numerics import accumulation_dtype, symmetric
from jaxjd.engine.chunked import Chunked
from jaxjd.engine.structured import _groups
from jaxjd.engine.structured._backward import Pass
from jaxjd.engine.structured._groups import Point
from jaxjd.engine.structured._plan import Plan


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["inputs", "passes"],
    meta_fields=["plan", "argnums", "num_rows"],
)
@dataclasses.dataclass(frozen=True)
class Structured:
    """What the forward and the backward pass have left, and nothing contracted yet.

    The arrays are as large as the activations that weights are applied to, and as
    their cotangents. `argnums` are the positions in `inputs` of the parameters.
    """

    inputs: list[Array]
    passes: Pass
    plan: Plan
    argnums: tuple[int, ...]
    num_rows: int

    @property
    def method(self) -> str:
        return "structured"

    def rows(self) -> list[Array]:
        found: dict[int, Array] = {}
        for groups in self.plan.groups_of(self.argnums):
            for group in groups:
                found |= _groups.rows(self._point, group)
        dtypes = [self.inputs[i].dtype for i in self.argnums]
        return [
            found[i].astype(dtype)
            if i in found
            else jnp.zeros((self.num_rows, *self.inputs[i].shape), dtype)
            for i, dtype in zip(self.argnums, dtypes, strict=True)
        ]

    def rows_at(self, indices: Int[Array, " b"]) -> list[Array]:
        k = self._losses_per_example
        example, loss = indices // k, indices % k

        def taken(cotangent, depth):
            examples_second = jnp.moveaxis(cotangent, 1 + depth, 1)
            return jnp.moveaxis(examples_second[loss, example][None], 1, 1 + depth)

        depths = [len(use.levels) for use in self.plan.uses]
        recorded, cotangents, direct = self.passes
        passes = Pass(
            [
                jnp.take(x, example, depth)
                for x, depth in zip(recorded, self.plan.recorded_depths, strict=True)
            ],
            [taken(x, depth) for x, depth in zip(cotangents, depths, strict=True)],
            {n: x[example, loss][:, None] for n, x in direct.items()},
        )
        return dataclasses.replace(self, passes=passes, num_rows=len(indices)).rows()

    def block_size(self) -> int:
        return self.num_rows

    def gramian(self) -> Float[Array, "m m"]:
        return symmetric(self.products(self))

    def products(self, other: "Structured") -> Float[Array, "a b"]:
        """Inner products with the rows of the same function for other examples."""
        dtype = accumulation_dtype(*[self.inputs[i] for i in self.argnums])
        total = jnp.zeros((self.num_rows, other.num_rows), dtype)
        left = self._point
        right = left if other is self else other._point
        for groups in self.plan.groups_of(self.argnums):
            total += _groups.products(left, right, groups).astype(dtype)
        return total

    def vjp(self, weights: Float[Array, " m"]) -> list[Array]:
        """One weighted weight gradient per use of a parameter, no backward pass."""
        weights = weights.reshape(-1, self._losses_per_example)
        found: dict[int, Array] = {}
        for groups in self.plan.groups_of(self.argnums):
            found |= _groups.combination(self._point, groups, weights)
        point = {i: self.inputs[i] for i in self.argnums}
        return [
            found[i].astype(x.dtype) if i in found else jnp.zeros_like(x)
            for i, x in point.items()
        ]

    def jvp(self, tangents: Sequence[Array]) -> Float[Array, " m"]:
        function = self.plan.function
        chunked = Chunked(self.inputs, function, self.argnums, None, self.num_rows)
        return chunked.jvp(tangents)

    def restrict(self, kept: Sequence[int]) -> "Structured":
        return dataclasses.replace(self, argnums=tuple(self.argnums[i] for i in kept))

    @property
    def _losses_per_example(self) -> int:
        return self.num_rows // (self.plan.function.num_examples(self.inputs) or 1)

    @property
    def _point(self) -> Point:
        return Point(self.plan, self.inputs, self.passes, self.argnums, self.num_rows)
