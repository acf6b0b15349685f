"""What does one use of a parameter contribute to its gradients?

The rules speak of one example and one iteration of a loop. Here their common form gets
the axes of examples, of losses, and of the scans around the use.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxjd.engine.structured import _jaxpr
from jaxjd.engine.structured._contraction import Factors
from jaxjd.engine.structured._walk import Use


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
    """Examples to the front, and levels, from axis `first`, to the common form.

    A scan that slices the parameter makes more blocks of it; one that uses the same
    parameter again makes more positions.
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
    """From `[b, i, o]` with blocks of all levels to an array like the node's value."""
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

    `cotangent` is [*levels, m, *shape], weighted and summed over losses. The transpose
    of the equation itself does this best, be it a matrix product or a convolution.
    """

    def apply(node, *others):
        operands = list(others)
        operands.insert(use.operand, node)
        (result,) = _jaxpr.evaluate(use.jaxpr, use.eqn, operands)
        return result

    for level in (None, *reversed(use.levels)):  # None: examples.
        axes = (0 if level in use.node.levels else None, *[0] * len(recorded))
        apply = jax.vmap(apply, axes)
    zero = jnp.zeros(shape.shape, shape.dtype)
    _, pullback = jax.vjp(lambda node: apply(node, *recorded), zero)
    return pullback(cotangent)[0]
