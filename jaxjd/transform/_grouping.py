"""Which parameters have a Gramian of their own."""

from collections.abc import Callable, Hashable
from typing import Literal

import jax
import optax
from jax.tree_util import keystr

from jaxjd._flax import is_variable
from jaxjd._typing import PyTree
from jaxjd.transform._arguments import is_function, labels_of

Grouping = Literal["leaf", "layer"] | int | Callable[[str], Hashable] | PyTree[Hashable]


def groups_of(group: Grouping, params: optax.Params) -> dict[Hashable, list[bool]]:
    """The groups of parameters, in the order of their first leaves.

    **Returns:** for each label whether each leaf belongs to it.

    **Raises:** `ValueError` or `TypeError` if `group` is not as
    [`jaxjd.aggregate`][] describes it.
    """
    labels = _labels(group, params)
    groups = dict.fromkeys(labels)
    if not groups:
        raise ValueError("`group` needs parameters to group. Got none.")
    return {label: [other == label for other in labels] for label in groups}


def check_group(group: object) -> None:
    """**Raises:** `ValueError` or `TypeError` if `group` fits no parameters at all."""
    if isinstance(group, str) and group not in ("leaf", "layer"):
        raise ValueError(
            '`group` must be "leaf", "layer", a depth, a function of the path of a '
            f"parameter, or a pytree of labels. Got {group!r}."
        )
    if isinstance(group, bool):
        raise TypeError(f"`group` must not be a bool. Got {group}.")
    if isinstance(group, int) and group < 1:
        raise ValueError(f"`group` must be a depth of at least 1. Got {group}.")


def _labels(group: Grouping, params: optax.Params) -> list[Hashable]:
    # optimisers of nnx give variables to `init`, and their values to `update`.
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_variable)
    paths = [
        keystr(path, simple=True, separator="\0").split("\0") for path, _ in leaves
    ]
    if group == "leaf":
        return ["/".join(path) for path in paths]
    if group == "layer":
        return ["/".join(path[:-1]) for path in paths]
    if isinstance(group, int):
        return ["/".join(path[:group]) for path in paths]
    if is_function(group):
        labels = [group("/".join(path)) for path in paths]
    else:
        labels = labels_of("group", group, params)
    for label in labels:
        if not isinstance(label, Hashable):
            raise TypeError(f"`group` must give labels to compare. Got {label!r}.")
    return labels
