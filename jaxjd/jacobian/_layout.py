"""The structure of losses and parameters, and flat lists of them for the engine."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from jaxjd._checks import check_real
from jaxjd._names import names_of
from jaxjd._typing import PyTree


class Source(NamedTuple):
    """A function that returns losses: of how many examples, and in how many arrays."""

    num_examples: int | None
    num_arrays: int


@dataclasses.dataclass(frozen=True)
class Losses:
    """How the m losses are structured: static.

    The engine keeps the losses of one example side by side. Users see the losses in the
    row-major order in which the function returns them. The two orders differ if a
    per-example function returns several arrays.

    The losses of several functions are those of each `Source`, one after another.
    """

    structure: Any  # A jax.tree_util.PyTreeDef.
    shapes: tuple[tuple[int, ...], ...]
    sources: tuple[Source, ...]

    @property
    def sizes(self) -> list[int]:
        return [math.prod(shape) for shape in self.shapes]

    @property
    def num_losses(self) -> int:
        return sum(self.sizes)

    @property
    def names(self) -> tuple[str, ...]:
        """Of each loss, in the order of the rows."""
        return names_of(self.structure, self.shapes)

    def as_shapes(self) -> PyTree[list[int]]:
        return jax.tree.unflatten(self.structure, list(map(list, self.shapes)))

    def unflatten(self, vector: Float[Array, " m"]) -> PyTree[Float[Array, "..."]]:
        parts = jnp.split(vector, np.cumsum(self.sizes)[:-1])
        leaves = [x.reshape(s) for x, s in zip(parts, self.shapes, strict=True)]
        return jax.tree.unflatten(self.structure, leaves)

    def flatten(self, name: str, values: PyTree) -> Float[Array, " m"]:
        """One vector from values that are flat already or shaped like the losses."""
        m = self.num_losses
        check_real(name, values)
        if not isinstance(values, list | tuple | dict) and jnp.shape(values) == (m,):
            return jnp.asarray(values)
        leaves, structure = jax.tree.flatten(values)
        shapes = tuple(jnp.shape(leaf) for leaf in leaves)
        if structure != self.structure or shapes != self.shapes:
            got = jax.tree.map(lambda x: list(jnp.shape(x)), values)
            raise ValueError(
                f"`{name}` must have shape ({m},) or be shaped like the losses, "
                f"{self.as_shapes()}. Got {got}."
            )
        with jax.numpy_dtype_promotion("standard"):
            return jnp.concatenate([jnp.ravel(leaf) for leaf in leaves])

    @property
    def ordered_as_in_engine(self) -> bool:
        return all(
            num_examples is None or num_arrays <= 1
            for num_examples, num_arrays in self.sources
        )

    def from_engine(self, rows: Float[Array, "m ..."]) -> Float[Array, "m ..."]:
        return self._by_source(rows, arrays_apart)

    def to_engine(self, vector: Float[Array, " m"]) -> Float[Array, " m"]:
        return self._by_source(vector, examples_apart)

    def _by_source(
        self, rows: Array, reorder: Callable[[Array, int, list[int]], Array]
    ) -> Array:
        """Reorder the rows of those functions whose two orders differ."""
        if self.ordered_as_in_engine:
            return rows
        first, found, sizes = 0, [], self.sizes
        for num_examples, num_arrays in self.sources:
            own, sizes = sizes[:num_arrays], sizes[num_arrays:]
            some = rows[first : first + sum(own)]
            first += sum(own)
            if num_examples is not None and num_arrays > 1:
                some = reorder(some, num_examples, own)
            found.append(some)
        return found[0] if len(found) == 1 else jnp.concatenate(found)


def arrays_apart(
    rows: Float[Array, "m ..."], num_examples: int, sizes: list[int]
) -> Float[Array, "m ..."]:
    """From the losses of one example after another to one array after another."""
    rest = rows.shape[1:]
    rows = rows.reshape(num_examples, -1, *rest)
    ends = np.cumsum([size // num_examples for size in sizes])[:-1]
    parts = jnp.split(rows, ends, axis=1)
    return jnp.concatenate([part.reshape(-1, *rest) for part in parts])


def examples_apart(
    vector: Float[Array, " m"], num_examples: int, sizes: list[int]
) -> Float[Array, " m"]:
    """The reverse."""
    parts = jnp.split(vector, np.cumsum(sizes)[:-1])
    rows = [part.reshape(num_examples, -1) for part in parts]
    return jnp.concatenate(rows, axis=1).ravel()


@dataclasses.dataclass(frozen=True)
class Parameters:
    """How the parameters are structured, and which of them J is taken for: static.

    `kept` are the positions of the leaves that it is taken for. In trees, the other
    leaves are an `optax.MaskedNode`.
    """

    structure: Any  # A jax.tree_util.PyTreeDef.
    shapes: tuple[tuple[int, ...], ...]
    kept: tuple[int, ...]

    def unflatten(self, leaves: Sequence[Any]) -> PyTree:
        tree: list[Any] = [optax.MaskedNode()] * len(self.shapes)
        for position, leaf in zip(self.kept, leaves, strict=True):
            tree[position] = leaf
        return jax.tree.unflatten(self.structure, tree)

    def flatten(self, name: str, tree: PyTree) -> list[Array]:
        """The kept leaves of a tree like the parameters; the others may be anything."""
        expected = self.kept_shapes()
        try:
            leaves = self.structure.flatten_up_to(tree)
        except ValueError as error:
            raise ValueError(
                f"`{name}` must be structured like the parameters, {expected}. "
                f"Got {jax.tree.structure(tree)}."
            ) from error
        kept = [leaves[i] for i in self.kept]
        check_real(name, self.unflatten(kept))
        if [jnp.shape(x) for x in kept] != [self.shapes[i] for i in self.kept]:
            raise ValueError(
                f"`{name}` must have the shapes of the parameters, {expected}. "
                f"Got {self.unflatten([list(jnp.shape(x)) for x in kept])}."
            )
        return [jnp.asarray(x) for x in kept]

    def broadcast(self, name: str, prefix: PyTree) -> list[Any]:
        """One item per leaf, kept or not, from a tree that is a prefix of theirs."""
        items: list[Any] = [None] * len(self.shapes)

        def visit(item: Any, positions: PyTree) -> None:
            for position in jax.tree.leaves(positions):
                items[position] = item

        everything = jax.tree.unflatten(self.structure, range(len(self.shapes)))
        try:
            # What a partition takes away may be missing in the tree too.
            jax.tree.map(
                visit,
                as_prefix(prefix, everything),
                everything,
                is_leaf=lambda x: isinstance(x, optax.MaskedNode),
            )
        except ValueError as error:
            raise ValueError(
                f"`{name}` must be structured like the parameters or a prefix of them, "
                f"{everything}. Got {prefix}."
            ) from error
        return items

    def kept_shapes(self) -> PyTree:
        return self.unflatten([list(self.shapes[i]) for i in self.kept])


def as_prefix(tree: PyTree, like: PyTree) -> PyTree:
    """A dict in the type of another mapping, such as nnx's `State`.

    nnx keeps parameters in a State, but people write labels and masks as dicts of the
    model's attribute names.
    """
    if type(tree) is dict and isinstance(like, Mapping) and not isinstance(like, dict):
        return type(like)(tree)  # type: ignore[call-arg]
    return tree
