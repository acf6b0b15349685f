"""Split a function at values that it names, and pull losses back through them once.

The losses of a network with several heads share its features Z, which the user names by
`jax.ad_checkpoint.checkpoint_name`. The function is split there in two: the trunk,
from the parameters p to Z(p), and the heads, from Z and p to the losses L(Z, p). The
chain rule gives

    Jᵀ w = (∂L/∂p)ᵀ w + (∂Z/∂p)ᵀ (∂L/∂Z)ᵀ w,

so the losses are pulled back one by one to the features only. Through the trunk, which
is nearly all of the network, their combination goes, once.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jaxtyping import Array, Float

from jaxjd.engine import _jaxpr
from jaxjd.engine._function import LossFunction
from jaxjd.engine.dense import Dense, of_pieces, pullback_at


def names(jaxpr: Any) -> tuple[str, ...]:
    """What `checkpoint_name` names in a jaxpr and in the functions that it calls."""
    found: dict[str, None] = {}
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "name":
            found[eqn.params["name"]] = None
        elif eqn.primitive.name in _jaxpr.CALLS:
            found |= dict.fromkeys(names(_jaxpr.called(eqn)[0]))
    return tuple(found)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["inputs"],
    meta_fields=["function", "argnums"],
)
@dataclasses.dataclass(frozen=True)
class Named:
    """A function that names values, and the point where it is differentiated."""

    inputs: list[Array]
    function: LossFunction
    argnums: tuple[int, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return names(self.function.jaxpr)

    def restrict(self, kept: Sequence[int]) -> "Named":
        return dataclasses.replace(self, argnums=tuple(self.argnums[i] for i in kept))

    def split(self, at: Sequence[str]) -> "Split":
        """Evaluate the trunk, and pull each loss back to the features.

        **Raises:** `TypeError` if a feature is not a floating-point array.
        """
        features, pullback = pullback_at(_trunk(self, at), self.inputs, self.argnums)
        for feature in features:
            if not _jaxpr.is_real(feature):
                raise TypeError(
                    f"`features` must be floating-point arrays. Got {feature.dtype} "
                    f"among the values named {', '.join(map(repr, at))}."
                )
        heads = _heads(self, at, features)
        inputs = [*heads.consts, *self.inputs, *features]
        first = len(inputs) - len(features)
        places = tuple(range(first, len(inputs)))
        parameters = tuple(len(heads.consts) + i for i in self.argnums)
        # A parameter of one loss alone has one row, so it may be kept. For one of
        # several losses, a backward pass of their combination is cheaper.
        losses_of = heads.function.pieces(parameters).losses_of
        own = [n for n in range(len(parameters)) if losses_of(n) == 1]
        shared = [n for n in range(len(parameters)) if losses_of(n) > 1]
        kept = (*places, *(parameters[n] for n in own))
        rows, _ = of_pieces(heads.function, inputs, kept)

        def vjp(weights: Float[Array, " m"]) -> list[Array]:
            combined = rows.vjp(weights)
            total = list(pullback(combined[: len(features)]))
            for n, gradient in zip(own, combined[len(features) :], strict=True):
                total[n] += gradient
            if shared:
                _, of_heads = pullback_at(
                    heads.function.losses, inputs, [parameters[n] for n in shared]
                )
                gradients = of_heads(weights.astype(heads.function.loss_dtype))
                for n, gradient in zip(shared, gradients, strict=True):
                    total[n] += gradient
            return total

        return Split(rows.restrict(range(len(features))), vjp)


def named(
    function: LossFunction, inputs: list[Array], argnums: tuple[int, ...]
) -> Named | None:
    """The function and its point, if it names anything."""
    return Named(inputs, function, argnums) if names(function.jaxpr) else None


class Split(NamedTuple):
    """What is known of the losses when they are pulled back to the features.

    - `jacobian`: ∂L/∂Z, with one array per feature.
    - `vjp`: `Jᵀ w` for the parameters.
    """

    jacobian: Dense
    vjp: Callable[[Float[Array, " m"]], list[Array]]


class Heads(NamedTuple):
    """The losses as a function of `[*consts, *inputs, *features]`."""

    function: LossFunction
    consts: list[Array]


def _trunk(named: Named, at: Sequence[str]) -> Callable[[Sequence[Array]], list[Array]]:
    """The features as a function of the inputs."""

    def trunk(*inputs: Array) -> list[Array]:
        features: list[Array] = []

        def record(value: Array) -> Array:
            features.append(value)
            return value

        _evaluate(named.function.jaxpr, inputs, at, record)
        return features

    closed = jax.make_jaxpr(trunk)(*named.inputs)
    jaxpr, _ = _jaxpr.needed(closed.jaxpr, closed.jaxpr.outvars)
    call = jaxpr_as_fun(ClosedJaxpr(jaxpr, closed.consts))
    return lambda inputs: list(call(*inputs))


def _heads(named: Named, at: Sequence[str], features: Sequence[Array]) -> Heads:
    def heads(inputs: Sequence[Array], features: Sequence[Array]) -> list[Array]:
        given = iter(features)
        return _evaluate(named.function.jaxpr, inputs, at, lambda _: next(given))

    function = named.function
    closed = jax.make_jaxpr(heads)(named.inputs, list(features))
    losses = closed.jaxpr.outvars[: function.num_pieces]
    jaxpr, _ = _jaxpr.needed(closed.jaxpr, losses)
    split = dataclasses.replace(function, jaxpr=jaxpr, key=(function.key, tuple(at)))
    return Heads(split, [jnp.asarray(x) for x in closed.consts])


def _evaluate(
    jaxpr: Any,
    operands: Sequence[Array],
    at: Sequence[str],
    named: Callable[[Array], Array],
) -> list[Array]:
    """Evaluate a jaxpr, with a function applied to the values of these names."""
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), operands, strict=True))

    def read(variable: Any) -> Any:
        return variable.val if _jaxpr.is_literal(variable) else values[variable]

    for eqn in jaxpr.eqns:
        arguments = [read(v) for v in eqn.invars]
        if eqn.primitive.name == "name" and eqn.params["name"] in at:
            results = [named(arguments[0])]
        elif eqn.primitive.name in _jaxpr.CALLS:
            called, consts = _jaxpr.called(eqn)
            results = _evaluate(called, [*consts, *arguments], at, named)
        else:
            results = _jaxpr.evaluate(jaxpr, eqn, arguments)
        values.update(zip(eqn.outvars, results, strict=True))
    return [read(v) for v in jaxpr.outvars]
