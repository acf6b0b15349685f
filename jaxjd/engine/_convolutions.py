"""Per-example gradients of convolutions on a mesh, which XLA gets wrong.

If examples are spread over devices, XLA's partitioner computes the gradients of a
kernel, one for each example, from the wrong examples: `jax.vmap(jax.grad(loss))` is off
by as much as the gradients are large, and nothing says so. This is seen with JAX 0.7,
0.10 and 0.12. The gradient for all examples together is right, and so are products of
patches and cotangents, by which the structured method forms rows.
"""

import math
from collections.abc import Sequence

import jax
from jaxtyping import Array

from jaxjd._sharding import explicit_spec, mesh_of
from jaxjd.engine import _jaxpr
from jaxjd.engine._function import LossFunction

CONVOLUTION = "conv_general_dilated"


def are_wrong(function: LossFunction, inputs: Sequence[Array]) -> bool:
    """Whether rows must not be formed by backward passes for single examples."""
    on_mesh = function.axes is not None and mesh_of(list(inputs)) is not None
    return on_mesh and CONVOLUTION in _jaxpr.primitives(function.jaxpr)


def check_chunks(function: LossFunction, examples: Array, size: int) -> None:
    """**Raises:** `ValueError` if all devices would take the same examples of a chunk.

    On a mesh with several axes, XLA then also gets the gradient for all examples of a
    chunk wrong, unless the axes are Explicit.
    """
    mesh, spec = mesh_of(examples), explicit_spec(jax.typeof(examples))
    if (
        mesh is None
        or spec is not None
        or CONVOLUTION not in _jaxpr.primitives(function.jaxpr)
    ):
        return
    if sum(length > 1 for length in mesh.axis_sizes) > 1:
        raise ValueError(
            "`chunk_size` must be so large that each device has its share of the "
            f"examples of a chunk, a multiple of {math.prod(mesh.axis_sizes)}, or XLA "
            f"computes wrong gradients of convolutions. Got chunks of {size} examples."
        )


def check_rules(direct: dict[int, frozenset[str]], inputs: Sequence[Array]) -> None:
    """**Raises:** `NotImplementedError` if a convolution on a mesh has no rule."""
    without_rule = any(CONVOLUTION in reasons for reasons in direct.values())
    if without_rule and mesh_of(list(inputs)) is not None:
        raise NotImplementedError(
            "XLA computes wrong per-example gradients of convolutions on a mesh. jaxjd "
            "avoids them, but for this convolution it has no rule: a parameter is the "
            "image, or `batch_group_count` is not 1. Take the Jacobian inside "
            "`jax.shard_map`, or on one device."
        )
