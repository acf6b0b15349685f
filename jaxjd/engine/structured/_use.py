"""What one use of a parameter contributes to its gradients.

The rules are about one example and one iteration of a loop. Here their common form gets
the axes of examples, of losses, and of the scans around the use.

The layers of a network use their parameters in the same ways. What is done with arrays
is under `jax.jit` here, and depends on an `Action`, not on the use: so it is traced and
lowered for the first layer, and the others call it.
"""

import dataclasses
import math
from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any

import jax
from jaxtyping import Array

from jaxjd._sharding import varying, zeros_like
from jaxjd.engine import _jaxpr
from jaxjd.engine.structured import _contraction
from jaxjd.engine.structured._contraction import Factors
from jaxjd.engine.structured._rules import Bilinear
from jaxjd.engine.structured._walk import Use


@dataclasses.dataclass(frozen=True)
class Action:
    """What a use does to arrays, wherever these come from: static under `jit`.

    - `kind`: equal for equations that do the same. `jaxpr` consists of this equation.
    - `operand`: which operand of the equation the parameter is.
    - `sliced`: for each scan around the equation whether it slices the parameter.
    - `lengths`: those of the scans that do.
    """

    kind: Hashable
    operand: int
    sliced: tuple[bool, ...]
    lengths: tuple[int, ...]
    jaxpr: Any = dataclasses.field(compare=False)
    bilinear: Bilinear = dataclasses.field(compare=False)


def action(use: Use) -> Action:
    sliced = tuple(level in use.node.levels for level in use.levels)
    lengths = tuple(level.length for level in use.node.levels)
    # Nothing of the function but this equation, as JAX keeps what is static.
    jaxpr = _jaxpr.single(use.jaxpr, use.eqn)
    kind = _jaxpr.kind(use.eqn)
    return Action(kind, use.operand, sliced, lengths, jaxpr, use.bilinear)


@partial(jax.jit, static_argnums=0)
def factors(action: Action, recorded: Sequence[Array], cotangent: Array) -> Factors:
    """One use in the common form."""
    left, right = action.bilinear.left, action.bilinear.right
    for _ in ("example", *action.sliced):
        left, right = jax.vmap(left), jax.vmap(right)
    right = jax.vmap(right)  # Losses.
    return Factors(
        arranged(action, left(*recorded), 0),
        arranged(action, right(cotangent), 1),
        action.bilinear.sizes.i,
    )


def arranged(action: Action, array: Array, first: int) -> Array:
    """Bring the examples to the front, and the levels into the common form.

    The levels are the axes from `first` on, the examples the next. A scan that slices
    the parameter (stacked layers) makes more blocks b of it. One that uses the same
    parameter again and again (a recurrent layer) makes more positions t.
    """
    end = first + len(action.sliced)
    sliced = [n for n in range(first, end) if action.sliced[n - first]]
    repeated = [n for n in range(first, end) if n not in sliced]
    example, b, t = end, end + 1, end + 2
    rest = range(t + 1, array.ndim)
    array = array.transpose(example, *range(first), *sliced, b, *repeated, t, *rest)
    if not action.sliced:
        return array
    blocks = math.prod(array.shape[1 + first : 2 + first + len(sliced)])
    return array.reshape(*array.shape[: 1 + first], blocks, -1, *array.shape[t + 1 :])


@partial(jax.jit, static_argnums=0)
def gradients(action: Action, factors: Factors) -> Array:
    """The gradients of all examples and losses, each like the node's value."""
    blocks = _contraction.gradients(factors)
    blocks = blocks.reshape(factors.num_rows, *blocks.shape[2:])
    return jax.vmap(partial(gradient, action))(blocks)


@partial(jax.jit, static_argnums=0)
def gradient(action: Action, blocks: Array) -> Array:
    """An array like the node's value from `[b, i, o]` with the blocks of all levels."""
    sizes = action.bilinear.sizes
    split = blocks.reshape(*action.lengths, sizes.b, sizes.i, sizes.o)
    to_parameter = action.bilinear.layout.__call__
    for _ in action.lengths:
        to_parameter = jax.vmap(to_parameter)
    return to_parameter(split)


@partial(jax.jit, static_argnums=0)
def weighted_gradient(
    action: Action, recorded: Sequence[Array], cotangent: Array
) -> Array:
    """The sum over examples of the gradients of one use, like the node's value.

    `cotangent` is [*levels, m, *shape], weighted and summed over losses. It goes
    through the transpose of the equation itself: for a convolution that is much faster
    than the common form.
    """

    def apply(node, *others):
        operands = list(others)
        operands.insert(action.operand, node)
        (result,) = _jaxpr.evaluate(action.jaxpr, action.jaxpr.eqns[0], operands)
        return result

    levels = list(reversed(action.sliced))
    depth = len(levels)
    if cotangent.shape[depth] == 1:
        # Behind an axis of one example, XLA would transpose what it multiplies.
        recorded, cotangent = jax.tree.map(
            lambda x: jax.lax.squeeze(x, (depth,)), (list(recorded), cotangent)
        )
    else:  # The examples are mapped first, since their axis is the last.
        levels.insert(0, False)
    for sliced in levels:
        apply = jax.vmap(apply, (0 if sliced else None, *[0] * len(recorded)))
    aval = action.jaxpr.eqns[0].invars[action.operand].aval
    zeros = varying(zeros_like(aval, action.lengths), cotangent)
    _, pullback = jax.vjp(lambda node: apply(node, *recorded), zeros)
    return pullback(cotangent)[0]
