"""Two losses for every example: name a digit, and complete its lower half.

Instance-wise multi-task learning (IWMTL): the function of one example returns the loss
of each task, so a batch of 32 has 64 losses. The network sees the upper half of a digit
of scikit-learn's. Some digits look alike there, and are hard for both tasks.

    python examples/iwmtl.py
    python examples/iwmtl.py --steps 4000

It prints the test error of both tasks beside that of the mean loss, and draws some
completions into `out/iwmtl.png`. `pip install '.[examples]'` installs what it
needs.
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
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits

import jaxjd

TRAIN, BATCH, WIDTH = 1300, 32, 64
AGGREGATORS = {
    "mean": jaxjd.mean(),
    "upgrad": jaxjd.upgrad(),
    # Ignores the short gradients of examples that are fitted.
    "upgrad, its authors' rule": jaxjd.upgrad(norm_eps=1e-4, reg_eps=1e-4),
}


def init(key: Array) -> PyTree:
    shapes = {"first": (32, WIDTH), "second": (WIDTH, WIDTH)}
    shapes |= {"digit": (WIDTH, 10), "lower": (WIDTH, 32)}
    keys = jax.random.split(key, len(shapes))
    return {
        name: {"w": jax.random.normal(k, shape) / shape[0] ** 0.5, "b": 0.0}
        | {"b": jnp.zeros(shape[1])}
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def predict(params: PyTree, upper: Float[Array, "*n 32"]) -> dict[str, Array]:
    """The logits of the digits, and the lower half."""

    def dense(name: str, x: Array) -> Array:
        return x @ params[name]["w"] + params[name]["b"]

    features = jax.nn.relu(dense("second", jax.nn.relu(dense("first", upper))))
    return {"digit": dense("digit", features), "lower": dense("lower", features)}


def losses(
    params: PyTree, image: Float[Array, "64"], label: Int[Array, ""]
) -> dict[str, Float[Array, ""]]:
    """Of one example: a loss for each task."""
    found = predict(params, image[:32])
    return {
        "digit": optax.softmax_cross_entropy_with_integer_labels(found["digit"], label),
        "lower": jnp.mean((found["lower"] - image[32:]) ** 2),
    }


@functools.partial(jax.jit, static_argnames="tx")
def step(params, state, images, labels, *, tx):
    per_example = jaxjd.value_and_jac(losses, in_axes=(None, 0, 0))
    values, jac = per_example(params, images, labels)  # values: {task: [32]}
    updates, state = tx.update(jac, state, params)
    return optax.apply_updates(params, updates), state, values


def main(argv: list[str] | None = None) -> dict[str, tuple[float, float]]:
    """Returns the test errors of both tasks, by aggregator."""
    options = parse_options(argv)
    images, labels = map(np.asarray, load_digits(return_X_y=True))
    images = (images / 16).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(labels))
    train, test = order[:TRAIN], order[TRAIN:]
    results, completed = {}, {}
    for name, aggregator in AGGREGATORS.items():
        tx = optax.chain(
            aggregator, optax.adam(optax.cosine_decay_schedule(3e-3, options.steps))
        )
        params = init(jax.random.key(0))
        state, rng = tx.init(params), np.random.default_rng(1)
        for _ in track(range(options.steps), f"{name:>26}"):
            batch = rng.choice(train, BATCH, replace=False)
            params, state, _ = step(params, state, images[batch], labels[batch], tx=tx)
        found = jax.tree.map(
            np.asarray, predict(params, jnp.asarray(images[test, :32]))
        )
        wrong = np.mean(found["digit"].argmax(axis=1) != labels[test])
        away = np.sqrt(np.mean((found["lower"] - images[test, 32:]) ** 2))
        results[name], completed[name] = (float(wrong), float(away)), found["lower"]

    table = Table("", "digit: errors", "lower half: RMS error", title="On test digits")
    for name, (wrong, away) in results.items():
        table.add_row(name, f"{wrong:.1%}", f"{away:.3f}")
    rich.print(table)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "iwmtl.png"
    draw(images[test], completed).savefig(path, dpi=100)
    print(f"The completions are in {path}")
    return results


def draw(images: np.ndarray, completed: dict[str, np.ndarray]) -> Figure:
    figure = Figure(figsize=(9, 1.2 + len(completed)), layout="constrained")
    rows = {"test digits": images}
    for name, lower in completed.items():
        rows[name.replace(", ", ",\n")] = np.hstack([images[:, :32], lower])
    grid = figure.subplots(len(rows), 12)
    for axes, (name, several) in zip(grid, rows.items(), strict=True):
        for one, image in zip(axes, several, strict=False):
            one.imshow(image.reshape(8, 8), cmap="gray_r", vmin=0, vmax=1)
            one.axhline(3.5, color="tab:orange", linewidth=1)
            one.set(xticks=[], yticks=[])
        axes[0].set_ylabel(name, rotation=0, ha="right", va="center")
    figure.suptitle("The network sees what is above the line")
    return figure


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=int, default=1500, help="steps of 32 examples")
    add("--output", type=Path, default=Path("out"), help="folder for the figure")
    options = parser.parse_args(argv)
    if options.steps < 1:
        parser.error(f"argument --steps: expected at least 1, got {options.steps}")
    return options


if __name__ == "__main__":
    main()
