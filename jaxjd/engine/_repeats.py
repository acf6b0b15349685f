"""Evaluate a jaxpr as calls of its parts, where parts repeat as layers do.

Whatever JAX does with a function, it does once for each equation: batch it, linearise
it, transpose it, lower it. It does so only once for a function under `jax.jit` that is
called several times. So where the equations of a jaxpr repeat one after another, the
repeated part becomes such a function. XLA inlines the calls, so what it compiles is the
same, but the time until then no longer grows with every equation of every layer.
"""

import functools
import itertools
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jaxtyping import Array

from jaxjd.engine import _jaxpr

# A call costs about as much as this many equations, so shorter parts stay as they are.
MIN_EQUATIONS = 8

Label = TypeVar("Label", bound=Hashable)


class Block:
    """A jaxpr without constants, equal to those that do the same: static under `jit`.

    So a step that is not under `jit` itself does not compile its layers each time.
    """

    def __init__(self, jaxpr: Any):
        self.jaxpr = jaxpr

    @functools.cached_property
    def key(self) -> Hashable:
        return _jaxpr.written(self.jaxpr, {})

    @functools.cached_property
    def key_hash(self) -> int:
        return hash(self.key)

    def __hash__(self) -> int:
        return self.key_hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Block) and self.key == other.key)


@functools.partial(jax.jit, static_argnums=0)
def repeated(block: Block, *operands: Array) -> list[Array]:
    return jaxpr_as_fun(ClosedJaxpr(block.jaxpr, []))(*operands)


class Part(NamedTuple):
    """Some equations of a jaxpr: a function of some of its variables to others."""

    block: Block
    inputs: list[Any]
    outputs: list[Any]
    is_called: bool = False

    @property
    def is_worth_a_call(self) -> bool:
        return len(self.block.jaxpr.eqns) >= MIN_EQUATIONS

    def __call__(self, *operands: Array) -> list[Array]:
        if self.is_called:
            return repeated(self.block, *operands)
        return jaxpr_as_fun(ClosedJaxpr(self.block.jaxpr, []))(*operands)


def evaluate(jaxpr: Any, operands: Sequence[Any]) -> list[Any]:
    """Evaluate a jaxpr on values for its constants, then its arguments."""
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), operands, strict=True))
    for part in parts(jaxpr):
        results = part(*[values[v] for v in part.inputs])
        values.update(zip(part.outputs, results, strict=True))
    return [v.val if _jaxpr.is_literal(v) else values[v] for v in jaxpr.outvars]


def parts(jaxpr: Any) -> list[Part]:
    """Cut a jaxpr into parts, those that are repeated and those between them."""
    outputs = _Outputs(jaxpr)
    found, first = [], 0
    for of in repeats(jaxpr.eqns):
        starts = of.starts
        # All repetitions return what others use of any of them.
        results = sorted({p for n in starts for p in outputs(n, n + of.length)})
        block = None
        for start in starts:
            if first < start:
                found.append(_part(jaxpr, first, start, outputs(first, start)))
            first = start + of.length
            part = _part(jaxpr, start, first, results)
            block = block or part.block
            found.append(part._replace(block=block, is_called=True))
    if first < len(jaxpr.eqns):
        stop = len(jaxpr.eqns)
        found.append(_part(jaxpr, first, stop, outputs(first, stop)))
    return found


def runs(jaxpr: Any, labels: Sequence[Label]) -> list[tuple[Label, Part]]:
    """Cut a jaxpr wherever the label of its equations changes."""
    outputs, found, first = _Outputs(jaxpr), [], 0
    for label, run in itertools.groupby(labels):
        stop = first + len(list(run))
        found.append((label, _part(jaxpr, first, stop, outputs(first, stop))))
        first = stop
    return found


class _Outputs:
    """Which results of some equations of a jaxpr other equations use, or its outputs.

    Each is the number of its equation among them, and the number of the result.
    """

    def __init__(self, jaxpr: Any):
        self.eqns = jaxpr.eqns
        # The last equation to use each variable.
        self.last = {
            v: n for n, eqn in enumerate(self.eqns) for v in _variables(eqn.invars)
        }
        self.last |= dict.fromkeys(_variables(jaxpr.outvars), len(self.eqns))

    def __call__(self, start: int, stop: int) -> list[tuple[int, int]]:
        return [
            (n - start, index)
            for n in range(start, stop)
            for index, v in enumerate(self.eqns[n].outvars)
            if self.last.get(v, -1) >= stop
        ]


def _part(
    jaxpr: Any, start: int, stop: int, results: Sequence[tuple[int, int]]
) -> Part:
    eqns = list(jaxpr.eqns[start:stop])
    inputs = _free(eqns)
    outputs = [eqns[n].outvars[index] for n, index in results]
    body = jaxpr.replace(constvars=[], invars=inputs, outvars=outputs, eqns=eqns)
    return Part(Block(body), inputs, outputs)


class Repeat(NamedTuple):
    """Equations that are repeated: from `start` on, `length` of every `stride`.

    Between two repetitions there may be equations that differ: those that take the
    labels of one task from those of all tasks.
    """

    start: int
    length: int
    stride: int
    number: int

    @property
    def starts(self) -> range:
        stop = self.start + self.stride * self.number
        return range(self.start, stop, self.stride)

    @property
    def stop(self) -> int:
        return self.starts[-1] + self.length


def repeats(eqns: Sequence[Any]) -> list[Repeat]:
    """What is repeated, in order: one after another where possible, else with gaps."""
    memo: _jaxpr.Memo = {}
    numbers: dict[Hashable, int] = {}
    kinds = [numbers.setdefault(_jaxpr.kind(eqn, memo), len(numbers)) for eqn in eqns]
    found, first = [], 0
    # The last one stands for the end.
    end = Repeat(len(eqns), 0, 1, 1)
    for of in [*_repeats(eqns, kinds, 0, len(eqns), gaps=False), end]:
        found += [*_repeats(eqns, kinds, first, of.start, gaps=True), of]
        first = of.stop
    return found[:-1]


def _repeats(
    eqns: Sequence[Any], kinds: Sequence[int], start: int, stop: int, gaps: bool
) -> Iterator[Repeat]:
    """The repeats from `start` to `stop`, from left to right, the longest of each."""
    places: dict[int, list[int]] = {}
    for n in range(start, stop):
        places.setdefault(kinds[n], []).append(n)
    while start < stop:
        best = Repeat(start, 1, 1, 1)
        for other in places[kinds[start]]:
            stride = other - start
            if stride < MIN_EQUATIONS:
                continue
            if not gaps and start + 2 * stride > stop:
                break
            found = _repeat(kinds, start, stride, stop, gaps)
            # The cheaper test first. Of two that cover as much, the shorter one.
            if _covered(found) > _covered(best):
                found = _connected_alike(eqns, found)
            if _covered(found) > _covered(best):
                best = found
        if best.number > 1:
            yield best
        start = best.stop


def _covered(found: Repeat) -> int:
    return found.number * found.length if found.number > 1 else 1


def _repeat(
    kinds: Sequence[int], start: int, stride: int, stop: int, gaps: bool
) -> Repeat:
    """What is repeated from `start` on at this distance, perhaps nothing."""
    end = start
    while end + stride < stop and kinds[end] == kinds[end + stride]:
        end += 1
    if end - start >= stride:
        return Repeat(start, stride, stride, 1 + (end - start) // stride)
    length, number = end - start, 1
    if gaps and length >= MIN_EQUATIONS:
        part = kinds[start:end]
        place = start + stride
        while place + length <= stop and kinds[place : place + length] == part:
            number, place = number + 1, place + stride
    return Repeat(start, length, stride, number)


def _connected_alike(eqns: Sequence[Any], found: Repeat) -> Repeat:
    """Those repetitions that pass values from equation to equation as the first."""
    first, *others = found.starts
    wanted = _connections(eqns[first : first + found.length])
    for n, place in enumerate(others, 1):
        if _connections(eqns[place : place + found.length]) != wanted:
            return found._replace(number=n)
    return found


def _connections(eqns: Sequence[Any]) -> list[list[Hashable]]:
    """Where operands come from, whatever the variables are called."""
    sources: dict[Any, Hashable] = {}
    found = []
    for n, eqn in enumerate(eqns):
        variables = _variables(eqn.invars)
        found.append([sources.setdefault(v, len(sources)) for v in variables])
        sources.update((v, (n, index)) for index, v in enumerate(eqn.outvars))
    return found


def _free(eqns: Sequence[Any]) -> list[Any]:
    """The variables that equations use and do not compute, in order of use."""
    computed: set[Any] = set()
    free: dict[Any, None] = {}
    for eqn in eqns:
        free |= {v: None for v in _variables(eqn.invars) if v not in computed}
        computed.update(eqn.outvars)
    return list(free)


def _variables(atoms: Sequence[Any]) -> list[Any]:
    return [v for v in atoms if not _jaxpr.is_literal(v)]
