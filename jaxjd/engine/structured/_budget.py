"""The largest chunk whose temporary arrays fit into a budget of memory.

An estimate from shapes, before anything is compiled: what the passes of one example
leave behind, what contractions form of it, and what does not depend on the chunk. XLA
frees and fuses more than it knows of, so what a step takes is nearly always less.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jaxtyping import Array

from jaxjd.engine import _jaxpr, _pieces
from jaxjd.engine.structured import _contraction
from jaxjd.engine.structured._estimate import ITEMSIZE, reach
from jaxjd.engine.structured._plan import Group, Plan, extent, joint

# XLA computes what these equations return where it is read, within another loop.
FUSED = _pieces.ELEMENTWISE | _pieces.RESHAPES | {"select_n", "gt", "ge", "lt", "le"}


class Fit(NamedTuple):
    """A `chunk_size`, None for all at once, and its estimate in bytes."""

    chunk_size: int | None
    memory: int


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How many numbers a plan holds, for one example or for all losses of the function.

    - `examples`: how many there are, or how many losses if the function returns all.
    - `losses`: k, how many losses an example has. 1 if it is a loss itself.
    - `activations`: that a forward pass leaves.
    - `cotangents`: that each loss leaves, at the uses of parameters.
    - `factors`: to which the activations are unfolded, as a convolution's are.
    - `parameters`: n.
    - `data`: of all examples.
    """

    examples: int
    losses: int
    activations: int
    cotangents: int
    factors: int
    parameters: int
    data: int


def sizes_of(plan: Plan, inputs: Sequence[Array]) -> Sizes:
    function = plan.function
    examples = function.num_examples(list(inputs))
    direct = sum(inputs[leaf].size for leaf in plan.direct)
    unfolded = 0
    for use in plan.uses:
        of = extent(use)
        unfolded += 0 if use.bilinear.one_hot else of.b * of.t * of.i
    axes = function.axes or (None,) * len(inputs)
    return Sizes(
        examples=function.losses_per_call if examples is None else examples,
        losses=1 if examples is None else function.losses_per_call,
        activations=activations(function.jaxpr),
        cotangents=sum(_jaxpr.size(use.perturbation) for use in plan.uses) + direct,
        factors=unfolded,
        parameters=sum(inputs[leaf].size for leaf in plan.argnums),
        data=sum(x.size for x, n in zip(inputs, axes, strict=True) if n is not None),
    )


def activations(jaxpr: Any) -> int:
    """How many numbers a function writes to memory on its way."""
    written = set()
    inside = 0
    for eqn in jaxpr.eqns:
        bodies = [
            _jaxpr.opened(value)[0]
            for value in jax.tree.leaves(eqn.params, is_leaf=_jaxpr.is_jaxpr)
            if _jaxpr.is_jaxpr(value)
        ]
        repeats = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        inside += sum(repeats * activations(body) for body in bodies)
        if bodies or eqn.primitive.name not in FUSED:
            written |= set(eqn.outvars)
            written |= {v for v in eqn.invars if not _jaxpr.is_literal(v)}
    written -= {*jaxpr.constvars, *jaxpr.invars}
    return inside + sum(_jaxpr.size(v.aval) for v in written)


def of_whole(plan: Plan, inputs: Sequence[Array], rows: bool) -> int:
    """The bytes of a step with everything in memory at once, with rows or without."""
    of = sizes_of(plan, inputs)
    m = of.examples * of.losses
    if plan.function.axes is None:
        # One forward pass, and for each loss the uses that it depends on.
        found = reach(plan).uses
        numbers = of.activations + sum(
            k * _jaxpr.size(use.perturbation)
            for k, use in zip(found, plan.uses, strict=True)
        )
        numbers += m * of.parameters if rows else contracted(plan, 1)
    elif rows:
        numbers = of.examples * (1 + of.losses) * of.activations + m * of.parameters
    else:
        left = of.activations + of.losses * of.cotangents + of.factors
        numbers = of.examples * left + contracted(plan, of.examples)
    return itemsize(plan) * (numbers + m * m + of.parameters)


def of_chunks(plan: Plan, inputs: Sequence[Array], rows: bool, size: int) -> int:
    """The bytes of a step with two blocks of so many examples in memory at once."""
    of = sizes_of(plan, inputs)
    m = of.examples * of.losses
    fixed = m * m + of.parameters + of.data
    if plan.function.axes is None:
        # One forward pass for all losses. Only one block is pulled back at a time.
        numbers = (1 + size) * of.activations + 2 * size * of.parameters
    elif rows:
        passes = (1 + of.losses) * of.activations
        numbers = size * passes + 2 * size * of.losses * of.parameters
    else:
        left = of.activations + of.losses * of.cotangents + of.factors
        numbers = 2 * size * left + contracted(plan, size)
    return itemsize(plan) * (numbers + fixed)


def largest_chunk(plan: Plan, inputs: Sequence[Array], rows: bool, memory: int) -> Fit:
    """All at once if it fits, or the largest chunk that does, or the smallest."""
    of = sizes_of(plan, inputs)
    whole = Fit(None, of_whole(plan, inputs, rows))
    # Blocks of half of the examples are no chunks any more.
    most = (of.examples - 1) // 2
    if whole.memory <= memory or most < 1:
        return whole
    least = 1
    while least < most:
        middle = (least + most + 1) // 2
        if of_chunks(plan, inputs, rows, middle) <= memory:
            least = middle
        else:
            most = middle - 1
    return Fit(2 * least * of.losses, of_chunks(plan, inputs, rows, least))


def contracted(plan: Plan, examples: int) -> int:
    """How many numbers the inner products of so many examples form on their way."""
    formed = largest = 0
    for together in plan.groups_of(plan.argnums):
        rows, others = _contracted(plan, together, examples)
        formed, largest = formed + rows, max(largest, others)
    return formed + largest


def _contracted(
    plan: Plan, together: Sequence[Group], examples: int
) -> tuple[int, int]:
    """The numbers of rows, which are kept for a while, and of all other products."""
    k = max(group.num_losses for group in together)
    variables = (*plan.function.jaxpr.constvars, *plan.function.jaxpr.invars)
    n = sum(_jaxpr.size(variables[i].aval) for group in together for i in group.leaves)
    if not together[0].uniform:
        return 2 * examples * k * n, 0
    of, one_hot = joint(plan, together)
    places, rows = examples * of.t, examples * k
    way = _contraction.choose(of, examples, k, one_hot, together[0].choice)
    if way == "rows":
        return 2 * rows * of.b * of.i * of.o, 0
    if way == "kernel":
        return 0, of.b * (places**2 + 2 * examples * rows * of.t * of.o)
    return 0, of.b * (places**2 + 2 * (rows * of.t) ** 2)


def itemsize(plan: Plan) -> int:
    """Bytes of a number. Sums are float32 or wider, whatever the activations are."""
    return max(ITEMSIZE, plan.function.loss_dtype.itemsize)
