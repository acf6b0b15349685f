"""A table of how each parameter is treated, and what that costs."""

import dataclasses
from collections.abc import Sequence

import jax

from jaxjd.engine.structured import _contraction
from jaxjd.engine.structured._contraction import Cost
from jaxjd.engine.structured._plan import Group, Plan, extent, joint
from jaxjd.engine.structured._rules import Sizes

# The gradient with respect to an operand of these is as large as the result, so a rule
# would save nothing. A parameter that is perturbed in any other equation is a fallback.
ELEMENTWISE = {"add", "sub", "mul", "div", "add_any", "neg", "scan (carried)"}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter: its rule, contraction and cost for all m losses.

    `reason` says why its rows of the Jacobian are formed where no rule applies, and is
    empty where one does.
    """

    name: str
    shape: tuple[int, ...]
    rule: str
    contraction: str
    cost: Cost
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """One entry per parameter; `str` and `print` show it."""

    entries: tuple[Entry, ...]

    def __str__(self) -> str:
        table = [("parameter", "shape", "rule", "contraction", "MFLOP", "MB", "why")]
        for of in self.entries:
            shape = "x".join(map(str, of.shape)) or "scalar"
            costs = f"{of.cost.flops / 1e6:.3g}", f"{of.cost.bytes / 1e6:.3g}"
            table.append((of.name, shape, of.rule, of.contraction, *costs, of.reason))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(x.ljust(n) for x, n in zip(line, widths, strict=True)).rstrip()
            for line in table
        ]
        return "\n".join(lines)


def explain(plan: Plan, inputs: Sequence[jax.Array], names: Sequence[str]) -> Table:
    """Say for each parameter which rule it gets, and what its products will cost."""
    m = plan.function.num_examples(list(inputs)) or 1
    by_leaf = {
        leaf: (group, groups)
        for groups in plan.groups_of(plan.argnums)
        for group in groups
        for leaf in group.leaves
    }
    entries = []
    for leaf, name in zip(plan.argnums, names, strict=True):
        shape = inputs[leaf].shape
        if leaf not in by_leaf:
            entry = Entry(name, shape, "unused", "none", Cost(0, 0))
        else:
            entry = _entry(plan, *by_leaf[leaf], leaf, name, shape, m)
        entries.append(entry)
    return Table(tuple(entries))


def _entry(
    plan: Plan,
    group: Group,
    together: Sequence[Group],
    leaf: int,
    name: str,
    shape: tuple[int, ...],
    m: int,
) -> Entry:
    k = group.num_losses
    uses = [plan.uses[n] for n in group.uses if leaf in plan.uses[n].node.leaves]
    rules = dict.fromkeys(use.eqn.primitive.name for use in uses)
    reasons = sorted(plan.direct.get(leaf, ()))
    size = 1
    for n in shape:
        size *= n
    dense = Sizes(1, 0, 1, size)
    way = "rows"
    cost = _contraction.costs(dense, m, k, one_hot=False)[way]
    if uses:
        # Positions of all uses; in the form of the first if they differ.
        first = uses[0].bilinear
        positions = sum(extent(use).t for use in uses)
        sizes = dataclasses.replace(extent(uses[0]), t=positions)
        costs = _contraction.costs(sizes, m, k, first.one_hot)
        if group.uniform:
            # The choice is for all parameters that share this left factor together,
            # the cost is that of this one alone.
            of_all, one_hot = joint(plan, together)
            way = _contraction.choose(of_all, m, k, one_hot, group.choice)
        cost = costs[way]
    unruled = [reason for reason in reasons if reason not in ELEMENTWISE]
    rules |= dict.fromkeys(reason for reason in reasons if reason in ELEMENTWISE)
    rules |= {"dense": None} if unruled else {}
    reason = f"no rule for it in {', '.join(unruled)}" if unruled else ""
    return Entry(name, shape, " + ".join(rules), way, cost, reason)
