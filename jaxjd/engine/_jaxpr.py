"""What must be known of JAX's internals.

Only this file looks at parameters of equations that differ between versions of JAX. It
uses nothing below `jax.extend.core`.
"""

import math
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun
from jaxtyping import Array

# The names under which versions of JAX know equations that only call a jaxpr.
CALLS = {"jit", "pjit", "closed_call", "core_call"}
REMAT = {"remat2", "remat", "checkpoint"}
CUSTOM_JVP = "custom_jvp_call"


def is_literal(variable: Any) -> bool:
    return isinstance(variable, Literal)


def evaluate(jaxpr: Any, eqn: Any, operands: Sequence[Any]) -> list[Array]:
    """One equation of a jaxpr, applied to values for all its operands.

    It is evaluated as a jaxpr of this one equation, because only JAX knows how to bind
    each primitive: those with custom derivatives take functions besides operands.
    """
    of = dict(zip(map(id, eqn.invars), operands, strict=True))
    jaxpr = single(jaxpr, eqn)
    values = [of[id(variable)] for variable in jaxpr.invars]
    return list(jaxpr_as_fun(ClosedJaxpr(jaxpr, []))(*values))


def single(jaxpr: Any, eqn: Any) -> Any:
    """A jaxpr of one of the equations of a jaxpr. Its arguments are the variables."""
    variables = dict.fromkeys(v for v in eqn.invars if not is_literal(v))
    return jaxpr.replace(
        constvars=[], invars=list(variables), outvars=eqn.outvars, eqns=[eqn]
    )


def needed(jaxpr: Any, outputs: Sequence[Any]) -> tuple[Any, set[Any]]:
    """The part of a jaxpr that these of its variables depend on, with them as outputs.

    **Returns:** the jaxpr, with all the arguments of the given one, and the variables
    that the outputs depend on. A call stays whole, whichever of its results are needed,
    so there may be other variables in the jaxpr.
    """
    used = {v for v in outputs if not is_literal(v)}
    eqns = []
    for eqn in reversed(jaxpr.eqns):
        if used.isdisjoint(eqn.outvars):
            continue
        eqns.append(eqn)
        used.update(v for v in _operands_of(eqn, used) if not is_literal(v))
    return jaxpr.replace(outvars=list(outputs), eqns=eqns[::-1]), used


def _operands_of(eqn: Any, used: set[Any]) -> list[Any]:
    """The operands that those results of an equation depend on that are used."""
    if eqn.primitive.name not in CALLS:
        return eqn.invars
    inner, _ = called(eqn)
    results = zip(eqn.outvars, inner.outvars, strict=True)
    _, inside = needed(inner, [within for result, within in results if result in used])
    operands = zip(eqn.invars, inner.invars, strict=True)
    return [operand for operand, within in operands if within in inside]


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


# For the id of a jaxpr, the jaxpr and what is equal for those that do the same.
Memo = dict[int, tuple[Any, Hashable]]


def kind(eqn: Any, memo: Memo | None = None) -> Hashable:
    """Equal for equations that do the same, to whatever operands.

    Those that cannot be compared, because of side effects or of a `jax.custom_vjp`, are
    equal to themselves only. `memo` is for many equations: functions that they share
    are looked at once.
    """
    if eqn.effects:
        return id(eqn)
    memo = {} if memo is None else memo
    params = dict(eqn.params)
    if eqn.primitive.name == CUSTOM_JVP:
        # A Python function. What it computes can be compared.
        params["jvp_jaxpr_fun"] = _rule(eqn, memo)
    # The first place of each operand, because one may be there twice.
    first: dict[int, int] = {}
    operands = tuple(
        (_literal(v) if is_literal(v) else v.aval, first.setdefault(id(v), n))
        for n, v in enumerate(eqn.invars)
    )
    results = tuple(v.aval for v in eqn.outvars)
    static = tuple((name, _static(params[name], memo)) for name in sorted(params))
    key = (eqn.primitive, operands, results, static, eqn.ctx)
    try:
        hash(key)
    except TypeError:
        return id(eqn)
    return key


def _rule(eqn: Any, memo: Memo) -> Hashable:
    """Equal for equations whose `jax.custom_jvp` rules compute the same tangents.

    Rules that cannot be compared are equal to themselves only.
    """
    jaxpr = single(called(eqn)[0], eqn)
    primals = [v.aval for v in jaxpr.invars]
    if eqn.params["symbolic_zeros"] or not all(map(is_real, primals)):
        return id(eqn)

    def tangents(primals: list[Array], tangents: list[Array]) -> list[Array]:
        function = jaxpr_as_fun(ClosedJaxpr(jaxpr, []))
        return list(jax.jvp(function, primals, tangents)[1])

    try:
        closed = jax.make_jaxpr(tangents)(primals, primals)
    except Exception:
        # A rule that closes over values of a trace that has ended cannot be evaluated.
        # That is no error as long as nobody differentiates the function.
        return id(eqn)
    found, _ = needed(closed.jaxpr, closed.jaxpr.outvars)
    if closed.consts or CUSTOM_JVP in primitives(found):
        return id(eqn)
    return written(found, memo)


def _literal(literal: Any) -> Hashable:
    # By its bytes, since a NaN is not equal to itself.
    return literal.aval, np.asarray(literal.val).tobytes()


def _static(param: Any, memo: Memo) -> Hashable:
    """A parameter of an equation, equal for functions that are written alike."""
    if isinstance(param, ClosedJaxpr):
        return written(param.jaxpr, memo), tuple(map(id, param.consts))
    if isinstance(param, Jaxpr):
        return written(param, memo)
    if isinstance(param, tuple | list):
        return tuple(_static(item, memo) for item in param)
    return param


def written(jaxpr: Any, memo: Memo) -> Hashable:
    """Equal for jaxprs that do the same. Of closed-over arrays it is the identity."""
    if id(jaxpr) not in memo:
        inputs = (*jaxpr.constvars, *jaxpr.invars)
        sources: dict[Any, Hashable] = {v: n for n, v in enumerate(inputs)}
        for n, eqn in enumerate(jaxpr.eqns):
            sources.update((v, (n, index)) for index, v in enumerate(eqn.outvars))

        def of(atoms: Sequence[Any]) -> tuple[Hashable, ...]:
            return tuple(_literal(v) if is_literal(v) else sources[v] for v in atoms)

        eqns = tuple((kind(eqn, memo), of(eqn.invars)) for eqn in jaxpr.eqns)
        avals = tuple(v.aval for v in inputs)
        memo[id(jaxpr)] = jaxpr, (avals, eqns, of(jaxpr.outvars))
    return memo[id(jaxpr)][1]
