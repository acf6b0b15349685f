"""The derivative of a function of all losses, written down once for all of its uses.

One forward pass leaves a linear function behind, from tangents of the parameters to
those of the losses. Rows of the Jacobian, combinations of rows and pullbacks to values
inside of the function are transposes of it, or of parts of it, and share that forward
pass. XLA cannot be trusted to merge two: what it makes of an operation depends on what
else uses its result, and a pass whose values are kept has more uses than one that only
leads to the losses.

To find a value z that the function names in the linear part, the function computes
`z + ε` instead, with an argument ε = 0. The linear part then has one addition that
reads the tangent of ε. What it adds that to is the tangent of z.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxjd._sharding import in_mesh_of, varying, zeros_like
from jaxjd.engine import _jaxpr, _pieces, _repeats
from jaxjd.engine._function import LossFunction
from jaxjd.engine._perturb import perturbed

Pullback = Callable[[Sequence[Array]], list[Array]]

# The field of an operator that pytrees leave out. JAX takes a sequence of names; some
# versions, as 0.8, take one of sequences of names, and take a name for its letters.
DROPPED: Any = ("derivative", ("derivative",))


class Derivative(NamedTuple):
    """A function of all losses, linearised at some inputs.

    - `linear`: from the parameters at `argnums` and the perturbations of the named
      values to the pieces of the losses.
    - `names`, `values`: those of the named values that are real numbers, in the order
      in which they are computed.
    """

    linear: _pieces.Linear
    argnums: tuple[int, ...]
    names: tuple[str, ...]
    values: list[Array]

    def pullback(
        self, argnums: Sequence[int]
    ) -> Callable[[Float[Array, " m"]], tuple[Array, ...]]:
        """From weights of the losses to gradients of these parameters."""
        places = [self.argnums.index(i) for i in argnums]
        linear = self.of_losses(())

        def of_weights(weights: Float[Array, " m"]) -> tuple[Array, ...]:
            gradients = linear.transpose(self.in_pieces(weights))
            return tuple(gradients[n] for n in places)

        return of_weights

    def in_pieces(self, weights: Float[Array, " m"]) -> list[Float[Array, " k"]]:
        sizes = [value.size for value in self.linear.values]
        return jnp.split(weights, np.cumsum(sizes)[:-1])

    def of_losses(self, at: Collection[str]) -> _pieces.Linear:
        """From the parameters, and the values with these names, to the losses.

        As if these values were arguments, and so did not depend on parameters.
        """
        jaxpr, same, named = self._without_perturbations(at)
        number = len(self.argnums)
        chosen = [n for n, name in enumerate(self.names) if name in at]
        jaxpr = jaxpr.replace(
            invars=[*jaxpr.invars[:number], *(named[n].after for n in chosen)],
            outvars=[_instead(v, same) for v in jaxpr.outvars],
        )
        point = [*self.linear.point[:number], *(self.values[n] for n in chosen)]
        return self.linear._replace(jaxpr=jaxpr, point=point)

    def of_values(self, at: Collection[str]) -> Pullback:
        """From cotangents of the values with these names to gradients of parameters."""
        jaxpr, _, named = self._without_perturbations(())
        number = len(self.argnums)
        chosen = [n for n, name in enumerate(self.names) if name in at]
        known = [n for n in chosen if named[n].before is not None]
        linear = _pieces.Linear(
            jaxpr.replace(
                invars=jaxpr.invars[:number],
                outvars=[named[n].before for n in known],
            ),
            self.linear.consts,
            self.linear.point[:number],
            [self.values[n] for n in known],
        )

        def pull(cotangents: Sequence[Array]) -> list[Array]:
            given = dict(zip(chosen, cotangents, strict=True))
            return linear.transpose([given[n] for n in known])

        return pull

    def _without_perturbations(
        self, at: Collection[str]
    ) -> tuple[Any, dict[Any, Any], list["_Named"]]:
        """The jaxpr without the additions, and the variables that they were for.

        Of values with these names, it reads the tangent behind the addition. For all
        others, it is said in whose place to read which variable.
        """
        jaxpr = self.linear.jaxpr
        perturbations = jaxpr.invars[len(self.argnums) :]
        of = set(perturbations)
        readers = {
            v: eqn
            for eqn in jaxpr.eqns
            for v in eqn.invars
            if not _jaxpr.is_literal(v) and v in of
        }
        same: dict[Any, Any] = {}
        named = []
        for name, perturbation in zip(self.names, perturbations, strict=True):
            eqn = readers.get(perturbation)
            if eqn is None:  # No loss depends on this value.
                named.append(_Named(None, perturbation))
                continue
            (after,) = eqn.outvars
            (before,) = (v for v in eqn.invars if v is not perturbation)
            before = _instead(before, same)
            named.append(_Named(before, after))
            if name not in at:
                same[after] = before
        additions = set(map(id, readers.values()))
        eqns = [
            eqn.replace(invars=[_instead(v, same) for v in eqn.invars])
            for eqn in jaxpr.eqns
            if id(eqn) not in additions
        ]
        return jaxpr.replace(eqns=eqns), same, named


class _Named(NamedTuple):
    """The tangent of a named value before its perturbation is added, and after that."""

    before: Any
    after: Any


def _instead(variable: Any, same: dict[Any, Any]) -> Any:
    return variable if _jaxpr.is_literal(variable) else same.get(variable, variable)


def linearised(
    function: LossFunction, inputs: Sequence[Array], argnums: Sequence[int]
) -> tuple[Derivative, tuple[list[Array], list[Array]]]:
    """The derivative of a function of all losses, and its outputs."""
    found = [x for x in named_values(function.jaxpr) if _jaxpr.is_real(x[1])]
    names = tuple(name for name, _ in found)
    zeros = varying([zeros_like(aval) for _, aval in found], inputs)
    jaxpr, consts = function.jaxpr, []
    if names:
        closed = jax.make_jaxpr(lambda *x: _evaluate_perturbed(jaxpr, x))(
            list(inputs), zeros
        )
        jaxpr, consts = closed.jaxpr, closed.consts
    number = function.num_pieces

    def losses(point: tuple[list[Array], list[Array]]) -> tuple[list[Array], Any]:
        parameters, perturbations = point
        replaced = dict(zip(argnums, parameters, strict=True))
        current = [replaced.get(i, x) for i, x in enumerate(inputs)]
        outputs = _repeats.evaluate(jaxpr, [*consts, *current, *perturbations])
        last = len(outputs) - len(names)
        pieces, others = outputs[:number], outputs[number:last]
        aux = (function.leaves(pieces), others), outputs[last:]
        return function.vectors(pieces), aux

    point = [inputs[i] for i in argnums], zeros
    linear, (outputs, values) = _pieces.linearised(losses, point)
    return Derivative(linear, tuple(argnums), names, values), outputs


def named_values(jaxpr: Any) -> list[tuple[str, Any]]:
    """What `checkpoint_name` names in a jaxpr and in the functions that it calls.

    **Returns:** names and types, in the order in which the values are computed.
    """
    found: list[tuple[str, Any]] = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "name":
            found.append((eqn.params["name"], eqn.outvars[0].aval))
        elif eqn.primitive.name in _jaxpr.CALLS:
            found += named_values(_jaxpr.called(eqn)[0])
    return found


def _evaluate_perturbed(
    jaxpr: Any, operands: tuple[list[Array], list[Array]]
) -> tuple[list[Array], list[Array]]:
    """Evaluate a jaxpr with perturbed named values, and return these values too."""
    inputs, perturbations = operands
    given, named = iter(perturbations), []

    def name(value: Array) -> Array:
        if not _jaxpr.is_real(value):
            return value
        named.append(value)
        return perturbed(value, next(given))

    return _evaluate(jaxpr, inputs, name), named


def _evaluate(
    jaxpr: Any, operands: Sequence[Array], name: Callable[[Array], Array]
) -> list[Array]:
    """Evaluate a jaxpr, with a function applied to the values that it names."""
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), operands, strict=True))

    def read(variable: Any) -> Any:
        return variable.val if _jaxpr.is_literal(variable) else values[variable]

    for eqn in jaxpr.eqns:
        arguments = [read(v) for v in eqn.invars]
        if eqn.primitive.name == "name":
            with in_mesh_of(*arguments):
                results = [name(arguments[0])]
        elif _names_something(eqn):
            called, consts = _jaxpr.called(eqn)
            results = _evaluate(called, [*consts, *arguments], name)
        else:
            results = _jaxpr.evaluate(jaxpr, eqn, arguments)
        values.update(zip(eqn.outvars, results, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _names_something(eqn: Any) -> bool:
    if eqn.primitive.name not in _jaxpr.CALLS:
        return False
    return bool(named_values(_jaxpr.called(eqn)[0]))
