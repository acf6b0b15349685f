"""What is computed once: a forward pass, and a backward pass per loss of an example.

The backward pass goes to the perturbations, not to the parameters. It yields the
cotangents of activations. The weight gradients, which an ordinary backward pass also
computes, are not formed.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxjd.engine.structured._plan import Plan, walk_through
from jaxjd.engine.structured._walk import Walk, perturb


class Pass(NamedTuple):
    """What the passes leave behind, for m examples of k losses each.

    - `recorded`: the other operands of the uses, [*levels, m, *shape].
    - `cotangents`: per use those of the results, [k, *levels, m, *shape].
    - `direct`: for each parameter that is perturbed itself its gradients, [m, k,
      *shape].
    """

    recorded: list[Array]
    cotangents: list[Array]
    direct: dict[int, Array]


def both_passes(
    plan: Plan, inputs: Sequence[Array]
) -> tuple[tuple[list[Array], list[Array]], Pass]:
    """The losses and the other outputs of all examples, and what the passes leave."""
    function = plan.function
    dtype = function.loss_dtype
    num_losses = function.losses_per_call

    def one(inputs):
        def outputs(perturbations, direct):
            walk = Walk(perturbations)
            perturbed = {n: perturb(inputs[n], direct[n]) for n in direct}
            losses, others = walk_through(
                function, plan.argnums, inputs, perturbed, walk
            )
            flat = jnp.concatenate([x.astype(dtype).ravel() for x in losses])
            return flat, ((losses, others), walk.recorded)

        zeros = [
            jnp.zeros(u.perturbation.shape, u.perturbation.dtype) for u in plan.uses
        ]
        direct = {n: jnp.zeros_like(inputs[n]) for n in plan.direct}
        flat, pullback, (values, recorded) = jax.vjp(
            outputs, zeros, direct, has_aux=True
        )
        # The cotangents of the losses are rows of the identity. A single loss needs no
        # axis for them; it is added below, where that moves nothing in memory.
        if num_losses == 1:
            gradients = pullback(jnp.ones_like(flat))
        else:
            gradients = jax.vmap(pullback)(jnp.eye(num_losses, dtype=dtype))
        return values, Pass(recorded, *gradients)

    # The axis of examples goes behind those of scans, where a scan under `vmap` leaves
    # it, so that nothing is moved in memory.
    depths = [len(use.levels) + (num_losses > 1) for use in plan.uses]
    axes: Any = plan.recorded_depths, depths, 0
    out_axes = 0, Pass(*axes)
    if function.axes is None:
        values, passes = jax.vmap(one, None, out_axes, axis_size=1)(list(inputs))
        values = jax.tree.map(lambda x: x[0], values)
    else:
        values, passes = jax.vmap(one, (list(function.axes),), out_axes)(list(inputs))
    if num_losses == 1:
        passes = Pass(
            passes.recorded,
            [x[None] for x in passes.cotangents],
            {n: x[:, None] for n, x in passes.direct.items()},
        )
    return values, passes
