"""The rows of several operators, one after another, each kind in its own way."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxjd._numerics import accumulation_dtype
from jaxjd.engine._operator import Operator


@partial(jax.tree_util.register_dataclass, data_fields=["operators"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Concatenated(Operator):
    """Operators with respect to the same parameters, none of them concatenated."""

    operators: tuple[Operator, ...]

    @property
    def method(self) -> str:
        return " + ".join(operator.method for operator in self.operators)

    @property
    def forms_parameters_apart(self) -> bool:
        return all(operator.forms_parameters_apart for operator in self.operators)

    @property
    def num_rows(self) -> int:
        return sum(self._sizes)

    @property
    def dtypes(self) -> list[jnp.dtype]:
        return self.operators[0].dtypes

    def rows(self) -> list[Array]:
        found = [operator.rows() for operator in self.operators]
        return [jnp.concatenate(leaves) for leaves in zip(*found, strict=True)]

    def rows_at(self, indices: Int[Array, " b"]) -> list[Array]:
        found, first = [jnp.zeros((), dtype) for dtype in self.dtypes], 0
        for operator, size in zip(self.operators, self._sizes, strict=True):
            inside = (indices >= first) & (indices < first + size)
            rows = operator.rows_at(jnp.clip(indices - first, 0, size - 1))
            found = [
                jnp.where(inside.reshape(-1, *[1] * (new.ndim - 1)), new, old)
                for new, old in zip(rows, found, strict=True)
            ]
            first += size
        return found

    def block_size(self) -> int:
        if all(x.block_size() == x.num_rows for x in self.operators):
            return self.num_rows
        return min(operator.block_size() for operator in self.operators)

    def products(self, other: Operator) -> Float[Array, "m k"]:
        return products(self, other)

    def squared_norms(self) -> Float[Array, " m"]:
        return jnp.concatenate([x.squared_norms() for x in self.operators])

    def vjp(self, weights: Float[Array, " m"]) -> list[Array]:
        split = self._split(weights)
        return _sums([x.vjp(w) for x, w in zip(self.operators, split, strict=True)])

    def backward(self) -> Callable[[Float[Array, " m"]], list[Array]]:
        backwards = [operator.backward() for operator in self.operators]

        def vjp(weights: Float[Array, " m"]) -> list[Array]:
            pairs = zip(backwards, self._split(weights), strict=True)
            return _sums([backward(w) for backward, w in pairs])

        return vjp

    def anew(self) -> "Concatenated":
        return Concatenated(tuple(x.anew() for x in self.operators))

    def jvp(self, tangents: Sequence[Array]) -> Float[Array, " m"]:
        return jnp.concatenate([x.jvp(tangents) for x in self.operators])

    def restrict(self, kept: Sequence[int]) -> "Concatenated":
        return Concatenated(tuple(x.restrict(kept) for x in self.operators))

    @property
    def _sizes(self) -> list[int]:
        return [operator.num_rows for operator in self.operators]

    def _split(self, weights: Float[Array, " m"]) -> list[Array]:
        return jnp.split(weights, np.cumsum(self._sizes)[:-1])


def _sums(found: Sequence[Sequence[Array]]) -> list[Array]:
    """The sum of several gradients with respect to the same parameters."""

    def total(*gradients: Array) -> Array:
        wide = jnp.zeros((), accumulation_dtype(*gradients))
        for gradient in gradients:
            wide += gradient.astype(wide.dtype)
        return wide.astype(gradients[0].dtype)

    return [total(*of_one) for of_one in zip(*found, strict=True)]


def parts_of(operator: Operator) -> tuple[Operator, ...]:
    return operator.operators if isinstance(operator, Concatenated) else (operator,)


def concatenated(operators: Sequence[Operator]) -> Operator:
    parts = tuple(part for operator in operators for part in parts_of(operator))
    return parts[0] if len(parts) == 1 else Concatenated(parts)


def products(left: Operator, right: Operator) -> Float[Array, "m k"]:
    """`J₁ J₂ᵀ` for any two operators, block by block if they have several parts."""
    rows, columns = parts_of(left), parts_of(right)
    if len(rows) == len(columns) == 1:
        return left.products(right)
    blocks: dict[tuple[int, int], Array] = {}
    for i, x in enumerate(rows):
        for j, y in enumerate(columns):
            mirrored = left is right and j < i
            blocks[i, j] = blocks[j, i].T if mirrored else x.products(y)
    dtype = accumulation_dtype(*blocks.values())
    return jnp.concatenate(
        [
            jnp.concatenate(
                [blocks[i, j].astype(dtype) for j in range(len(columns))], axis=1
            )
            for i in range(len(rows))
        ]
    )
