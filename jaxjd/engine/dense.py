"""The Jacobian in memory: all its rows, or those that are not zero by construction."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxjd._numerics import accumulation_dtype
from jaxjd._sharding import (
    as_examples,
    automatically,
    entry_for,
    replicated,
    spec_of,
    zeros_like,
)
from jaxjd.engine import _pieces, _products
from jaxjd.engine._derivative import linearised
from jaxjd.engine._function import LossFunction
from jaxjd.engine._operator import Operator

if TYPE_CHECKING:
    from jaxjd.engine.chunked import Chunked


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["leaves", "origin"],
    meta_fields=["m", "places"],
)
@dataclasses.dataclass(frozen=True)
class Dense(Operator):
    """The rows that may differ from zero, per differentiated parameter.

    - `leaves`: [r, *shape] per parameter.
    - `m`: how many rows there are.
    - `places`: per parameter which of the m rows its leaf holds. The others are zero.
    - `origin`: what computes the same rows, if the function is known.
    """

    method = "dense"
    leaves: list[Array]
    m: int
    places: tuple[tuple[int, ...], ...]
    origin: "Chunked | None" = None

    @property
    def num_rows(self) -> int:
        return self.m

    @property
    def dtypes(self) -> list[jnp.dtype]:
        return [leaf.dtype for leaf in self.leaves]

    def rows(self) -> list[Array]:
        return [
            self._filled(leaf, held)
            for leaf, held in zip(self.leaves, self.places, strict=True)
        ]

    def rows_at(self, indices: Int[Array, " b"]) -> list[Array]:
        return [taken_at(leaf, (indices,)) for leaf in self.rows()]

    def block_size(self) -> int:
        return self.num_rows

    def products(self, other: Operator) -> Float[Array, "m k"]:
        """By groups of parameters that the same losses depend on."""
        if not isinstance(other, Dense):
            return super().products(other)
        if other is self:
            return automatically(lambda rows: rows._products(rows), self)
        return automatically(Dense._products, self, other)

    def _products(self, other: "Dense") -> Float[Array, "m k"]:
        groups: dict[Any, list[int]] = {}
        for n, held in enumerate(zip(self.places, other.places, strict=True)):
            groups.setdefault(held, []).append(n)
        dtype = accumulation_dtype(*self.leaves, *other.leaves)
        total = jnp.zeros((self.num_rows, other.num_rows), dtype)
        for (left, right), group in groups.items():
            if not (left and right):
                continue
            found = _products.products(
                [self.leaves[n] for n in group], [other.leaves[n] for n in group]
            )
            if len(left) == self.num_rows and len(right) == other.num_rows:
                total += found
            else:
                total = total.at[np.ix_(left, right)].add(found)
        if other is self:
            return _products.symmetric_by_rows(total)
        return replicated(total)

    def squared_norms(self) -> Float[Array, " m"]:
        return automatically(Dense._squared_norms, self)

    def _squared_norms(self) -> Float[Array, " m"]:
        total = jnp.zeros(self.num_rows, accumulation_dtype(*self.leaves))
        for leaf, held in zip(self.leaves, self.places, strict=True):
            if held:
                found = _products.squared_norms([leaf])
                total = total.at[np.array(held)].add(found)
        return total

    def vjp(self, weights: Float[Array, " m"]) -> list[Array]:
        return [
            _products.combine(weights[np.array(held, int)], [leaf])[0]
            for leaf, held in zip(self.leaves, self.places, strict=True)
        ]

    def backward(self) -> Callable[[Float[Array, " m"]], list[Array]]:
        # Where each parameter has a row of one loss, the rows are that backward pass.
        # Another one would have a forward pass of its own, which XLA may not recognise.
        own = all(len(held) <= 1 for held in self.places)
        return self.vjp if own or self.origin is None else self.origin.backward()

    def anew(self) -> Operator:
        if self.origin is None:
            return self
        return dataclasses.replace(self.origin.in_memory(), origin=self.origin)

    def jvp(self, tangents: Sequence[Array]) -> Float[Array, " m"]:
        return automatically(
            lambda self, tangents: _products.products(
                self.rows(), [tangent[None] for tangent in tangents]
            )[:, 0],
            self,
            list(tangents),
        )

    def restrict(self, kept: Sequence[int]) -> "Dense":
        return Dense(
            [self.leaves[i] for i in kept],
            self.m,
            tuple(self.places[i] for i in kept),
            self.origin and self.origin.restrict(kept),
        )

    def _filled(self, leaf: Array, held: tuple[int, ...]) -> Array:
        if len(held) == self.num_rows:
            return leaf
        return with_zeros(leaf, np.array(held, int), self.num_rows)


def taken_at(
    array: Array, indices: tuple[Int[Array, " b"], ...]
) -> Float[Array, "b ..."]:
    """`array[indices]`, spread as the last indexed axis is, if devices divide b."""
    aval = jax.typeof(array)
    *_, axis = spec_of(aval)[: len(indices)]
    axis = entry_for(axis, len(indices[0]), aval.sharding.mesh)
    return automatically(
        lambda array, indices: array[indices],
        array,
        indices,
        spec=PartitionSpec(axis, *spec_of(aval)[len(indices) :]),
    )


def taken_along(array: Array, indices: Int[Array, " b"], axis: int) -> Array:
    """`jnp.take(array, indices, axis)`, spread as it was, if devices divide b."""
    aval = jax.typeof(array)
    spec = list(spec_of(aval))
    spec[axis] = entry_for(spec[axis], len(indices), aval.sharding.mesh)
    return automatically(
        lambda array, indices: jnp.take(array, indices, axis),
        array,
        indices,
        spec=PartitionSpec(*spec),
    )


def with_zeros(
    rows: Float[Array, "r ..."], places: Int[np.ndarray, " r"], m: int
) -> Float[Array, "m ..."]:
    """The rows at their places among m, and zeros at the others."""
    spec = spec_of(jax.typeof(rows))
    return automatically(
        lambda rows: jnp.zeros((m, *rows.shape[1:]), rows.dtype).at[places].set(rows),
        rows,
        spec=PartitionSpec(None, *spec[1:]),
    )


def stacked(leaves: Sequence[Array]) -> Dense:
    """The operator of rows that are in memory, [m, *shape] per parameter."""
    m = leaves[0].shape[0]
    return Dense(list(leaves), m, (tuple(range(m)),) * len(leaves))


def pullback_at(
    losses: Callable[[Sequence[Array]], Any],
    inputs: Sequence[Array],
    argnums: Sequence[int],
) -> tuple[Any, Any]:
    """`jax.vjp` of a function of a list, with respect to some of its items."""

    def at(*point):
        replaced = dict(zip(argnums, point, strict=True))
        return losses([replaced.get(i, x) for i, x in enumerate(inputs)])

    return jax.vjp(at, *[inputs[i] for i in argnums])


def dense(
    function: LossFunction, inputs: Sequence[Array], argnums: Sequence[int]
) -> Dense:
    """Materialise J, by a backward pass per row, through what its loss depends on."""
    if function.axes is None:
        return in_memory(linearised(function, inputs, argnums)[0].of_losses(()))

    def call_rows(inputs):
        losses, pullback = pullback_at(function.losses, inputs, argnums)
        return list(jax.vmap(pullback)(_pieces.one_hots(losses)))

    rows = jax.vmap(call_rows, (list(function.axes),))(list(inputs))
    return stacked([as_examples(with_examples_joined(leaf)) for leaf in rows])


def in_memory(linear: _pieces.Linear) -> Dense:
    """The rows of a linear function from parameters to pieces of losses."""
    ends = np.cumsum([value.size for value in linear.values])
    found = _pieces.rows(linear)
    leaves, places = [], []
    for n, point in enumerate(linear.point):
        reaching = [
            (range(end - value.size, end), row)
            for end, value, rows in zip(ends, linear.values, found, strict=True)
            if (row := rows[n]) is not None
        ]
        leaves.append(concatenated_rows([row for _, row in reaching], point))
        places.append(tuple(int(i) for held, _ in reaching for i in held))
    return Dense(leaves, int(ends[-1]), tuple(places))


def with_examples_joined(rows: Float[Array, "m k ..."]) -> Float[Array, "mk ..."]:
    """The losses of all examples along one axis, spread as the examples are."""
    spec = spec_of(jax.typeof(rows))
    return automatically(
        lambda rows: rows.reshape(-1, *rows.shape[2:]),
        rows,
        spec=PartitionSpec(spec[0], *spec[2:]),
    )


def concatenated_rows(
    parts: Sequence[Float[Array, "r ..."]], like: Array
) -> Float[Array, "m ..."]:
    """Rows one after another, of the shape of a parameter; there may be none."""
    if not parts:
        return zeros_like(jax.typeof(like), (0,))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)
