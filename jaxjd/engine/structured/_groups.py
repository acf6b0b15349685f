"""How do the uses of a group of parameters become products, rows and combinations?"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import NamedTuple

import jax
from jaxtyping import Array, Float

from jaxjd.engine import _contract
from jaxjd.engine.structured import _contraction, _use
from jaxjd.engine.structured._backward import Pass
from jaxjd.engine.structured._contraction import Contraction, Factors
from jaxjd.engine.structured._node import Input, Node, pullback
from jaxjd.engine.structured._plan import Group, Plan, form

# How much larger than its factors the rows of a parameter may be, to be kept.
REUSED_PER_KEPT = 2


class Point(NamedTuple):
    """A function, where it is differentiated, and what the passes have left there.

    `leaves` are the positions in `inputs` of the parameters that are asked for.
    """

    plan: Plan
    inputs: Sequence[Array]
    passes: Pass
    leaves: tuple[int, ...]
    num_rows: int


def contraction(point: Point, group: Group) -> Contraction:
    """Which way the inner products of a group are computed."""
    if not group.uniform:
        return "rows"
    factors = _factors(point, group.uses)
    m, k = factors.right.shape[:2]
    return _contraction.choose(factors.sizes(), m, k, factors.one_hot)


def products(left: Point, right: Point, group: Group) -> Float[Array, "a b"]:
    """Inner products of the gradients of a group at one point with those at another."""
    if contraction(left, group) == "pairs":
        return _contraction.products_by_pairs(
            _factors(left, group.uses), _factors(right, group.uses)
        )
    x = rows(left, group)
    y = x if right is left else rows(right, group)
    return _contract.products(list(x.values()), list(y.values()))


def rows(point: Point, group: Group) -> dict[int, Float[Array, "mk ..."]]:
    """The gradients themselves, float32 or wider, per parameter."""

    def of_uses(same: Sequence[int]) -> Array:
        factors = _factors(point, same)
        blocks = _contraction.rows(factors)
        blocks = blocks.reshape(factors.num_rows, *blocks.shape[2:])
        use = point.plan.uses[same[0]]
        return jax.vmap(lambda block: _use.gradient(use, block))(blocks)

    def of_node(uses: Sequence[int]) -> Array:
        forms = _by(uses, lambda n: form(point.plan.uses[n]))
        return _sum(of_uses(same) for same in forms)

    direct = {
        leaf: x.reshape(-1, *x.shape[2:]).astype(_contract.accumulation_dtype(x))
        for leaf, x in point.passes.direct.items()
    }
    return _to_leaves(point, group, of_node, direct, jax.vmap)


def combination(
    point: Point, group: Group, weights: Float[Array, "m k"]
) -> dict[int, Array]:
    """The weighted sum of the gradients, per parameter."""
    if _reuses_rows(point, group):
        formed = rows(point, group)
        combined = _contract.combine(weights.ravel(), list(formed.values()))
        return dict(zip(formed, combined, strict=True))

    def of_use(n: int) -> Array:
        use, recorded = point.plan.uses[n], point.passes.recorded[n]
        cotangent = point.passes.cotangents[n]
        cotangent = _weighted(weights, cotangent, len(use.levels))
        return _use.weighted_gradient(use, _value(use.node, point), recorded, cotangent)

    def of_node(uses: Sequence[int]) -> Array:
        return _sum(of_use(n) for n in uses)

    direct = {
        leaf: _weighted_sum(weights, x) for leaf, x in point.passes.direct.items()
    }
    return _to_leaves(point, group, of_node, direct, lambda pull: pull)


def _factors(point: Point, uses: Sequence[int]) -> Factors:
    """Uses of the same form, as one."""
    passes = point.passes
    return _contraction.joined(
        [
            _use.factors(point.plan.uses[n], passes.recorded[n], passes.cotangents[n])
            for n in uses
        ]
    )


def _reuses_rows(point: Point, group: Group) -> bool:
    """Whether to combine the rows that the Gramian has formed.

    That reads each once, where a weight gradient takes as many operations as the rows
    took. But until the weights are known the rows must be kept, so they must not be
    much larger than what is kept anyway. Rows that the Gramian does not form, or has
    formed in another computation, are formed anew.
    """
    if not group.uses or contraction(point, group) == "pairs":
        return False
    passes, rows = point.passes, 0
    for leaf in group.leaves:
        rows += point.num_rows * point.inputs[leaf].size
    kept = sum(
        x.size for n in group.uses for x in (*passes.recorded[n], passes.cotangents[n])
    )
    return rows <= REUSED_PER_KEPT * kept


def _to_leaves(
    point: Point,
    group: Group,
    of_node: Callable[[Sequence[int]], Array],
    direct: dict[int, Array],
    mapped: Callable,
) -> dict[int, Array]:
    """Gradients of nodes, pulled back to the parameters, and those taken directly."""
    leaves = [leaf for leaf in group.leaves if leaf in point.leaves]
    gradients = {leaf: [direct[leaf]] for leaf in leaves if leaf in direct}
    by_node = _by(group.uses, lambda n: point.plan.uses[n].node.key)
    if by_node:
        nodes = [point.plan.uses[uses[0]].node for uses in by_node]
        of_nodes = [of_node(uses) for uses in by_node]
        if all(isinstance(node, Input) for node in nodes):
            pulled = of_nodes
        else:
            cotangents = [
                x.astype(_value(node, point).dtype)
                for x, node in zip(of_nodes, nodes, strict=True)
            ]
            pull = pullback(nodes, point.inputs, leaves)
            pulled = mapped(pull)(cotangents)
        for leaf, gradient in zip(leaves, pulled, strict=True):
            gradients.setdefault(leaf, []).append(gradient)
    return {leaf: _sum(found) for leaf, found in gradients.items()}


def _value(node: Node, point: Point) -> jax.ShapeDtypeStruct:
    return jax.eval_shape(lambda inputs: node.value(inputs, {}), list(point.inputs))


def _weighted(weights: Float[Array, "m k"], cotangent: Array, depth: int) -> Array:
    """The weighted sum over the losses of each example, in the cotangent's dtype."""
    m, k = weights.shape
    ones = [1] * (cotangent.ndim - 2 - depth)
    weights = weights.T.reshape(k, *[1] * depth, m, *ones)
    return (weights * cotangent).sum(0).astype(cotangent.dtype)


def _weighted_sum(weights: Float[Array, "m k"], gradients: Array) -> Array:
    rows = gradients.reshape(-1, *gradients.shape[2:])
    return _contract.combine(weights.ravel(), [rows])[0]


def _sum(arrays: Iterable[Array]) -> Array:
    first, *others = arrays
    for array in others:
        first = first + array
    return first


def _by(items: Iterable[int], key: Callable[[int], Hashable]) -> list[list[int]]:
    """Items of equal key, together."""
    groups: dict[Hashable, list[int]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())
