"""The structured Jacobian: how it is multiplied without its rows."""

import abc
import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxjd._sharding import zeros_like
from jaxjd.engine._operator import Blocks, Operator, by_blocks, products_by_blocks
from jaxjd.engine.chunked import Chunked
from jaxjd.engine.dense import taken_along, taken_at, with_zeros
from jaxjd.engine.structured import _groups
from jaxjd.engine.structured._backward import Pass, both_passes
from jaxjd.engine.structured._groups import Point
from jaxjd.engine.structured._plan import Plan

# A sum over the positive entries of a block, and likewise any other, takes a copy of
# the block in memory.
BLOCKS_PER_PARAMETER = 4


class StructuredOperator(Operator):
    """An operator whose products with another one need few rows, or none.

    `argnums` are the positions of the differentiated parameters among the inputs.
    """

    method = "structured"
    plan: Plan
    argnums: tuple[int, ...]

    @abc.abstractmethod
    def points(self) -> Blocks[Point]:
        """What the passes leave, for a block of rows at a time."""

    def products(self, other: Operator) -> Float[Array, "m k"]:
        if not isinstance(other, StructuredOperator):
            return super().products(other)
        left = self.points()
        right = left if other is self else other.points()
        same = (self.plan, self.argnums) == (other.plan, other.argnums)
        multiply = _groups.all_products if same else _groups.products_across_plans
        return products_by_blocks(left, right, multiply)

    def squared_norms(self) -> Float[Array, " m"]:
        return by_blocks(self.points(), _groups.squared_norms)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["inputs", "passes"],
    meta_fields=["plan", "argnums"],
)
@dataclasses.dataclass(frozen=True)
class Structured(StructuredOperator):
    """What the forward and the backward pass have left, and nothing contracted yet.

    The arrays are as large as the activations that weights are applied to, and as
    their cotangents.
    """

    forms_parameters_apart = True
    inputs: list[Array]
    passes: Pass
    plan: Plan
    argnums: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        return self.plan.function.num_losses(self.inputs)

    @property
    def dtypes(self) -> list[jnp.dtype]:
        return [self.inputs[i].dtype for i in self.argnums]

    def rows(self) -> list[Array]:
        return self._rows_of(self._point)

    def rows_at(self, indices: Int[Array, " b"]) -> list[Array]:
        k = self.plan.function.losses_per_call
        if any(len(held) < k for held in self.passes.reached):
            return [taken_at(leaf, (indices,)) for leaf in self.rows()]
        # As if each row had an example of its own, with this one loss.
        example, loss = indices // k, indices % k

        def taken(cotangent, depth):
            examples_second = jnp.moveaxis(cotangent, 1 + depth, 1)
            found = taken_at(examples_second, (loss, example))[None]
            return jnp.moveaxis(found, 1, 1 + depth)

        depths = [len(use.levels) for use in self.plan.uses]
        kept = self.passes
        passes = Pass(
            [
                taken_along(x, example, depth)
                for x, depth in zip(
                    kept.recorded, self.plan.recorded_depths, strict=True
                )
            ],
            [taken(x, depth) for x, depth in zip(kept.cotangents, depths, strict=True)],
            {n: taken_at(x, (example, loss))[:, None] for n, x in kept.direct.items()},
            ((0,),) * len(kept.reached),
        )
        return self._rows_of(
            self._point._replace(passes=passes, num_examples=len(indices), num_losses=1)
        )

    def block_size(self) -> int:
        """Few enough to take, with copies, no more memory than those of a parameter."""
        sizes = [self.inputs[i].size for i in self.argnums]
        num_blocks = BLOCKS_PER_PARAMETER * sum(sizes) // max(*sizes, 1)
        return math.ceil(self.num_rows / max(num_blocks, 1))

    def points(self) -> Blocks[Point]:
        return Blocks(self.num_rows, self.num_rows, lambda _: self._point)

    def vjp(self, weights: Float[Array, " m"]) -> list[Array]:
        """One weighted weight gradient per use of a parameter, no backward pass."""
        k = self.plan.function.losses_per_call
        weights = weights.reshape(-1, k)
        found: dict[int, Array] = {}
        for groups in self.plan.groups_of(self.argnums):
            point, losses = _groups.of_losses(self._point, groups)
            if losses:
                of_these = weights if len(losses) == k else weights[:, np.array(losses)]
                found |= _groups.combination(point, groups, of_these)
        point = {i: self.inputs[i] for i in self.argnums}
        return [
            found[i].astype(x.dtype) if i in found else jnp.zeros_like(x)
            for i, x in point.items()
        ]

    def backward(self) -> Callable[[Float[Array, " m"]], list[Array]]:
        function = self.plan.function
        if function.axes is not None:
            return self.vjp  # Its examples share one backward pass already.
        # So do losses that share no parameter.
        losses_of = function.pieces(self.argnums).losses_of
        if all(losses_of(n) <= 1 for n in range(len(self.argnums))):
            return self.vjp
        return self._function.backward()

    def anew(self) -> "Structured":
        if self.plan.function.axes is not None:
            return self
        _, passes = both_passes(self.plan, self.inputs)
        return dataclasses.replace(self, passes=passes)

    def jvp(self, tangents: Sequence[Array]) -> Float[Array, " m"]:
        return self._function.jvp(tangents)

    @property
    def _function(self) -> Chunked:
        """The same Jacobian by passes through the function itself."""
        return Chunked(self.inputs, self.plan.function, self.argnums, None)

    def restrict(self, kept: Sequence[int]) -> "Structured":
        return dataclasses.replace(self, argnums=tuple(self.argnums[i] for i in kept))

    def _rows_of(self, point: Point) -> list[Array]:
        found: dict[int, Array] = {}
        for groups in self.plan.groups_of(self.argnums):
            some, losses = _groups.of_losses(point, groups)
            if not losses:
                continue
            places = _groups.rows_of(point, losses)
            for group in groups:
                for leaf, rows in _groups.gradients(some, group).items():
                    found[leaf] = rows
                    if len(places) < point.num_rows:
                        found[leaf] = with_zeros(rows, places, point.num_rows)
        return [
            found[i].astype(dtype)
            if i in found
            else zeros_like(jax.typeof(self.inputs[i]), (point.num_rows,)).astype(dtype)
            for i, dtype in zip(self.argnums, self.dtypes, strict=True)
        ]

    @property
    def _point(self) -> Point:
        k = self.plan.function.losses_per_call
        m = self.num_rows // k
        return Point(self.plan, self.inputs, self.passes, self.argnums, m, k)
