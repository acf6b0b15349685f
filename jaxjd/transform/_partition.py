"""Give each group of parameters an aggregator of its own."""

from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import jax
import optax
from optax.experimental import aggregating

from jaxjd._typing import PyTree
from jaxjd.transform._arguments import (
    Offered,
    check_extra_args,
    labels_of,
    needed,
    refuse_preference,
    resolved,
)
from jaxjd.transform._as_jacobian import as_jacobian


class PartitionState(NamedTuple):
    """`groups`: the state of every group's transformation, by label."""

    groups: dict[Hashable, optax.OptState]


def partition(
    transforms: Mapping[Hashable, optax.GradientTransformation],
    labels: PyTree[Hashable] | Callable[[optax.Params], PyTree[Hashable]],
) -> aggregating.Aggregator:
    """Aggregate each group of parameters by itself, as `optax.partition` optimises.

    Every group has its own Gramian. For multi-task learning with a shared trunk,
    `jaxjd.partition({"trunk": jaxjd.upgrad(), "heads": jaxjd.sum()}, labels)` settles
    conflicts where there are any, and gives each head the gradient of its own task.
    Every group gets all extra arguments, and uses those that it knows.

    **Arguments:**

    - `transforms`: for each label an aggregator, or a chain that starts with one.
    - `labels`: a pytree of labels like the parameters or a prefix of them, or a
      function from the parameters to one.

    **Raises:** `TypeError` if `transforms` is not such a dict. When `init` or `update`
    is traced, `ValueError` if a label has no transformation or the labels do not fit
    the parameters, or if `preference` is given and no group has one, `TypeError` if a
    label cannot be a key; and as [`jaxjd.aggregate`][].

    **Example:**

    >>> params = {"trunk": jnp.zeros(2), "heads": jnp.zeros(2)}
    >>> labels = {"trunk": "shared", "heads": "own"}
    >>> tx = jaxjd.partition({"shared": jaxjd.mean(), "own": jaxjd.sum()}, labels)
    >>> J = {"trunk": jnp.ones((2, 2)), "heads": jnp.eye(2)}
    >>> update, state = tx.update(J, tx.init(params), params)
    >>> update["heads"], update["trunk"]
    (Array([1., 1.], dtype=float32), Array([1., 1.], dtype=float32))
    """
    check_transforms(transforms)
    transforms = {
        label: optax.with_extra_args_support(transform)
        for label, transform in transforms.items()
    }

    def known_labels(params: optax.Params) -> list[Hashable]:
        flat = labels_of("labels", resolved(labels, params), params)
        for label in flat:
            if not isinstance(label, Hashable):
                raise TypeError(
                    "`labels` must be among the keys of `transforms`, "
                    f"{list(transforms)}. Got {type(label).__name__}."
                )
        unknown = set(flat) - set(transforms)
        if unknown:
            raise ValueError(
                "`labels` must be among the keys of `transforms`, "
                f"{list(transforms)}. Got {sorted(map(str, unknown))}."
            )
        return flat

    def only(params: optax.Params, chosen: list[bool]) -> optax.Params:
        leaves, structure = jax.tree.flatten(params)
        kept = [
            leaf if keep else optax.MaskedNode()
            for leaf, keep in zip(leaves, chosen, strict=True)
        ]
        return jax.tree.unflatten(structure, kept)

    def init_fn(params: optax.Params) -> PartitionState:
        flat = known_labels(params)
        return PartitionState(
            {
                label: transform.init(only(params, [x == label for x in flat]))
                for label, transform in transforms.items()
            }
        )

    def update_fn(
        updates: Any,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, PartitionState]:
        check_extra_args(extra_args)
        params = needed(params)
        jacobian = as_jacobian(updates, params)
        flat = known_labels(params)
        structure = jax.tree.structure(params)
        merged: list[Any] = [None] * len(flat)
        groups = dict(state.groups)
        preference = extra_args.get("preference")
        if preference is not None and not isinstance(preference, Offered):
            extra_args["preference"] = preference = Offered(preference)
        for label, transform in transforms.items():
            chosen = [x == label for x in flat]
            if not any(chosen):
                continue
            restricted: Any = jacobian.restrict(jax.tree.unflatten(structure, chosen))
            group, groups[label] = transform.update(
                restricted,
                state.groups[label],
                only(params, chosen),
                **extra_args,
            )
            leaves = structure.flatten_up_to(group)
            merged = [
                leaf if keep else before
                for leaf, keep, before in zip(leaves, chosen, merged, strict=True)
            ]
        if preference is not None and not preference.taken:
            refuse_preference()
        return jax.tree.unflatten(structure, merged), PartitionState(groups)

    return aggregating.Aggregator(init_fn, update_fn)


def check_transforms(transforms: object) -> None:
    """**Raises:** `TypeError` if it is not a mapping to what can be transformations."""
    got = type(transforms).__name__
    if isinstance(transforms, Mapping):
        # What has both methods but is not one says so itself when it is called.
        others = {
            label: value
            for label, value in transforms.items()
            if not (hasattr(value, "init") and hasattr(value, "update"))
        }
        if not others:
            return
        got = repr(others)
    raise TypeError(
        "`transforms` must be a dict from labels to aggregators, such as "
        f"{{'trunk': jaxjd.upgrad(), 'heads': jaxjd.sum()}}. Got {got}."
    )
