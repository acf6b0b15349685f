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
    for start, length, number in repeats(jaxpr.eqns):
        if first < start:
            found.append(_part(jaxpr, first, start, outputs(first, start)))
        first = start + length * number
        starts = range(start, first, length)
        # All repetitions return what others use of any of them.
        results = sorted({place for n in starts for place in outputs(n, n + length)})
        repetitions = [_part(jaxpr, n, n + length, results) for n in starts]
        block = repetitions[0].block
        found += [part._replace(block=block, is_called=True) for part in repetitions]
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


def repeats(eqns: Sequence[Any]) -> Iterator[tuple[int, int, int]]:
    """Where equations repeat one after another.

    **Returns:** the first equation, how many are repeated, and how often they occur.
    """
    memo: _jaxpr.Memo = {}
    numbers: dict[Hashable, int] = {}
    kinds = [numbers.setdefault(_jaxpr.kind(eqn, memo), len(numbers)) for eqn in eqns]
    places: dict[int, list[int]] = {}
    for n, of in enumerate(kinds):
        places.setdefault(of, []).append(n)
    start = 0
    while start < len(eqns):
        length, number = 1, 1
        for other in places[kinds[start]]:
            longer = other - start
            if longer < MIN_EQUATIONS:
                continue
            if start + 2 * longer > len(eqns):
                break
            alike = _repetitions(kinds, start, longer)
            # The cheaper test first. Of two that cover as much, the shorter one.
            if alike > 1 and alike * longer > length * number:
                alike = _connected_alike(eqns, start, longer, alike)
            if alike > 1 and alike * longer > length * number:
                length, number = longer, alike
        if number > 1:
            yield start, length, number
        start += length * number


def _repetitions(kinds: Sequence[int], start: int, length: int) -> int:
    part, number = kinds[start : start + length], 1
    while kinds[start + number * length : start + (number + 1) * length] == part:
        number += 1
    return number


def _connected_alike(eqns: Sequence[Any], start: int, length: int, number: int) -> int:
    """How many repetitions pass values from equation to equation as the first does."""
    first = _connections(eqns[start : start + length])
    for n in range(1, number):
        place = start + n * length
        if _connections(eqns[place : place + length]) != first:
            return n
    return number


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
