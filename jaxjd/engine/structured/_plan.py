"""Which uses belong together, and how each group of them may be contracted.

A walk finds the uses of parameters. The gradients of all uses of a parameter add up
before any inner product, so uses are grouped by the parameters that they lead to. A
group whose uses all have the same form is contracted in this form, together with the
groups that share its left factor and its losses. For any other group the gradients of
its parameters are formed.
"""

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any

from jaxjd.engine._function import LossFunction
from jaxjd.engine._pieces import Piece
from jaxjd.engine.structured import _node
from jaxjd.engine.structured._contraction import Choice
from jaxjd.engine.structured._rules import Sizes
from jaxjd.engine.structured._walk import Use, Value, Walk, explore


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Parameters that are linked by a use: nearly always a single one.

    - `leaves`: positions of parameters among the inputs.
    - `uses`: positions among the uses of the plan.
    - `uniform`: whether all uses have the same form, and the inner products in it are
      those of the gradients. There is one parameter then.
    - `choice`: the contraction that the user wants for a uniform group.
    - `num_losses`: how many losses of one call depend on these parameters, at most.
    - `left`: equal for uniform groups that are contracted together, because their left
      factors, their choices and the losses that depend on them are equal. With other
      losses, one group would be filled up with zeros for those of the other.
    """

    leaves: tuple[int, ...]
    uses: tuple[int, ...]
    uniform: bool
    choice: Choice
    num_losses: int
    left: Hashable


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """What is known of a function before its inputs are: static under `jit`.

    - `choices`: for each parameter the contraction that the user wants.
    - `direct`: for each parameter that is perturbed itself, in which primitives.
    """

    function: LossFunction
    argnums: tuple[int, ...]
    choices: tuple[Choice, ...]
    uses: tuple[Use, ...]
    direct: dict[int, frozenset[str]]
    groups: tuple[Group, ...]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan):
            return NotImplemented
        return self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> Hashable:
        # Everything else follows from these.
        return self.function, self.argnums, self.choices

    @property
    def recorded_depths(self) -> list[int]:
        """In how many scans each of the recorded operands is."""
        depths = {n: len(use.levels) for use in self.uses for n in use.others}
        return [depths[n] for n in sorted(depths)]

    def groups_of(self, leaves: Sequence[int]) -> list[list[Group]]:
        """The groups of these parameters, those that are contracted together."""
        together: dict[Hashable, list[Group]] = {}
        for group in self.groups:
            if set(leaves) & set(group.leaves):
                together.setdefault(group.left, []).append(group)
        return list(together.values())


def walk_through(
    function: LossFunction,
    argnums: Sequence[int],
    inputs: Sequence[Any],
    perturbed: dict[int, Any],
    walk: Walk,
) -> tuple[list[Any], list[Any]]:
    """One walk through the function of one example: its losses, its other outputs."""
    values = []
    parameters = {position: n for n, position in enumerate(argnums)}
    for position, array in enumerate(inputs):
        parameter = parameters.get(position)
        # For a function of all losses, everything but the parameters is one example.
        shared = function.axes is not None and function.axes[position] is None
        node = None
        if parameter is not None or shared:
            node = _node.input_node(position, parameter)
        values.append(Value(array, node, perturbed.get(position, array)))
    outputs = walk.run(function.jaxpr, values)
    losses = [walk.perturbed_array(v, "a loss") for v in outputs[: function.num_pieces]]
    return losses, [v.array for v in outputs[function.num_pieces :]]


def plan(
    function: LossFunction,
    argnums: Sequence[int],
    choices: Sequence[Choice] | None = None,
) -> Plan:
    """Find the uses of parameters, by a walk that evaluates nothing.

    **Arguments:**

    - `argnums`: the positions of the differentiated parameters among the inputs.
    - `choices`: for each of them the contraction wanted; by default "auto".
    """
    if choices is None:
        choices = ("auto",) * len(argnums)
    inputs = [v.aval for v in (*function.jaxpr.constvars, *function.jaxpr.invars)]
    uses, _, found_direct = explore(
        lambda walk: walk_through(function, argnums, inputs, {}, walk), ()
    )
    direct = {leaf: frozenset(reasons) for leaf, reasons in found_direct.items()}
    choice_of = dict(zip(argnums, choices, strict=True))
    pieces: dict[int, set[Piece]] = {leaf: set() for leaf in argnums}
    for piece in function.pieces(argnums).pieces:
        for n in piece.parameters:
            pieces[argnums[n]].add(piece)
    groups = group(choice_of, uses, direct, pieces)
    return Plan(function, tuple(argnums), tuple(choices), tuple(uses), direct, groups)


def group(
    choice_of: dict[int, Choice],
    uses: Sequence[Use],
    direct: dict[int, frozenset[str]],
    pieces: dict[int, set[Piece]],
) -> tuple[Group, ...]:
    linked = [{leaf} for leaf in choice_of]
    for use in uses:
        touched = [leaves for leaves in linked if leaves & use.node.leaves]
        linked = [leaves for leaves in linked if not leaves & use.node.leaves]
        linked.append(set().union(*touched))
    groups = []
    for leaves in linked:
        found = tuple(n for n, use in enumerate(uses) if use.node.leaves & leaves)
        if not found and not leaves & direct.keys():
            continue  # No example depends on these.
        forms = {form(uses[n]) for n in found}
        uniform = (
            len(forms) == 1
            and not leaves & direct.keys()
            and uses[found[0]].node.is_isometric
        )
        choice = choice_of[min(leaves)]
        readings = tuple(reading(uses[n]) for n in found)
        reached = frozenset[Piece]().union(*(pieces[leaf] for leaf in leaves))
        num_losses = sum(piece.num_losses for piece in reached)
        left = (choice, reached, readings) if uniform else object()
        groups.append(
            Group(tuple(sorted(leaves)), found, uniform, choice, num_losses, left)
        )
    return tuple(sorted(groups, key=lambda group: group.leaves))


def form(use: Use) -> Any:
    """Equal for uses whose factors may be joined."""
    # Layouts alone are not enough: a matrix looked up by rows, and one looked up by
    # entries, are laid out alike.
    sizes = dataclasses.replace(use.bilinear.sizes, t=0)
    return use.node.key, use.bilinear.layout, sizes, use.bilinear.one_hot


def reading(use: Use) -> Hashable:
    """Equal for uses with equal left factors, and right ones of the same dtype."""
    if use.bilinear.reading is None:
        return use
    sliced = tuple(level in use.node.levels for level in use.levels)
    return use.bilinear.reading, use.others, sliced, use.perturbation.dtype


def extent(use: Use) -> Sizes:
    """The sizes of the common form, with the iterations of all scans in them.

    Those of a scan that slices the parameter are blocks, those of others positions.
    """
    sizes = use.bilinear.sizes
    b, t = sizes.b, sizes.t
    for level in use.levels:
        if level in use.node.levels:
            b *= level.length
        else:
            t *= level.length
    return dataclasses.replace(sizes, b=b, t=t)


def joint(plan: Plan, groups: Sequence[Group]) -> tuple[Sizes, bool]:
    """The common form of uniform groups that are contracted together, as one.

    **Returns:** its sizes, and whether its left factor is one-hot.
    """
    firsts = [plan.uses[group.uses[0]] for group in groups]
    positions = sum(extent(plan.uses[n]).t for n in groups[0].uses)
    outputs = sum(use.bilinear.sizes.o for use in firsts)
    sizes = dataclasses.replace(extent(firsts[0]), t=positions, o=outputs)
    return sizes, firsts[0].bilinear.one_hot
