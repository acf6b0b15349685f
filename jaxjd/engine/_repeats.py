"""Evaluate a jaxpr whose parts repeat, as the layers of a network, as calls of one part.

Whatever JAX does with a function, it does once for each equation: batch it, linearise
it, transpose it, lower it. It does so only once for a function under `jax.jit` that is
called several times. So where the equations of a jaxpr repeat one after another, the
repeated part becomes such a function. XLA inlines the calls, so what it compiles is the
same, but the time until then no longer grows with every equation of every layer.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jaxtyping import Array

from jaxjd.engine import _jaxpr

# A call costs about as much as this many equations, so shorter parts stay as they are.
MIN_EQUATIONS = 8


class Part(NamedTuple):
    """Some equations of a jaxpr: a function of some of its variables to others."""

    call: Callable[..., list[Array]]
    inputs: list[Any]
    outputs: list[Any]


def evaluate(jaxpr: Any, operands: Sequence[Any]) -> list[Any]:
    """Evaluate a jaxpr on values for its constants, then its arguments."""
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), operands, strict=True))
    for part in parts(jaxpr):
        results = part.call(*[values[v] for v in part.inputs])
        values.update(zip(part.outputs, results, strict=True))
    return [v.val if _jaxpr.is_literal(v) else values[v] for v in jaxpr.outvars]


def parts(jaxpr: Any) -> list[Part]:
    """Cut a jaxpr into parts, those that are repeated and those between them."""
    eqns = jaxpr.eqns
    # The last equation to use each variable. The outputs of a jaxpr are used at its end.
    last = {v: n for n, eqn in enumerate(eqns) for v in _variables(eqn.invars)}
    last |= dict.fromkeys(_variables(jaxpr.outvars), len(eqns))

    def outputs(start: int, stop: int) -> list[tuple[int, int]]:
        """Which results of these equations others use: equation, and which result."""
        return [
            (n - start, index)
            for n in range(start, stop)
            for index, v in enumerate(eqns[n].outvars)
            if last.get(v, -1) >= stop
        ]

    found, first = [], 0
    for start, length, number in repeats(eqns):
        if first < start:
            found.append(_part(jaxpr, eqns[first:start], outputs(first, start)))
        first = start + length * number
        starts = range(start, first, length)
        # All repetitions return what others use of any of them.
        results = sorted({place for n in starts for place in outputs(n, n + length)})
        call = None
        for n in starts:
            part = _part(jaxpr, eqns[n : n + length], results)
            call = call or jax.jit(part.call)
            found.append(part._replace(call=call))
    if first < len(eqns):
        found.append(_part(jaxpr, eqns[first:], outputs(first, len(eqns))))
    return found


def _part(jaxpr: Any, eqns: Sequence[Any], results: Sequence[tuple[int, int]]) -> Part:
    inputs = _free(eqns)
    outputs = [eqns[n].outvars[index] for n, index in results]
    body = jaxpr.replace(constvars=[], invars=inputs, outvars=outputs, eqns=list(eqns))
    return Part(jaxpr_as_fun(ClosedJaxpr(body, [])), inputs, outputs)


def repeats(eqns: Sequence[Any]) -> Iterator[tuple[int, int, int]]:
    """Where equations repeat one after another.

    **Returns:** the first equation, how many are repeated, and how often they occur.
    """
    numbers: dict[Hashable, int] = {}
    kinds = [numbers.setdefault(_jaxpr.kind(eqn), len(numbers)) for eqn in eqns]
    places: dict[int, list[int]] = {}
    for n, of in enumerate(kinds):
        places.setdefault(of, []).append(n)
    start = 0
    while start < len(eqns):
        best = (start, 1, 1)
        for other in places[kinds[start]]:
            length = other - start
            if length < MIN_EQUATIONS:
                continue
            if start + 2 * length > len(eqns):
                break
            number = _repetitions(kinds, start, length)
            if number > 1 and number * length > best[1] * best[2]:
                best = (start, length, _connected_alike(eqns, start, length, number))
        _, length, number = best
        if number > 1:
            yield best
        start += length * number if number > 1 else 1


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
    """Where the operands of equations come from, whatever their variables are called."""
    sources: dict[Any, Hashable] = {}
    found = []
    for n, eqn in enumerate(eqns):
        variables = _variables(eqn.invars)
        found.append([sources.setdefault(v, len(sources)) for v in variables])
        sources.update((v, (n, index)) for index, v in enumerate(eqn.outvars))
    return found


def _free(eqns: Sequence[Any]) -> list[Any]:
    """The variables that equations use and do not compute, in the order of their use."""
    computed: set[Any] = set()
    free: dict[Any, None] = {}
    for eqn in eqns:
        free |= {v: None for v in _variables(eqn.invars) if v not in computed}
        computed.update(eqn.outvars)
    return list(free)


def _variables(atoms: Sequence[Any]) -> list[Any]:
    return [v for v in atoms if not _jaxpr.is_literal(v)]
