"""One loss per example: MNIST in batches of 32, with labels that are right or not.

The digits have 14 x 14 pixels. Each example has a cross-entropy of its own. In the
second version a tenth of the labels for training are another class, drawn once.
Validation and test have the right labels.

Methods that remember something of each loss from step to step are left out: the next
batch has other examples.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.quality._mnist import TRAIN, VALIDATION, digits
from benchmarks.quality._networks import dense_layers, tanh_network
from benchmarks.quality._problem import Measure, Problem

BATCH = 32
METHODS = (
    "mean",
    "upgrad",
    "upgrad (TorchJD's rule)",
    "dualproj",
    "mgda",
    "cagrad",
    "nash_mtl",
    "fairgrad",
    "imtl_g",
    "conflict_free",
    "aligned_mtl",
    "pcgrad",
    "graddrop",
    "krum",
    "trimmed_mean",
    "random",
    "geometric_mean",
    "stch",
    "cosmos",
    "pbi",
)


def problem(wrong_labels: float) -> Problem:
    images, classes = digits()
    images = images.reshape(len(images), -1)
    labels = classes.copy()
    rng = np.random.default_rng(1)
    changed = rng.choice(TRAIN, round(wrong_labels * TRAIN), replace=False)
    labels[changed] = (labels[changed] + rng.integers(1, 10, len(changed))) % 10

    def batch(key):
        chosen = jax.random.choice(key, TRAIN, (BATCH,))
        return jnp.asarray(images)[chosen], jnp.asarray(labels)[chosen]

    def loss(layers, x, y):
        logits = tanh_network(layers, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y)

    def measure(layers):
        ends = TRAIN + VALIDATION
        wrong = tanh_network(layers, images[ends:]).argmax(axis=-1) != classes[ends:]
        validation = loss(layers, images[TRAIN:ends], classes[TRAIN:ends])
        return {"validation": validation.mean(), "error": wrong.mean()}

    shown = "" if not wrong_labels else f", {wrong_labels:.0%} of the labels wrong"
    return Problem(
        title=f"MNIST, one loss per example{shown}",
        num_losses=BATCH,
        steps=600,
        rates=(3e-4, 1e-3, 3e-3, 1e-2),
        init=lambda key: dense_layers(key, (196, 64, 10)),
        batch=batch,
        losses=loss,
        in_axes=(None, 0, 0),
        measure=measure,
        measures={"error": Measure("test error", percent=True)},
        methods=METHODS,
        memoryless=True,
    )
