"""What must be known of JAX's internals.

Only this file looks at parameters of equations that differ between versions of JAX. It
uses nothing below `jax.extend.core`.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun
from jaxtyping import Array

# The names under which versions of JAX know equations that only call a jaxpr.
CALLS = {"jit", "pjit", "closed_call", "core_call"}
REMAT = {"remat2", "remat", "checkpoint"}


def is_literal(variable: Any) -> bool:
    return isinstance(variable, Literal)


def evaluate(jaxpr: Any, eqn: Any, operands: Sequence[Any]) -> list[Array]:
    """One equation of a jaxpr, applied to values for all its operands.

    It is evaluated as a jaxpr of this one equation, because only JAX knows how to bind
    each primitive: those with custom derivatives take functions besides operands.
    """
    values = {
        variable: value
        for variable, value in zip(eqn.invars, operands, strict=True)
        if not is_literal(variable)
    }
    single = jaxpr.replace(
        constvars=[], invars=list(values), outvars=eqn.outvars, eqns=[eqn]
    )
    return list(jaxpr_as_fun(ClosedJaxpr(single, []))(*values.values()))


def needed(jaxpr: Any, outputs: Sequence[Any]) -> tuple[Any, set[Any]]:
    """The part of a jaxpr that these of its variables depend on, with them as outputs.

    **Returns:** the jaxpr, with all the arguments of the given one, and the variables
    that occur in it.
    """
    used = {v for v in outputs if not is_literal(v)}
    eqns = []
    for eqn in reversed(jaxpr.eqns):
        if used.isdisjoint(eqn.outvars):
            continue
        eqns.append(eqn)
        used.update(v for v in eqn.invars if not is_literal(v))
    return jaxpr.replace(outvars=list(outputs), eqns=eqns[::-1]), used


def called(eqn: Any) -> tuple[Any, Sequence[Any]]:
    """The jaxpr that an equation calls (or scans, or rematerialises), its constants."""
    return opened(eqn.params.get("jaxpr") or eqn.params["call_jaxpr"])


def opened(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """A jaxpr and its constants, whether or not they came together."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def primitives(jaxpr: Any) -> set[str]:
    """The names of all primitives in a jaxpr, and in those that it contains."""
    found = set()
    for eqn in jaxpr.eqns:
        found.add(eqn.primitive.name)
        for value in jax.tree.leaves(eqn.params, is_leaf=is_jaxpr):
            if is_jaxpr(value):
                found |= primitives(opened(value)[0])
    return found


def is_jaxpr(value: Any) -> bool:
    return hasattr(getattr(value, "jaxpr", value), "eqns")


def scan_operands(eqn: Any) -> tuple[int, int]:
    """How many operands of a `scan` are constants, and how many are carried."""
    if "num_consts" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry, _ = eqn.params["ft_in"].unpack()
    return len(consts), len(carry)


def is_real(aval: Any) -> bool:
    return jnp.issubdtype(aval.dtype, jnp.floating)


def is_differentiable(aval: Any) -> bool:
    return hasattr(aval, "dtype") and jnp.issubdtype(aval.dtype, jnp.inexact)


def size(aval: Any) -> int:
    return math.prod(aval.shape)
