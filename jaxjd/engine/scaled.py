"""The Jacobian with respect to scaled parameters: J diag(s), one scale per entry."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxjd._numerics import accumulation_dtype
from jaxjd.engine._operator import Blocks, Method, Operator
from jaxjd.engine.concatenated import concatenated, parts_of
from jaxjd.engine.dense import Dense, stacked


@partial(
    jax.tree_util.register_dataclass, data_fields=["operator", "scales"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Scaled(Operator):
    r"""J with its columns scaled, float32 or wider: one array of scales per parameter.

    The scale of a weight does not separate into those of activations and cotangents, so
    inner products need the rows: $\langle g_i, g_j \rangle = \sum_{ab} a_{ia} d_{ib}
    s_{ab}^2 a_{ja} d_{jb}$.
    """

    operator: Operator
    scales: list[Array]

    @property
    def method(self) -> Method:  # type: ignore[override]
        return self.operator.method

    @property
    def forms_parameters_apart(self) -> bool:
        return self.operator.forms_parameters_apart

    @property
    def num_rows(self) -> int:
        return self.operator.num_rows

    @property
    def dtypes(self) -> list[jnp.dtype]:
        return [scale.dtype for scale in self.scales]

    def rows(self) -> list[Array]:
        return self._times(self.operator.rows())

    def rows_at(self, indices: Int[Array, " b"]) -> list[Array]:
        return self._times(self.operator.rows_at(indices))

    def block_size(self) -> int:
        return self.operator.block_size()

    def row_blocks(self) -> Blocks[list[Array]]:
        blocks = self.operator.row_blocks()
        return blocks._replace(at=lambda start: self._times(blocks.at(start)))

    def products(self, other: Operator) -> Float[Array, "m k"]:
        if other is not self or not self.forms_parameters_apart:
            return super().products(other)
        m = self.num_rows
        every = jnp.arange(m, dtype=jnp.int32)
        total = jnp.zeros((m, m), accumulation_dtype(*self.scales))
        for n in range(len(self.scales)):  # The rows of one parameter after another.
            total += stacked(self.restrict([n]).rows_at(every)).gramian()
        return total

    def vjp(self, weights: Float[Array, " m"]) -> list[Array]:
        return self._times(self.operator.vjp(weights))

    def jvp(self, tangents: Sequence[Array]) -> Float[Array, " m"]:
        return self.operator.jvp(self._times(tangents))

    def restrict(self, kept: Sequence[int]) -> "Scaled":
        return Scaled(self.operator.restrict(kept), [self.scales[i] for i in kept])

    def backward(self) -> Callable[[Float[Array, " m"]], list[Array]]:
        vjp = self.operator.backward()
        return lambda weights: self._times(vjp(weights))

    def anew(self) -> "Scaled":
        return Scaled(self.operator.anew(), self.scales)

    def _times(self, arrays: Sequence[Array]) -> list[Array]:
        return _times(arrays, self.scales)


def scaled(operator: Operator, scales: Sequence[Array]) -> Operator:
    """The same operator with scaled columns; rows that are in memory stay there."""
    if isinstance(operator, Dense):
        leaves = _times(operator.leaves, scales)
        return Dense(leaves, operator.m, operator.places)
    parts = parts_of(operator)
    if len(parts) > 1:
        return concatenated([scaled(part, scales) for part in parts])
    return Scaled(operator, list(scales))


def _times(arrays: Sequence[Array], scales: Sequence[Array]) -> list[Array]:
    """Arrays like the parameters, or with a leading axis of rows, in wide dtypes."""
    return [
        x.astype(scale.dtype) * (scale if x.ndim == scale.ndim else scale[None])
        for x, scale in zip(arrays, scales, strict=True)
    ]
