"""What a function that returns all its losses would cost, with its rows and without.

Either way each loss is pulled back to the activations. Only what follows differs. With
rows, a weight gradient is formed per loss and use that it depends on, kept, multiplied
with the others and combined. Without, each group of parameters has its contraction, and
one weight gradient per use, whatever the number of losses.
"""

from collections.abc import Sequence
from typing import NamedTuple

from jaxjd.engine import _jaxpr
from jaxjd.engine.structured import _contraction
from jaxjd.engine.structured._contraction import Cost
from jaxjd.engine.structured._plan import Group, Plan, extent, joint
from jaxjd.engine.structured._walk import Use

ITEMSIZE = 4


class Estimate(NamedTuple):
    """`memory`: bytes that are kept until the weights are known."""

    cost: Cost
    memory: int


class Reach(NamedTuple):
    """How many losses depend on each use, and on each parameter.

    `batched`: of those on each use, how many come out of one computation with others.
    """

    uses: list[int]
    batched: list[int]
    parameters: dict[int, int]


def reach(plan: Plan) -> Reach:
    jaxpr = plan.function.jaxpr
    pieces = plan.function.pieces(plan.argnums).pieces
    of_parameters = {leaf: _Count() for leaf in plan.argnums}
    of_equations: dict[int, _Count] = {}
    for piece, variable in zip(pieces, jaxpr.outvars, strict=False):
        for n in piece.parameters:
            leaf = plan.argnums[n]
            of_parameters[leaf] = of_parameters[leaf].plus(piece.num_losses)
        for eqn in _jaxpr.needed(jaxpr, [variable])[0].eqns:
            before = of_equations.get(id(eqn), _Count())
            of_equations[id(eqn)] = before.plus(piece.num_losses)

    def of_use(use: Use) -> _Count:
        # A use in the body of a loop is taken for one of every loss of its parameters.
        most = max(of_parameters[leaf] for leaf in use.node.leaves)
        return of_equations.get(id(use.eqn), most)

    uses = [of_use(use) for use in plan.uses]
    return Reach(
        [count.losses for count in uses],
        [count.batched for count in uses],
        {leaf: count.losses for leaf, count in of_parameters.items()},
    )


class _Count(NamedTuple):
    losses: int = 0
    batched: int = 0

    def plus(self, num_losses: int) -> "_Count":
        batched = num_losses if num_losses > 1 else 0
        return _Count(self.losses + num_losses, self.batched + batched)


def with_rows(plan: Plan) -> Estimate:
    found = reach(plan)
    flops = sum(
        k * _weight_gradient(use) for k, use in zip(found.uses, plan.uses, strict=True)
    )
    sizes = _sizes(plan)
    kept = sum(k * sizes[leaf] for leaf, k in found.parameters.items())
    flops += sum(2 * (k + 1) * k * sizes[leaf] for leaf, k in found.parameters.items())
    moved = 3 * kept + _cotangents(plan, found.uses)
    # A batch of weight gradients is one product, once the losses have been moved next
    # to the outputs: the cotangents are written and read once more.
    moved += 2 * _cotangents(plan, found.batched)
    return Estimate(Cost(flops, ITEMSIZE * moved), ITEMSIZE * kept)


def without_rows(plan: Plan) -> Estimate:
    found = reach(plan)
    sizes = _sizes(plan)
    flops = num_bytes = largest = 0
    for together in plan.groups_of(plan.argnums):
        leaves = [leaf for group in together for leaf in group.leaves]
        k = max(found.parameters[leaf] for leaf in leaves)
        n = sum(sizes[leaf] for leaf in leaves)
        cost, in_rows = _contracted(plan, together, k, n)
        flops, num_bytes = flops + cost.flops, num_bytes + cost.bytes
        largest = max(largest, k * n if in_rows else 0)
    flops += sum(_weight_gradient(use) for use in plan.uses)
    direct = sum(found.parameters[leaf] * sizes[leaf] for leaf in plan.direct)
    memory = ITEMSIZE * (_cotangents(plan, found.uses) + direct + largest)
    return Estimate(Cost(flops, num_bytes), memory)


def _cotangents(plan: Plan, losses: Sequence[int]) -> int:
    """How many numbers reach the uses, from so many losses at each."""
    sizes = (_jaxpr.size(use.perturbation) for use in plan.uses)
    return sum(k * size for k, size in zip(losses, sizes, strict=True))


def _contracted(
    plan: Plan, together: Sequence[Group], k: int, n: int
) -> tuple[Cost, bool]:
    """The inner products of n parameters for k losses, and whether rows are formed."""
    uses = [plan.uses[i] for group in together for i in group.uses]
    if not together[0].uniform:
        # All k losses go through each use, those that do not depend on it as zeros.
        flops = sum(k * _weight_gradient(use) for use in uses) + 2 * k * k * n
        return Cost(flops, 3 * ITEMSIZE * k * n), True
    form, one_hot = joint(plan, together)
    way = _contraction.choose(form, 1, k, one_hot, together[0].choice)
    return _contraction.costs(form, 1, k, one_hot)[way], way == "rows"


def _weight_gradient(use: Use) -> int:
    """The operations of the gradient of one loss through one use."""
    sizes = extent(use)
    inputs = 1 if use.bilinear.one_hot else sizes.i
    return 2 * sizes.b * sizes.t * inputs * sizes.o


def _sizes(plan: Plan) -> dict[int, int]:
    variables = (*plan.function.jaxpr.constvars, *plan.function.jaxpr.invars)
    return {leaf: _jaxpr.size(variables[leaf].aval) for leaf in plan.argnums}
