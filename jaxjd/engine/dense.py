"""The whole Jacobian, m rows of n parameters, in memory."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxjd.engine import _products
from jaxjd.engine._function import LossFunction
from jaxjd.engine._operator import Operator


@partial(jax.tree_util.register_dataclass, data_fields=["leaves"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Dense(Operator):
    """`leaves`: per differentiated parameter its slice of J, [m, *shape]."""

    method = "dense"
    leaves: list[Array]

    @property
    def num_rows(self) -> int:
        return self.leaves[0].shape[0]

    @property
    def dtypes(self) -> list[jnp.dtype]:
        return [leaf.dtype for leaf in self.leaves]

    def rows(self) -> list[Array]:
        return self.leaves

    def rows_at(self, indices: Int[Array, " b"]) -> list[Array]:
        return [leaf[indices] for leaf in self.leaves]

    def block_size(self) -> int:
        return self.num_rows

    def vjp(self, weights: Float[Array, " m"]) -> list[Array]:
        return _products.combine(weights, self.leaves)

    def jvp(self, tangents: Sequence[Array]) -> Float[Array, " m"]:
        return _products.products(self.leaves, [t[None] for t in tangents])[:, 0]

    def restrict(self, kept: Sequence[int]) -> "Dense":
        return Dense([self.leaves[i] for i in kept])


def pullback_at(
    losses: Callable[[Sequence[Array]], Array],
    inputs: Sequence[Array],
    argnums: Sequence[int],
):
    """`jax.vjp` of a function of a list, with respect to some of its items."""

    def at(*point):
        replaced = dict(zip(argnums, point, strict=True))
        return losses([replaced.get(i, x) for i, x in enumerate(inputs)])

    return jax.vjp(at, *[inputs[i] for i in argnums])


def dense(
    function: LossFunction, inputs: Sequence[Array], argnums: Sequence[int]
) -> Dense:
    """Materialise J, by a backward pass per row, through its example if it has one."""

    def call_rows(inputs):
        losses, pullback = pullback_at(function.losses, inputs, argnums)
        return list(jax.vmap(pullback)(jnp.eye(losses.size, dtype=losses.dtype)))

    if function.axes is None:
        return Dense(call_rows(inputs))
    rows = jax.vmap(call_rows, (list(function.axes),))(list(inputs))
    return Dense([leaf.reshape(-1, *leaf.shape[2:]) for leaf in rows])
