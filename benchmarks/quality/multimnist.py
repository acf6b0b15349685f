"""Two overlaid digits of MNIST, and one task for each: which digit is it?

Two digits of 14 x 14 pixels lie on 18 x 18, one at the upper left and one at the lower
right; where they overlap, the brighter pixel counts (after Sabour et al., 2017,
arXiv:1710.09829). Pairs for training are drawn anew for every batch. The two tasks
share a trunk, and have a head each.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from benchmarks.quality._mnist import TRAIN, VALIDATION, digits
from benchmarks.quality._networks import dense_layers, relu_network
from benchmarks.quality._problem import Measure, Problem

SIDE = 18
BATCH = 64


def overlaid(
    left: Float[Array, "b 14 14"], right: Float[Array, "b 14 14"]
) -> Float[Array, "b 324"]:
    free = SIDE - 14
    upper = jnp.pad(left, ((0, 0), (0, free), (0, free)))
    lower = jnp.pad(right, ((0, 0), (free, 0), (free, 0)))
    return jnp.maximum(upper, lower).reshape(len(left), -1)


def problem() -> Problem:
    images, classes = digits()
    pairs = {}
    parts = {"validation": (TRAIN, VALIDATION), "test": (TRAIN + VALIDATION, 1000)}
    for name, (start, size) in parts.items():
        rng = np.random.default_rng(start)
        chosen = start + np.stack([rng.permutation(size) for _ in range(2)])
        pairs[name] = np.asarray(overlaid(*images[chosen])), classes[chosen]

    def init(key):
        of_trunk, *of_heads = jax.random.split(key, 3)
        return {
            "trunk": dense_layers(of_trunk, (SIDE**2, 64, 32)),
            "heads": [dense_layers(key, (32, 10)) for key in of_heads],
        }

    def logits(params, x):
        features = relu_network(params["trunk"], x)
        return jnp.stack(
            [features @ head["w"] + head["b"] for (head,) in params["heads"]]
        )

    def batch(key):
        chosen = jax.random.choice(key, TRAIN, (2, BATCH))
        return overlaid(*jnp.asarray(images)[chosen]), jnp.asarray(classes)[chosen]

    def losses(params, x, y):
        each = optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y)
        return each.mean(axis=1)

    def measure(params):
        x, y = pairs["test"]
        wrong = (logits(params, x).argmax(axis=-1) != y).mean(axis=1)
        return {
            "validation": losses(params, *pairs["validation"]).mean(),
            "error": wrong.mean(),
            "worst": wrong.max(),
        }

    return Problem(
        title="Two overlaid digits of MNIST",
        num_losses=2,
        steps=1500,
        rates=(3e-4, 1e-3, 3e-3, 1e-2),
        init=init,
        batch=batch,
        losses=losses,
        measure=measure,
        measures={
            "error": Measure("test error, mean of the tasks", percent=True),
            "worst": Measure("of the worse task", percent=True),
        },
        labels={"trunk": "shared", "heads": "own"},
        epoch_steps=TRAIN // BATCH,
    )
