"""A GRU reads digits row by row, with one loss per sequence.

The digits are those of scikit-learn, sequences of 8 rows of 8 pixels. The function of
one sequence is a `jax.lax.scan`. The same weights are used at each time, and the
Gramian is exact all the same: the uses are added up before the inner products.

    python examples/recurrent.py
    python examples/recurrent.py --steps 3000 --batch-size 64

It prints the test accuracy after each row, beside that of the mean loss, and draws it
into `out/recurrent.png`. `pip install '.[examples]'` installs what it needs.
"""

import argparse
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich
from jaxtyping import Array, Float, Int, PyTree
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits

import jaxjd

TRAIN, WIDTH = 1300, 32
# UPGrad by its authors' rule, which is for many losses of one kind.
AGGREGATORS = {
    "mean": jaxjd.mean(),
    "upgrad": jaxjd.upgrad(norm_eps=1e-4, reg_eps=1e-4),
}


def init(key: Array) -> PyTree:
    keys = jax.random.split(key, 3)
    return {
        "input": jax.random.normal(keys[0], (8, 3 * WIDTH)) / 8**0.5,
        "recurrent": jax.random.normal(keys[1], (WIDTH, 3 * WIDTH)) / WIDTH**0.5,
        "bias": jnp.zeros(3 * WIDTH),
        "output": jax.random.normal(keys[2], (WIDTH, 10)) / WIDTH**0.5,
    }


def logits(params: PyTree, rows: Float[Array, "8 8"]) -> Float[Array, "8 10"]:
    """What the network thinks after each row."""

    def read(h, row):
        reset_x, update_x, new_x = jnp.split(row @ params["input"] + params["bias"], 3)
        reset_h, update_h, new_h = jnp.split(h @ params["recurrent"], 3)
        new = jnp.tanh(new_x + jax.nn.sigmoid(reset_x + reset_h) * new_h)
        update = jax.nn.sigmoid(update_x + update_h)
        h = update * h + (1 - update) * new
        return h, h

    _, states = jax.lax.scan(read, jnp.zeros(WIDTH), rows)
    return states @ params["output"]


def loss(
    params: PyTree, rows: Float[Array, "8 8"], label: Int[Array, ""]
) -> Float[Array, ""]:
    last = logits(params, rows)[-1]
    return optax.softmax_cross_entropy_with_integer_labels(last, label)


@functools.partial(jax.jit, static_argnames="tx")
def step(params, state, rows, labels, *, tx):
    per_sequence = jaxjd.value_and_jac(loss, in_axes=(None, 0, 0))
    losses, jac = per_sequence(params, rows, labels)
    updates, state = tx.update(jac, state, params)
    return optax.apply_updates(params, updates), state, losses.mean()


@jax.jit
def accuracy(params: PyTree, rows: Array, labels: Array) -> Float[Array, "8"]:
    found = jax.vmap(logits, (None, 0))(params, rows).argmax(axis=-1)
    return (found == labels[:, None]).mean(axis=0)


def main(argv: list[str] | None = None) -> dict[str, np.ndarray]:
    """Returns the test accuracy after each row, by aggregator."""
    options = parse_options(argv)
    images, labels = map(np.asarray, load_digits(return_X_y=True))
    rows = (images / 16).reshape(-1, 8, 8).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(labels))
    train, test = order[:TRAIN], order[TRAIN:]
    curves, results = {}, {}
    for name, aggregator in AGGREGATORS.items():
        rate = optax.cosine_decay_schedule(1e-2, options.steps)
        tx = optax.chain(aggregator, optax.clip_by_global_norm(1.0), optax.adam(rate))
        params = init(jax.random.key(0))
        state, rng, seen = tx.init(params), np.random.default_rng(1), []
        for _ in track(range(options.steps), f"{name:>7}"):
            batch = rng.choice(train, options.batch_size, replace=False)
            few = rows[batch], labels[batch]
            params, state, value = step(params, state, *few, tx=tx)
            seen.append(float(value))
        curves[name] = np.array(seen)
        results[name] = np.asarray(accuracy(params, rows[test], labels[test]))

    table = Table("", *map(str, range(1, 9)), title="Test accuracy after each row")
    for name, after_rows in results.items():
        table.add_row(name, *(f"{x:.1%}" for x in after_rows))
    rich.print(table)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "recurrent.png"
    draw(curves, results).savefig(path, dpi=100)
    print(f"The accuracy is in {path}")
    return results


def draw(curves: dict[str, np.ndarray], results: dict[str, np.ndarray]) -> Figure:
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, values in curves.items():
        width = max(1, len(values) // 20)
        left.semilogy(np.convolve(values, np.full(width, 1 / width), "valid"))
        right.plot(range(1, 9), results[name], "o-", label=name)
    left.set(xlabel="step", title="train loss, moving average")
    right.set(xlabel="rows read", title="test accuracy (trained after 8 rows)")
    right.yaxis.set_major_formatter(PercentFormatter(1))
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=int, default=800, help="steps to train")
    add("--batch-size", type=int, default=32, help="sequences in a batch")
    add("--output", type=Path, default=Path("out"), help="folder for the figure")
    options = parser.parse_args(argv)
    if min(options.steps, options.batch_size) < 1:
        parser.error("arguments --steps and --batch-size: expected at least 1")
    return options


if __name__ == "__main__":
    main()
