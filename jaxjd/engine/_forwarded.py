"""Which outputs of a function are inputs that it hands through unchanged?"""

from typing import Any

from jaxjd.engine import _jaxpr


def forwarded(jaxpr: Any) -> list[int | None]:
    """For each output of a jaxpr the position of the input that it is, or None.

    Looks into functions that the jaxpr calls, as those of `jax.jit` and
    `jax.checkpoint`. None also where that cannot be told.
    """
    source: dict[Any, int] = {v: n for n, v in enumerate(jaxpr.invars)}
    for eqn in jaxpr.eqns:
        if eqn.primitive.name not in _jaxpr.CALLS | _jaxpr.REMAT:
            continue
        called, _ = _jaxpr.called(eqn)
        for variable, place in zip(eqn.outvars, forwarded(called), strict=True):
            operand = None if place is None else eqn.invars[place]
            if operand is None or _jaxpr.is_literal(operand):
                continue
            if operand in source:
                source[variable] = source[operand]
    return [
        None if _jaxpr.is_literal(variable) else source.get(variable)
        for variable in jaxpr.outvars
    ]
