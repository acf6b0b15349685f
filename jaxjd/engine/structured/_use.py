"""What one use of a parameter contributes to its gradients.

The rules are about one example and one iteration of a loop. Here their common form gets
the axes of examples, of losses, and of the scans around the use.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
from jaxtyping import Array

from jaxjd._sharding import varying, zeros_like
from jaxjd.engine import _jaxpr
from jaxjd.engine.structured._contraction import Factors
from jaxjd.engine.structured._rules import Sizes
from jaxjd.engine.structured._walk import Use


def extent(use: Use) -> Sizes:
    """The sizes of the common form, with the iterations of all scans in them.

    Those of a scan that slices the parameter are blocks, those of others positions.
    """
    sizes = use.bilinear.sizes
    b, t = sizes.b, sizes.t
    for level in use.levels:
        if level in use.node.levels:
            b *= level.length
        else:
            t *= level.length
    return dataclasses.replace(sizes, b=b, t=t)


def factors(use: Use, recorded: Sequence[Array], cotangent: Array) -> Factors:
    """One use in the common form."""
    left, right = use.bilinear.left, use.bilinear.right
    for _ in ("example", *use.levels):
        left, right = jax.vmap(left), jax.vmap(right)
    right = jax.vmap(right)  # Losses.
    return Factors(
        arranged(use, left(*recorded), 0),
        arranged(use, right(cotangent), 1),
        use.bilinear.sizes.i,
    )


def arranged(use: Use, array: Array, first: int) -> Array:
    """Bring the examples to the front, and the levels into the common form.

    The levels are the axes from `first` on, the examples the next. A scan that slices
    the parameter (stacked layers) makes more blocks b of it. One that uses the same
    parameter again and again (a recurrent layer) makes more positions t.
    """
    end = first + len(use.levels)
    sliced = [n for n in range(first, end) if use.levels[n - first] in use.node.levels]
    repeated = [n for n in range(first, end) if n not in sliced]
    example, b, t = end, end + 1, end + 2
    rest = range(t + 1, array.ndim)
    array = array.transpose(example, *range(first), *sliced, b, *repeated, t, *rest)
    if not use.levels:
        return array
    blocks = math.prod(array.shape[1 + first : 2 + first + len(sliced)])
    return array.reshape(*array.shape[: 1 + first], blocks, -1, *array.shape[t + 1 :])


def gradient(use: Use, blocks: Array) -> Array:
    """An array like the node's value from `[b, i, o]` with the blocks of all levels."""
    lengths = [level.length for level in use.node.levels]
    sizes = use.bilinear.sizes
    split = blocks.reshape(*lengths, sizes.b, sizes.i, sizes.o)
    to_parameter = use.bilinear.layout.__call__
    for _ in lengths:
        to_parameter = jax.vmap(to_parameter)
    return to_parameter(split)


def weighted_gradient(
    use: Use, shape: jax.ShapeDtypeStruct, recorded: Sequence[Array], cotangent: Array
) -> Array:
    """The sum over examples of the gradients of one use, like the node's value.

    `cotangent` is [*levels, m, *shape], weighted and summed over losses. It goes
    through the transpose of the equation itself: for a convolution that is much faster
    than the common form.
    """

    def apply(node, *others):
        operands = list(others)
        operands.insert(use.operand, node)
        (result,) = _jaxpr.evaluate(use.jaxpr, use.eqn, operands)
        return result

    # The examples are mapped first (None is not a level), since their axis is the last.
    for level in (None, *reversed(use.levels)):
        axes = (0 if level in use.node.levels else None, *[0] * len(recorded))
        apply = jax.vmap(apply, axes)
    zeros = varying(zeros_like(shape), cotangent)
    _, pullback = jax.vjp(lambda node: apply(node, *recorded), zeros)
    return pullback(cotangent)[0]
