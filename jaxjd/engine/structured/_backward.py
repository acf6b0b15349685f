"""What is computed once: a forward pass, and a backward pass per loss of an example.

The backward pass goes to the perturbations, not to the parameters. It yields the
cotangents of activations. The weight gradients, which an ordinary backward pass also
computes, are not formed.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxjd._sharding import varying, zeros_like
from jaxjd.engine import _pieces, _repeats
from jaxjd.engine._perturb import perturb
from jaxjd.engine.dense import concatenated_rows
from jaxjd.engine.structured._plan import Plan, walk_through
from jaxjd.engine.structured._walk import Walk


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["recorded", "cotangents", "direct"],
    meta_fields=["reached"],
)
@dataclasses.dataclass(frozen=True)
class Pass:
    """What the passes leave behind, for m examples of k losses each.

    - `recorded`: the other operands of the uses, [*levels, m, *shape].
    - `cotangents`: per use those of the results, [k, *levels, m, *shape].
    - `direct`: for each parameter that is perturbed itself its gradients, [m, k,
      *shape].
    - `reached`: per use, and per parameter in `direct`, which losses depend on it. The
      axis of losses, k, holds no others.
    """

    recorded: list[Array]
    cotangents: list[Array]
    direct: dict[int, Array]
    reached: tuple[tuple[int, ...], ...]

    def losses_of(self, uses: Iterable[int], leaves: Iterable[int]) -> tuple[int, ...]:
        """The losses that depend on any of some uses and parameters."""
        of_direct = dict(
            zip(self.direct, self.reached[len(self.cotangents) :], strict=True)
        )
        held = [self.reached[n] for n in uses]
        held += [of_direct[leaf] for leaf in leaves if leaf in of_direct]
        return tuple(sorted(set[int]().union(*held)))


def both_passes(
    plan: Plan, inputs: Sequence[Array]
) -> tuple[tuple[list[Array], list[Array]], Pass]:
    """The losses and the other outputs of all examples, and what the passes leave."""
    function = plan.function
    # There may be several arrays with one loss in all, if the others are empty.
    single = function.losses_per_call == function.num_pieces == 1

    def one(inputs):
        def walked(point, inputs):
            perturbations, direct = point
            walk = Walk(perturbations)
            perturbed = {n: perturb(inputs[n], direct[n]) for n in direct}
            losses, others = walk_through(
                function, plan.argnums, inputs, perturbed, walk
            )
            return losses, others, walk.recorded

        def outputs(point):
            flat = _repeats.evaluate(
                closed.jaxpr, [*closed.consts, *jax.tree.leaves((point, inputs))]
            )
            losses, others, recorded = jax.tree.unflatten(structure, flat)
            values = function.leaves(losses), others
            return function.vectors(losses), (values, recorded)

        zeros = [zeros_like(use.perturbation) for use in plan.uses]
        direct = {n: jnp.zeros_like(inputs[n]) for n in plan.direct}
        point = varying((zeros, direct), inputs)
        # The walk is written down, so that layers that repeat are linearised once.
        closed, shape = jax.make_jaxpr(walked, return_shape=True)(point, inputs)
        structure = jax.tree.structure(shape)
        if single:
            # The single loss gets its axis below, where that moves nothing in memory.
            (loss,), pullback, (values, recorded) = jax.vjp(
                outputs, point, has_aux=True
            )
            (gradients,) = pullback([jnp.ones_like(loss)])
            reached[:] = [(0,)] * len(jax.tree.leaves(point))
        else:
            linear, (values, recorded) = _pieces.linearised(outputs, point)
            rows = _pieces.rows(linear)
            sizes = [piece.num_losses for piece in function.pieces(plan.argnums).pieces]
            gradients, reached[:] = _joined(point, rows, sizes)
        return values, (recorded, *gradients)

    reached: list[tuple[int, ...]] = []
    # The axis of examples goes behind those of scans, where a scan under `vmap` leaves
    # it, so that nothing is moved in memory.
    depths = [len(use.levels) + (not single) for use in plan.uses]
    axes: Any = plan.recorded_depths, depths, 0
    if function.axes is None:
        values, passes = jax.vmap(one, None, (0, axes), axis_size=1)(list(inputs))
        values = jax.tree.map(lambda x: x[0], values)
    else:
        values, passes = jax.vmap(one, (list(function.axes),), (0, axes))(list(inputs))
    recorded, cotangents, direct = passes
    if single:
        cotangents = [x[None] for x in cotangents]
        direct = {n: x[:, None] for n, x in direct.items()}
    return values, Pass(recorded, cotangents, direct, tuple(reached))


def _joined(
    point: Any, rows: Sequence[Sequence[Array | None]], sizes: Sequence[int]
) -> tuple[Any, list[tuple[int, ...]]]:
    """The rows of all pieces, leaf by leaf, and which losses each leaf has rows of."""
    leaves, structure = jax.tree.flatten(point)
    joined, reached = [], []
    for n, leaf in enumerate(leaves):
        parts, held, first = [], [], 0
        for piece, size in zip(rows, sizes, strict=True):
            found = piece[n]
            if found is not None:
                parts.append(found)
                held.extend(range(first, first + size))
            first += size
        joined.append(concatenated_rows(parts, leaf))
        reached.append(tuple(held))
    return jax.tree.unflatten(structure, joined), reached
