"""What does one use of a parameter contribute to its gradients?

The rules speak of one example and one iteration of a loop. Here their common form gets
the axes of examples, of losses, and of the scans around the use.
"""

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
    for _ in (*use.levels, "example"):
        left, right = jax.vmap(left), jax.vmap(right)
    right = jax.vmap(right, 1, 1)  # Losses.
    return Factors(
        arranged(use, left(*recorded), 1),
        arranged(use, right(cotangent), 2),
        use.bilinear.sizes.i,
    )


def arranged(use: Use, array: Array, start: int) -> Array:
    """Join the axes of levels, from `start`, to the axes of the common form.

    A scan that slices the parameter makes more blocks of it; one that uses the same
    parameter again makes more positions.
    """
    if not use.levels:
        return array
    of_levels = range(start, start + len(use.levels))
    sliced = [
        n for n, x in zip(of_levels, use.levels, strict=True) if x in use.node.levels
    ]
    shared = [n for n in of_levels if n not in sliced]
    b, t = start + len(use.levels), start + len(use.levels) + 1
    array = array.transpose(
        *range(start), *sliced, b, *shared, t, *range(t + 1, array.ndim)
    )
    kept = array.shape[t + 1 :]
    blocks = use.bilinear.sizes.b
    for n in range(len(sliced)):
        blocks *= array.shape[start + n]
    return array.reshape(*array.shape[:start], blocks, -1, *kept)


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

    `cotangent` is [m, *levels, *shape], weighted and summed over losses. The transpose
    of the equation itself does this best, be it a matrix product or a convolution.
    """

    def apply(node, *others):
        operands = list(others)
        operands.insert(use.operand, node)
        (result,) = _jaxpr.evaluate(use.jaxpr, use.eqn, operands)
        return result

    for level in reversed(use.levels):
        axes = (0 if level in use.node.levels else None, *[0] * len(recorded))
        apply = jax.vmap(apply, axes)
    apply = jax.vmap(apply, (None, *[0] * len(recorded)))
    zero = jnp.zeros(shape.shape, shape.dtype)
    _, pullback = jax.vjp(lambda node: apply(node, *recorded), zero)
    return pullback(cotangent)[0]
