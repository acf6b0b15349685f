"""What a function that returns all its losses would cost, with its rows and without.

Either way each loss is pulled back to the activations. Only what follows differs. With
rows, a weight gradient is formed per loss and use that it depends on, kept, multiplied
with the others and combined. Without, each group of parameters has its contraction, and
one weight gradient per use, whatever the number of losses.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from jaxjd.engine import _jaxpr
from jaxjd.engine.structured import _contraction
from jaxjd.engine.structured._contraction import Cost
from jaxjd.engine.structured._groups import REUSED_PER_KEPT
from jaxjd.engine.structured._plan import Group, Plan, extent, joint
from jaxjd.engine.structured._walk import Use

ITEMSIZE = 4
# Losses of one computation are pulled back in a loop on a CPU. An iteration takes some
# 2 µs whatever it computes.
FLOPS_PER_PASS = 100_000


class Estimate(NamedTuple):
    """`memory`: bytes that are kept until the weights are known."""

    cost: Cost
    memory: int


class Reach(NamedTuple):
    """How many losses depend on each use, and on each parameter."""

    uses: list[int]
    parameters: dict[int, int]


def reach(plan: Plan) -> Reach:
    jaxpr = plan.function.jaxpr
    pieces = plan.function.pieces(plan.argnums).pieces
    of_parameters = dict.fromkeys(plan.argnums, 0)
    of_equations: dict[int, int] = {}
    for piece, variable in zip(pieces, jaxpr.outvars, strict=False):
        for n in piece.parameters:
            of_parameters[plan.argnums[n]] += piece.num_losses
        for eqn in _jaxpr.needed(jaxpr, [variable])[0].eqns:
            before = of_equations.get(id(eqn), 0)
            of_equations[id(eqn)] = before + piece.num_losses

    def of_use(use: Use) -> int:
        # A use in the body of a loop is taken for one of every loss of its parameters.
        most = max(of_parameters[leaf] for leaf in use.node.leaves)
        return of_equations.get(id(use.eqn), most)

    return Reach([of_use(use) for use in plan.uses], of_parameters)


def with_rows(plan: Plan) -> Estimate:
    found = reach(plan)
    flops = sum(
        k * _weight_gradient(use) for k, use in zip(found.uses, plan.uses, strict=True)
    )
    sizes = _sizes(plan)
    kept = sum(k * sizes[leaf] for leaf, k in found.parameters.items())
    flops += sum(2 * (k + 1) * k * sizes[leaf] for leaf, k in found.parameters.items())
    moved = 3 * kept + _cotangents(plan, found.uses)
    # Each loss has a product of its own with what is recorded.
    read = zip(found.uses, plan.uses, strict=True)
    moved += sum(k * _recorded(use) for k, use in read)
    pieces = plan.function.pieces(plan.argnums).pieces
    passes = sum(piece.num_losses for piece in pieces if piece.num_losses > 1)
    flops += FLOPS_PER_PASS * passes
    return Estimate(Cost(flops, ITEMSIZE * moved), ITEMSIZE * kept)


def without_rows(plan: Plan) -> Estimate:
    found = reach(plan)
    sizes = _sizes(plan)
    flops = num_bytes = largest = kept = 0
    for together in plan.groups_of(plan.argnums):
        leaves = [leaf for group in together for leaf in group.leaves]
        k = max(found.parameters[leaf] for leaf in leaves)
        n = sum(sizes[leaf] for leaf in leaves)
        cost, in_rows = _contracted(plan, together, k, n)
        flops, num_bytes = flops + cost.flops, num_bytes + cost.bytes
        if in_rows and _reuses_rows(plan, together, k, n):
            kept += k * n
            continue
        largest = max(largest, k * n if in_rows else 0)
        uses = [plan.uses[i] for group in together for i in group.uses]
        flops += sum(map(_weight_gradient, uses))
        num_bytes += ITEMSIZE * sum(map(_recorded, uses))
    # One product with all losses needs them next to the outputs: the cotangents are
    # written and read once more.
    several = [k if k > 1 else 0 for k in found.uses]
    num_bytes += 2 * ITEMSIZE * _cotangents(plan, several)
    # A loop must write what all its iterations leave. A backward pass through the same
    # loop adds up weight gradients instead, and with `jax.checkpoint` records nothing.
    looped = [use for use in plan.uses if use.levels]
    num_bytes += 2 * ITEMSIZE * sum(map(_recorded, looped))
    in_loops = zip(found.uses, plan.uses, strict=True)
    left = [k if use.levels else 0 for k, use in in_loops]
    num_bytes += 2 * ITEMSIZE * _cotangents(plan, left)
    direct = sum(found.parameters[leaf] * sizes[leaf] for leaf in plan.direct)
    memory = ITEMSIZE * (_cotangents(plan, found.uses) + direct + kept + largest)
    return Estimate(Cost(flops, num_bytes), memory)


def _reuses_rows(plan: Plan, together: Sequence[Group], k: int, n: int) -> bool:
    """Whether the rows of n parameters are combined, as `_groups._reuses_rows` says."""
    uses = {i for group in together for i in group.uses}
    if not uses:
        return False
    recorded = {place: size for i in uses for place, size in _operands(plan.uses[i])}
    cotangents = sum(_jaxpr.size(plan.uses[i].perturbation) for i in uses)
    return k * n <= REUSED_PER_KEPT * (sum(recorded.values()) + k * cotangents)


def _operands(use: Use) -> list[tuple[int, int]]:
    """The other operands of a use: their places, and how many numbers are recorded."""
    avals = [v.aval for n, v in enumerate(use.eqn.invars) if n != use.operand]
    iterations = math.prod(level.length for level in use.levels)
    sizes = [iterations * _jaxpr.size(aval) for aval in avals]
    return list(zip(use.others, sizes, strict=True))


def _recorded(use: Use) -> int:
    return sum(size for _, size in _operands(use))


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
