"""Count the floating-point operations of a function, those in loops included."""

import math
from collections.abc import Callable
from typing import Any

import jax


def operations(function: Callable[..., Any], *args: Any) -> int:
    """Two for each multiplication and addition of a product, one for any other result.

    XLA's own count takes the body of a loop once, however often it runs.
    """
    return _of_jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def _of_jaxpr(jaxpr: Any) -> int:
    return sum(map(_of_equation, jaxpr.eqns))


def _of_equation(eqn: Any) -> int:
    name, size = eqn.primitive.name, sum(math.prod(v.aval.shape) for v in eqn.outvars)
    if name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        shape = eqn.invars[0].aval.shape
        return 2 * size * math.prod(shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel = eqn.invars[1].aval.shape
        out = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
        return 2 * size * math.prod(kernel) // out
    inner = [
        getattr(x, "jaxpr", x)
        for value in eqn.params.values()
        for x in (value if isinstance(value, tuple | list) else (value,))
        if hasattr(x, "eqns") or hasattr(x, "jaxpr")
    ]
    times = eqn.params["length"] if name == "scan" else 1
    return times * sum(map(_of_jaxpr, inner)) if inner else size
