"""Three tasks on scikit-learn's digits, whose losses have equal or unequal scales.

1,797 digits of 8 x 8 pixels. The tasks are three questions about a digit: is it even,
is it at least 5, is a loop in it. They share a narrow trunk. Each loss is a mean cross-
entropy, multiplied by a scale: 1, 1, 1 or 1, 100, 10,000. That stands for losses that
are in different units. What they measure is the same.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.quality._networks import dense_layers, relu_network
from benchmarks.quality._problem import Measure, Problem

TRAIN, VALIDATION = 897, 450  # The other 450 digits are for the test.
BATCH = 64
LOOP = (0, 6, 8, 9)


@functools.cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """The images, [1797, 64], and the answers to the three questions, [1797, 3]."""
    from sklearn.datasets import load_digits

    images, classes = map(np.asarray, load_digits(return_X_y=True))
    order = np.random.default_rng(0).permutation(len(images))
    images, classes = images[order], classes[order]
    answers = [classes % 2 == 0, classes >= 5, np.isin(classes, LOOP)]
    return (
        (images / 8 - 1).astype(np.float32),
        np.stack(answers, axis=1).astype(np.float32),
    )


def problem(scales: Sequence[float]) -> Problem:
    images, answers = digits()
    factors = jnp.asarray(scales, jnp.float32)

    def init(key):
        of_trunk, of_heads = jax.random.split(key)
        return {
            "trunk": dense_layers(of_trunk, (64, 16, 4)),
            # One column for each task.
            "heads": dense_layers(of_heads, (4, 3)),
        }

    def logits(params, x):
        (heads,) = params["heads"]
        return relu_network(params["trunk"], x) @ heads["w"] + heads["b"]

    def batch(key):
        chosen = jax.random.choice(key, TRAIN, (BATCH,))
        return jnp.asarray(images)[chosen], jnp.asarray(answers)[chosen]

    def losses(params, x, y):
        each = optax.sigmoid_binary_cross_entropy(logits(params, x), y)
        return factors * each.mean(axis=0)

    def measure(params):
        ends = TRAIN + VALIDATION
        wrong = (logits(params, images) > 0) != answers
        each = wrong[ends:].mean(axis=0)
        each_loss = optax.sigmoid_binary_cross_entropy(logits(params, images), answers)
        return {
            "validation": each_loss[TRAIN:ends].mean(),
            "error": each.mean(),
            "worst": each.max(),
        }

    ratio = " : ".join(f"{scale:,.0f}" for scale in scales)
    return Problem(
        title=f"Three questions about digits, scales {ratio}",
        num_losses=3,
        steps=2000,
        rates=(1e-3, 3e-3, 1e-2, 3e-2),
        init=init,
        batch=batch,
        losses=losses,
        measure=measure,
        measures={
            "error": Measure("test error, mean of the tasks", percent=True),
            "worst": Measure("of the worst task", percent=True),
        },
        labels={"trunk": "shared", "heads": "own"},
        epoch_steps=TRAIN // BATCH,
    )
