"""Where weights come from, and what they are applied to.

Nearly always both are the whole Jacobian. Weights may also come from some of the
parameters, or from the features that losses share. And groups of parameters may have
weights of their own.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import optax
from jaxtyping import Array, Float

from jaxjd._typing import PyTree
from jaxjd.jacobian import Jacobian
from jaxjd.transform._arguments import needed, resolved
from jaxjd.transform._grouping import Grouping, groups_of


class Part(NamedTuple):
    """What has one vector of weights.

    - `chosen`: the Jacobian whose Gramian they come from.
    - `applied`: the Jacobian that they are applied to.
    - `vjp`: how, at the least cost beside the Gramian.
    """

    chosen: Jacobian
    applied: Jacobian
    vjp: Callable[[Float[Array, " m"]], PyTree]


def parts_of(
    jacobian: Jacobian,
    params: optax.Params | None,
    *,
    wrt: PyTree[bool] | Callable[[optax.Params], PyTree[bool]] | None,
    features: str | Sequence[str] | None,
    group: Grouping | None,
) -> list[Part]:
    """The parts of a Jacobian, several only if `group` is given."""
    if wrt is not None:
        chosen = jacobian.restrict(resolved(wrt, needed(params)))
        return [Part(chosen, jacobian, jacobian.vjp)]
    if features is not None:
        chosen, vjp = jacobian._split(features)
        return [Part(chosen, jacobian, vjp)]
    return [Part(own, own, own.vjp) for own in applied_to(jacobian, params, group)]


def applied_to(
    jacobian: Jacobian, params: optax.Params | None, group: Grouping | None
) -> list[Jacobian]:
    """What each vector of weights is applied to, wherever it comes from."""
    if group is None:
        return [jacobian]
    structure = jax.tree.structure(needed(params))
    return [
        jacobian.restrict(jax.tree.unflatten(structure, belongs))
        for belongs in groups_of(group, needed(params)).values()
    ]


def joined(updates: Sequence[PyTree]) -> PyTree:
    """One tree from those of all parts, each with the parameters of its own."""

    def own(*leaves: object) -> object:
        found = [x for x in leaves if not isinstance(x, optax.MaskedNode)]
        return found[0] if found else leaves[0]

    return jax.tree.map(
        own, *updates, is_leaf=lambda x: isinstance(x, optax.MaskedNode)
    )
