"""An Equinox module and an ordinary training loop, with one loss per example.

Two things differ from a loop without jaxjd: `jaxjd.value_and_jac` stands in place of
`eqx.filter_value_and_grad`, and an aggregator before Adam. As everywhere with Equinox,
the arrays of the module are the parameters, and the rest is put back by `eqx.combine`.

    python examples/equinox_loop.py
    python examples/equinox_loop.py --steps 2000 --width 64

It trains on scikit-learn's breast cancer data, prints the test error beside that of the
mean loss, and draws the losses of single examples into `out/equinox_loop.png`. Install
what it needs with `pip install '.[examples]'`.
"""

import argparse
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich
from jaxtyping import Array, Float
from matplotlib.figure import Figure
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_breast_cancer

import jaxjd

TRAIN, BATCH = 400, 32
AGGREGATORS = {
    "mean": jaxjd.mean(),
    "upgrad": jaxjd.upgrad(),
    # Ignores the short gradients of examples that are fitted.
    "upgrad, its authors' rule": jaxjd.upgrad(norm_eps=1e-4, reg_eps=1e-4),
}


def loss(
    model: eqx.nn.MLP, x: Float[Array, " 30"], y: Float[Array, ""]
) -> Float[Array, ""]:
    """Of one example."""
    return optax.sigmoid_binary_cross_entropy(model(x), y)


@eqx.filter_jit
def step(model, state, tx, x, y):
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def of_params(params, x, y):
        return loss(eqx.combine(params, static), x, y)

    losses, jac = jaxjd.value_and_jac(of_params, in_axes=(None, 0, 0))(params, x, y)
    updates, state = tx.update(jac, state, params)
    return eqx.apply_updates(model, updates), state, losses.mean()


@eqx.filter_jit
def evaluate(model, x, y):
    """The loss of every example, and which are classified wrongly."""
    losses = jax.vmap(loss, (None, 0, 0))(model, x, y)
    return losses, losses > jnp.log(2.0)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Returns the test error, by aggregator."""
    options = parse_options(argv)
    x, y = map(np.asarray, load_breast_cancer(return_X_y=True))
    order = np.random.default_rng(0).permutation(len(y))
    x, y = x[order], y[order].astype(np.float32)
    x = ((x - x[:TRAIN].mean(0)) / x[:TRAIN].std(0)).astype(np.float32)
    errors, spread = {}, {}
    table = Table("", "mean train loss", "worst train loss", "test errors")
    for name, aggregator in AGGREGATORS.items():
        key = jax.random.key(0)
        model = eqx.nn.MLP(30, "scalar", options.width, depth=2, key=key)
        tx = optax.chain(
            aggregator, optax.adam(optax.cosine_decay_schedule(1e-3, options.steps))
        )
        state = tx.init(eqx.filter(model, eqx.is_inexact_array))
        rng = np.random.default_rng(1)
        for _ in track(range(options.steps), f"{name:>26}"):
            batch = rng.choice(TRAIN, BATCH, replace=False)
            model, state, _ = step(model, state, tx, x[batch], y[batch])
        losses, _ = evaluate(model, x[:TRAIN], y[:TRAIN])
        _, wrong = evaluate(model, x[TRAIN:], y[TRAIN:])
        spread[name], errors[name] = np.asarray(losses), float(wrong.mean())
        of_train = (f"{value:.4f}" for value in (losses.mean(), losses.max()))
        table.add_row(name, *of_train, f"{errors[name]:.1%}")
    rich.print(table)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "equinox_loop.png"
    draw(spread).savefig(path, dpi=100)
    print(f"The losses are in {path}")
    return errors


def draw(spread: dict[str, np.ndarray]) -> Figure:
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.subplots()
    for name, losses in spread.items():
        share = np.arange(1, len(losses) + 1) / len(losses)
        axes.plot(np.sort(losses), share, label=name)
    axes.set(xscale="log", xlim=1e-10, xlabel="loss of an example after training")
    axes.set(ylabel="share of the training set below")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=int, default=500, help="steps of 32 examples")
    add("--width", type=int, default=32, help="of the two hidden layers")
    add("--output", type=Path, default=Path("out"), help="folder for the figure")
    options = parser.parse_args(argv)
    if min(options.steps, options.width) < 1:
        parser.error("arguments --steps and --width: expected at least 1")
    return options


if __name__ == "__main__":
    main()
