"""Read the arguments that transformations share: trees, functions, extra ones."""

import difflib
import warnings
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import optax

from jaxjd._typing import PyTree
from jaxjd.jacobian import Jacobian, as_prefix

# The extra arguments that some aggregators take.
EXTRA_ARGS = (
    "mask",
    "losses",
    "losses_after",
    "cross_gramian",
    "preference",
    "index",
)

Leaf = TypeVar("Leaf")


def check_extra_args(extra_args: Mapping[str, Any]) -> None:
    """Warn of extra arguments whose names look like misspellings of ours.

    They cannot be refused: optax passes the extra arguments of every link to all links.
    """
    for name in extra_args:
        if name in EXTRA_ARGS:
            continue
        for meant in difflib.get_close_matches(name, EXTRA_ARGS, n=1, cutoff=0.7):
            warnings.warn(
                f"`update` was given the extra argument `{name}`, which the aggregator "
                f"does not know and ignores. Did you mean `{meant}`?",
                stacklevel=3,
            )


class Offered:
    """A preference that a partition offers to its groups, one of which must take it.

    Not all groups need to have one: the heads of a network may have `jaxjd.sum()`.
    """

    def __init__(self, values: Any) -> None:
        self.values = values
        self.taken = False


def preference_in(
    extra_args: Mapping[str, Any], jacobian: Jacobian, *, has_one: bool
) -> Any:
    """The preference among the extra arguments, or None.

    **Arguments:**

    - `has_one`: whether the method takes one.

    **Raises:** `ValueError` if it does not and was given one, or if the preference has
    other names than the losses.
    """
    preference = extra_args.get("preference")
    offered = isinstance(preference, Offered)
    if not has_one and preference is not None and not offered:
        refuse_preference()
    if not has_one or preference is None:
        return None
    if offered:
        preference.taken = True
    values = preference.values if offered else preference
    return in_order("preference", values, jacobian)


def refuse_preference() -> NoReturn:
    raise ValueError(
        "`preference` is given to `update`, but this method has none. Those that have "
        "one take it as an argument when they are made, as `jaxjd.upgrad` does."
    )


def in_order(name: str, values: Any, jacobian: Jacobian) -> Any:
    """Values for the losses in the order of rows, if they come in a tree like them.

    The rows of losses in a dict are in the order of its sorted keys. In a tree of
    values like it nobody needs to know that order.

    **Raises:** `ValueError` if they come in a dict of other keys or shapes.
    """
    losses = jacobian._losses
    leaves, structure = jax.tree.flatten(values)
    alike = structure == losses.structure
    if alike and jax.tree_util.treedef_is_leaf(structure):
        alike = jnp.shape(leaves[0]) == losses.shapes[0]
    if alike or isinstance(values, Mapping):
        return losses.flatten(name, values)
    return values


def needed(params: optax.Params | None) -> optax.Params:
    """**Raises:** `ValueError` if `update` was not given the parameters."""
    if params is None:
        raise ValueError(
            "`params` must be given to `update`, for `wrt`, `group` or `labels` to be "
            "found: `tx.update(updates, state, params)`."
        )
    return params


def is_function(tree: object) -> bool:
    """Whether a function was given, where a tree may be too.

    An Equinox module is callable, and a module of bools or labels is still a tree. So,
    as in `optax.masked`, an object is a function only if it is its own only leaf.
    """
    leaves = jax.tree.leaves(tree)
    return callable(tree) and len(leaves) == 1 and leaves[0] is tree


def resolved(
    tree: PyTree[Leaf] | Callable[[optax.Params], PyTree[Leaf]],
    params: optax.Params,
) -> PyTree[Leaf]:
    """Resolve a function of the parameters to the tree that it returns.

    A tree may also be given itself, like the parameters or a prefix of them.
    """
    return tree(params) if is_function(tree) else as_prefix(tree, params)


def labels_of(
    name: str, labels: PyTree[Hashable], params: optax.Params
) -> list[Hashable]:
    """One label for each parameter, from a tree like them or a prefix of them.

    **Raises:** `ValueError` if the tree is not one.
    """
    try:
        tree = jax.tree.broadcast(as_prefix(labels, params), params)
    except ValueError as error:
        raise ValueError(
            f"`{name}` must be structured like the parameters or a prefix of them, "
            f"{jax.tree.structure(params)}. Got {jax.tree.structure(labels)}."
        ) from error
    return jax.tree.leaves(tree)
