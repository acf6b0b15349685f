"""Diagnostics of every step, in a CSV file and a figure: which losses conflict?

`jaxjd.aggregate(weighting, diagnostics=True, num_losses=m)` keeps in the state of the
optimizer what the Gramian and the weights say of the step: the norms of the gradients,
whether they conflict, and how the update agrees with each. It costs no further pass.
Here three tasks on the digits of scikit-learn have gradients of very different length.

    python examples/monitoring.py
    python examples/monitoring.py --steps 2000 --output out/long

It writes `out/monitoring_NAME.csv` for each aggregator, one row per step, as any logger
would, and draws them into `out/monitoring.png`. `pip install '.[examples]'`
installs what it needs.
"""

import argparse
import csv
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich
from jaxtyping import Array, Float, Int, PyTree
from matplotlib.figure import Figure
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits

import jaxjd

MEAN_INK = 19.5  # Of a digit, in pixels.
TASKS = ("digit", "ink", "parity")  # In the order of the rows: sorted.
BATCH, WIDTH = 64, 32
WEIGHTINGS = {"mean": jaxjd.weighting.mean(), "upgrad": jaxjd.weighting.upgrad()}


def init(key: Array) -> PyTree:
    keys = jax.random.split(key, 4)
    sizes = {"digit": 10, "ink": 1, "parity": 1}
    return {"trunk": jax.random.normal(keys[0], (64, WIDTH)) / 8} | {
        name: jax.random.normal(k, (WIDTH, size)) / WIDTH**0.5
        for k, (name, size) in zip(keys[1:], sizes.items(), strict=True)
    }


def losses(params: PyTree, images: Float[Array, "b 64"], digits: Int[Array, " b"]):
    """Which digit is it, how much ink is it made of, and is it odd?"""
    features = jnp.tanh(images @ params["trunk"])
    of_digit, of_ink, of_parity = (features @ params[task] for task in TASKS)
    digit = optax.softmax_cross_entropy_with_integer_labels(of_digit, digits)
    # In pixels, so that its gradient is long.
    ink = (MEAN_INK + of_ink[:, 0] - images.sum(axis=1)) ** 2
    parity = optax.sigmoid_binary_cross_entropy(of_parity[:, 0], digits % 2)
    return {"digit": digit.mean(), "ink": ink.mean(), "parity": parity.mean()}


@functools.partial(jax.jit, static_argnames="tx")
def step(params, state, images, digits, *, tx):
    values, jac = jaxjd.value_and_jac(losses)(params, images, digits)
    updates, state = tx.update(jac, state, params)
    return optax.apply_updates(params, updates), state, values


def row(values: dict[str, Array], shown: jaxjd.Diagnostics) -> dict[str, float]:
    """One flat dict of numbers, which is what loggers take."""
    numbers = {f"loss/{task}": float(values[task]) for task in TASKS}
    for name in ("weights", "norms", "agreement", "changes"):
        several = np.asarray(getattr(shown, name))
        numbers |= {f"{name}/{t}": float(several[i]) for i, t in enumerate(TASKS)}
    single = ("conflicting", "cosine_to_mean", "effective_losses", "entropy")
    return numbers | {name: float(getattr(shown, name)) for name in single}


def main(argv: list[str] | None = None) -> dict[str, dict[str, np.ndarray]]:
    """Returns the columns of the logs, by aggregator."""
    options = parse_options(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    images, digits = map(np.asarray, load_digits(return_X_y=True))
    images = (images / 16).astype(np.float32)
    logs = {}
    for name, weighting in WEIGHTINGS.items():
        kept = jaxjd.aggregate(weighting, diagnostics=True, num_losses=len(TASKS))
        tx = optax.chain(kept, optax.adam(3e-3))
        params = init(jax.random.key(0))
        state, rng, rows = tx.init(params), np.random.default_rng(0), []
        with open(options.output / f"monitoring_{name}.csv", "w", newline="") as file:
            for number in track(range(options.steps), f"{name:>7}"):
                batch = rng.choice(len(images), BATCH, replace=False)
                few = images[batch], digits[batch]
                params, state, values = step(params, state, *few, tx=tx)
                found = row(values, optax.tree.get(state, "diagnostics"))
                rows.append({"step": number} | found)
                if number == 0:
                    writer = csv.DictWriter(file, list(rows[0]))
                    writer.writeheader()
                writer.writerow(rows[-1])
        logs[name] = {key: np.array([r[key] for r in rows]) for key in rows[0]}

    increases = (f"steps that\nincrease {task}" for task in TASKS)
    table = Table("", *(f"loss: {task}" for task in TASKS), *increases)
    for name, log in logs.items():
        last = slice(-(options.steps // 10 + 1), None)
        values = [f"{log[f'loss/{task}'][last].mean():.3f}" for task in TASKS]
        # A cosine below float32's rounding is a conflict.
        values += [f"{np.mean(log[f'agreement/{t}'] < -1e-3):.0%}" for t in TASKS]
        table.add_row(name, *values)
    rich.print(table)
    draw(logs).savefig(options.output / "monitoring.png", dpi=100)
    print(f"The logs and the figure are in {options.output}")
    return logs


def draw(logs: dict[str, dict[str, np.ndarray]]) -> Figure:
    figure = Figure(figsize=(11, 2.8 * len(logs)), layout="constrained")
    grid = figure.subplots(len(logs), 3, sharex=True, sharey="col")
    for axes, (name, log) in zip(grid, logs.items(), strict=True):
        for one, kind in zip(axes, ("loss", "norms", "agreement"), strict=True):
            for task in TASKS:
                values = log[f"{kind}/{task}"]
                width = max(1, len(values) // 50)
                smooth = np.convolve(values, np.full(width, 1 / width), "valid")
                one.plot(smooth, label=task, linewidth=1)
            one.set_yscale("linear" if kind == "agreement" else "log")
            one.set_title(f"{name}: {kind}", fontsize=10)
            one.grid(alpha=0.3)
        axes[-1].axhline(0, color="black", linewidth=1)
    grid[0, 0].legend()
    grid[-1, 1].set_xlabel("step")
    return figure


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=int, default=600, help="steps of 64 examples")
    add("--output", type=Path, default=Path("out"), help="folder for all files")
    options = parser.parse_args(argv)
    if options.steps < 1:
        parser.error(f"argument --steps: expected at least 1, got {options.steps}")
    return options


if __name__ == "__main__":
    main()
