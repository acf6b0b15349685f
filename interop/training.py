"""Compare 100 steps of training the same model with both libraries.

Both start from the same weights and see the same batches, with one loss per example and
UPGrad. Each difference of a Gramian, its weights or an update enters the next step.

A float32 run of jaxjd is compared with TorchJD's float64 run: with SGD it ends 1e-6 to
1e-5 from it. TorchJD's own float32 run is no reference: on some processors its CNN is
within 2e-7 of its own float64 run after 20 steps, and 5e-3 away from it after 100.
With Adam the runs are 7e-5 apart, because optax computes the bias corrections in
float32 and torch in float64. The float32 bounds leave a factor of at least ten for
processors and libraries that round in another order.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from jaxtyping import Array, Float, PyTree
from torchjd.aggregation import UPGradWeighting
from torchjd.autogram import Engine
from torchjd.linalg import QuadprogProjector

import jaxjd

from .bridge import to_torch
from .check import Check
from .models import Twins, cnn, mlp
from .precision import Precision, jax_precision
from .threads import one_thread
from .weights import EPS

NUM_STEPS = 100
NUM_EXAMPLES = 16


class Optimizer(NamedTuple):
    """The same optimizer in both frameworks."""

    name: str
    torch: Callable[..., torch.optim.Optimizer]
    optax: optax.GradientTransformation
    bounds: dict[Precision, float]


class Run(NamedTuple):
    """The losses of every step, and how far each parameter moved, in Flax's layout."""

    losses: Float[np.ndarray, "steps m"]
    moved: list[Float[np.ndarray, "..."]]


SGD = Optimizer(
    "SGD",
    functools.partial(torch.optim.SGD, lr=0.03),
    optax.sgd(0.03),
    {"float32": 1e-4, "float64": 1e-6},
)
ADAM = Optimizer(
    "Adam",
    functools.partial(torch.optim.Adam, lr=3e-3),
    optax.adam(3e-3),
    {"float32": 1e-3, "float64": 1e-6},
)


def checks() -> list[Check]:
    rows = []
    for make, optimizer, quick in (
        (mlp, SGD, True),
        (mlp, ADAM, False),
        (cnn, SGD, False),
    ):
        name = f"{make.__name__.upper()}, {optimizer.name}, {NUM_STEPS} steps"
        difference = functools.partial(run_difference, make=make, optimizer=optimizer)
        rows.append(Check("training", name, difference, optimizer.bounds, quick))
    return rows


def run_difference(
    precision: Precision, *, make: Callable[[Precision], Twins], optimizer: Optimizer
) -> float:
    """Return the `distance` of jaxjd's run from TorchJD's run in float64."""
    with jax_precision(precision):
        ours = jaxjd_run(make(precision), optimizer)
    with jax_precision("float64"), one_thread():
        theirs = torchjd_run(make("float64"), optimizer)
    return distance(ours, theirs)


def distance(run: Run, expected: Run) -> float:
    """The largest relative difference of the losses, or of the parameters' movement.

    The losses of a step are compared relative to the largest of them. The parameters
    are compared by how far each array moved in all, relative to that distance. Their
    own norm would hide differences, because most of it is the shared initialisation.
    """
    losses = np.abs(run.losses - expected.losses).max(axis=1)
    losses /= np.abs(expected.losses).max(axis=1)
    moved = [
        np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b)
        for a, b in zip(run.moved, expected.moved, strict=True)
    ]
    return float(max(losses.max(), *moved))


def jaxjd_run(twins: Twins, optimizer: Optimizer) -> Run:
    """Run all steps in one `jax.lax.scan`. Call it under `jax_precision`."""
    initial = twins.variables()
    batches = [
        twins.jax_batch(twins.batch(NUM_EXAMPLES, seed)) for seed in range(NUM_STEPS)
    ]
    tx = optax.chain(
        jaxjd.upgrad(norm_eps=EPS["norm_eps"], reg_eps=EPS["reg_eps"]), optimizer.optax
    )
    losses_and_jac = jaxjd.value_and_jac(twins.loss, in_axes=(None, 0, 0))

    def step(carry, batch):
        variables, state = carry
        jac: Any  # optax does not declare this type for updates.
        losses, jac = losses_and_jac(variables, *batch)
        updates, state = tx.update(jac, state, variables)
        return (optax.apply_updates(variables, updates), state), losses

    @jax.jit
    def run(variables, batches):
        (variables, _), losses = jax.lax.scan(
            step, (variables, tx.init(variables)), batches
        )
        return variables, losses

    final, losses = run(initial, jax.tree.map(lambda *x: jnp.stack(x), *batches))
    return Run(to_torch(losses).numpy(), displacement(final, initial))


def torchjd_run(twins: Twins, optimizer: Optimizer) -> Run:
    """Run the loop that TorchJD documents. Call it under `jax_precision`."""
    initial = twins.variables()
    model = twins.torch_model
    step = optimizer.torch(model.parameters())
    engine = Engine(model, batch_dim=0)
    weighting = UPGradWeighting(projector=QuadprogProjector(**EPS))
    history = []
    for seed in range(NUM_STEPS):
        losses = twins.torch_losses(twins.batch(NUM_EXAMPLES, seed))
        weights = weighting(engine.compute_gramian(losses))
        step.zero_grad()
        losses.backward(weights)
        step.step()
        history.append(losses.detach().numpy())
    return Run(np.stack(history), displacement(twins.variables(), initial))


def displacement(
    final: PyTree[Float[Array, "..."]], initial: PyTree[Float[Array, "..."]]
) -> list[Float[np.ndarray, "..."]]:
    difference = jax.tree.map(jnp.subtract, final, initial)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(difference)]
