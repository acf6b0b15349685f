"""The names of losses: their paths in the pytree that a function returns."""

import functools
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import keystr


@functools.lru_cache
def names_of(structure: Any, shapes: tuple[tuple[int, ...], ...]) -> tuple[str, ...]:
    """One name for each loss, in the order of the rows.

    The loss `{"heads": [x, y]}` has the names "heads/0" and "heads/1". The losses of an
    array have their indices at the end, as the losses of a list do.
    """
    tree = jax.tree.unflatten(structure, range(len(shapes)))
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = []
    for (path, _), shape in zip(leaves, shapes, strict=True):
        parent = [keystr(path, simple=True, separator="/")] if path else []
        for index in itertools.product(*map(range, shape)):
            # A function that returns nothing but one number has the loss "0".
            names.append("/".join([*parent, *map(str, index)]) or "0")
    return tuple(names)


def names_in(values: Any) -> tuple[str, ...] | None:
    """The names by which numbers for the losses are given, or None."""
    if not isinstance(values, Mapping):
        return None
    leaves, structure = jax.tree.flatten(values)
    return names_of(structure, tuple(map(jnp.shape, leaves)))


def check_names(
    argument: str, names: tuple[str, ...] | None, loss_names: tuple[str, ...] | None
) -> None:
    """Compare the names of numbers with those of the losses, if both are known.

    **Raises:** `ValueError` if they differ.
    """
    if None not in (names, loss_names) and names != loss_names:
        raise ValueError(
            f"`{argument}` must have the names of the losses, {shown(loss_names)}. Got "
            f"{shown(names)}."
        )


def place_of(argument: str, name: str, loss_names: tuple[str, ...] | None) -> int:
    """The place of a loss among all of them.

    **Raises:** `ValueError` if the names are not known, or this is none of them.
    """
    if loss_names is None:
        raise ValueError(
            f"`{argument}` is the name of a loss, {name!r}, and a Gramian has no "
            "names. Give its index, or give the Jacobian to the transformation, or "
            "give `loss_names` to `update`."
        )
    if name not in loss_names:
        raise ValueError(
            f"`{argument}` must be the name of a loss, one of {shown(loss_names)}. Got "
            f"{name!r}."
        )
    return loss_names.index(name)


def shown(names: tuple[str, ...] | None, limit: int = 20) -> str:
    """The names for a message: of many losses only the first."""
    names = names or ()
    more = ", ..." if len(names) > limit else ""
    return f"({', '.join(map(repr, names[:limit]))}{more})"
