"""Do both libraries train the same model alike?

The same initial weights, the same batches, one loss per example, UPGrad: 100 steps, in
which each difference, of a Gramian, of its weights, of an update, enters the next.

Two programs in float32 round differently, and the steps that follow enlarge that. The
scale for what can be asked is how far TorchJD's own float32 run ends from its own
float64 run: 2e-6 to 5e-6 in these runs. With SGD the libraries are 4e-7 to 1e-5 apart,
with Adam 5e-5: optax computes Adam's bias corrections in float32, torch in float64, and
with torch's in float32 TorchJD's own two runs are 3e-5 apart. The bounds of float32
leave a factor of ten and more for processors and libraries that round in another order.
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
    """The losses of every step, and how far the parameters went, as Flax has them."""

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
    """How far apart the two runs are: `distance` of jaxjd's from TorchJD's."""
    with jax_precision(precision):
        ours = jaxjd_run(make(precision), optimizer)
        with one_thread():
            theirs = torchjd_run(make(precision), optimizer)
    return distance(ours, theirs)


def distance(run: Run, expected: Run) -> float:
    """The largest relative difference of the losses of a step, and of the parameters.

    The losses of a step are relative to the largest of them; how far each array of
    parameters moved in all is relative to the norm of that, not to the norm of the
    parameters, most of which is the initialisation that both share.
    """
    losses = np.abs(run.losses - expected.losses).max(axis=1)
    losses /= np.abs(expected.losses).max(axis=1)
    moved = [
        np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b)
        for a, b in zip(run.moved, expected.moved, strict=True)
    ]
    return float(max(losses.max(), *moved))


def jaxjd_run(twins: Twins, optimizer: Optimizer) -> Run:
    """All steps as one `jax.lax.scan`. Call it under `jax_precision`."""
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
        jac: Any  # Not among the types that optax declares for updates.
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
    """The loop that TorchJD documents. Call it under `jax_precision`."""
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
