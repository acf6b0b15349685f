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
from typing import NamedTuple

import jax
from jaxtyping import Array, Float

from jaxjd.engine import _jaxpr
from jaxjd.engine._derivative import DROPPED, Derivative, linearised, named_values
from jaxjd.engine._function import LossFunction
from jaxjd.engine.dense import Dense, in_memory


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["inputs"],
    meta_fields=["function", "argnums"],
    drop_fields=DROPPED,
)
@dataclasses.dataclass(frozen=True)
class Named:
    """A function that names values, and the point where it is differentiated.

    `derivative` is as that of [`Chunked`][].
    """

    inputs: list[Array]
    function: LossFunction
    argnums: tuple[int, ...]
    derivative: Derivative | None = None

    @property
    def names(self) -> tuple[str, ...]:
        found = named_values(self.function.jaxpr)
        return tuple(dict.fromkeys(name for name, _ in found))

    def restrict(self, kept: Sequence[int]) -> "Named":
        return dataclasses.replace(self, argnums=tuple(self.argnums[i] for i in kept))

    def split(self, at: Sequence[str]) -> "Split":
        """Pull each loss back to the features.

        **Raises:** `TypeError` if a feature is not a floating-point array.
        """
        for name, aval in named_values(self.function.jaxpr):
            if name in at and not _jaxpr.is_real(aval):
                raise TypeError(
                    f"`features` must be floating-point arrays. Got {aval.dtype} among "
                    f"the values named {', '.join(map(repr, at))}."
                )
        derivative = self.derivative
        if derivative is None:
            derivative, _ = linearised(self.function, self.inputs, self.argnums)
        heads, pullback = derivative.of_losses(at), derivative.of_values(at)
        rows, number = in_memory(heads), len(derivative.argnums)
        asked = [derivative.argnums.index(i) for i in self.argnums]
        # A parameter of one loss alone has one row, so it may be kept. For one of
        # several losses, a backward pass of their combination is cheaper.
        own = [n for n in asked if len(rows.places[n]) == 1]
        shared = [n for n in asked if len(rows.places[n]) > 1]
        of_features = rows.restrict(range(number, len(rows.leaves)))
        of_own = rows.restrict(own)

        def vjp(weights: Float[Array, " m"]) -> list[Array]:
            total = pullback(of_features.vjp(weights))
            for n, gradient in zip(own, of_own.vjp(weights), strict=True):
                total[n] += gradient
            if shared:
                gradients = heads.transpose(derivative.in_pieces(weights))
                for n in shared:
                    total[n] += gradients[n]
            return [total[n] for n in asked]

        return Split(of_features, vjp)


def named(
    function: LossFunction,
    inputs: list[Array],
    argnums: tuple[int, ...],
    derivative: Derivative | None,
) -> Named | None:
    """The function and its point, if it names anything."""
    if not named_values(function.jaxpr):
        return None
    return Named(inputs, function, argnums, derivative)


class Split(NamedTuple):
    """What is known of the losses when they are pulled back to the features.

    - `jacobian`: ∂L/∂Z, with one array per feature.
    - `vjp`: `Jᵀ w` for the parameters.
    """

    jacobian: Dense
    vjp: Callable[[Float[Array, " m"]], list[Array]]
