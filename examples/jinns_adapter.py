"""jinns, physics-informed networks in JAX, trained with an aggregator of jaxjd.

A loss of jinns returns its terms beside their weighted sum. `value_and_jac` below takes
the terms, so any loss of jinns works with any aggregator, and its loss weights are not
used. Here it is a damped oscillator, whose terms are the equation and the initial
condition.

    python examples/jinns_adapter.py
    python examples/jinns_adapter.py --steps 10000

It prints the error beside that of the mean of the terms, and draws the solutions into
`out/jinns_adapter.png`. It needs jinns and `pip install '.[examples]'`.
"""

import argparse
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich
from jinns.data import DataGeneratorODE
from jinns.loss import ODE, LossODE, LossWeightsODE
from jinns.nn import PINN_MLP
from jinns.parameters import Params
from matplotlib.figure import Figure
from rich.progress import track
from rich.table import Table

import jaxjd

FREQUENCY, DAMPING, END = 2.0, 0.3, 3.0
AGGREGATORS = {"mean": jaxjd.mean(), "upgrad": jaxjd.upgrad()}
AGGREGATORS["conflict_free"] = jaxjd.conflict_free()


def value_and_jac(loss: Any, params: Any, batch: Any) -> tuple[Any, jaxjd.Jacobian]:
    """The terms of a loss of jinns, and their Jacobian with respect to `params`.

    What the `derivative_keys` of jinns leave out has columns of zeros.
    """

    def terms(params):
        return loss.evaluate(params, batch)[1]

    return jaxjd.value_and_jac(terms)(params)


class Oscillator(ODE):
    """Place and velocity, as a system of the first order."""

    def equation(self, t, u, params):
        place, velocity = u(t, params)
        slopes = jax.jacfwd(lambda t: u(t, params))(t)[:, 0] / self.Tmax
        pull = FREQUENCY**2 * place + 2 * DAMPING * velocity
        return slopes - jnp.stack([velocity, -pull])


def solution(t: np.ndarray) -> np.ndarray:
    rate = np.sqrt(FREQUENCY**2 - DAMPING**2)
    wave = np.cos(rate * t) + DAMPING / rate * np.sin(rate * t)
    return np.exp(-DAMPING * t) * wave


def problem() -> tuple[Any, Any, Any]:
    """The loss, the parameters to start from, and the points in time."""
    layers = ((eqx.nn.Linear, 1, 32), (jnp.tanh,), (eqx.nn.Linear, 32, 32))
    layers = (*layers, (jnp.tanh,), (eqx.nn.Linear, 32, 2))
    net, times = jax.random.split(jax.random.key(0))
    u, nn_params = PINN_MLP.create(key=net, eqx_list=layers, eq_type="ODE")
    one = jnp.ones(())
    start: Any = Params(nn_params=nn_params, eq_params={})
    loss = LossODE(
        u=u,
        dynamic_loss=Oscillator(Tmax=END),
        initial_condition=(0.0, jnp.array([1.0, 0.0])),
        loss_weights=LossWeightsODE(dyn_loss=one, initial_condition=one),
        params=start,
    )
    points = DataGeneratorODE(key=times, nt=256, tmin=0, tmax=1, temporal_batch_size=64)
    return loss, start, points


@eqx.filter_jit
def step(loss, params, state, batch, tx):
    values, jac = value_and_jac(loss, params, batch)
    updates, state = tx.update(jac, state, params)
    return optax.apply_updates(params, updates), state, values


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Returns the relative L2 error, by aggregator."""
    options = parse_options(argv)
    loss, start, points = problem()
    t = np.linspace(0, 1, 201, dtype=np.float32)  # In units of END.
    expected, found, errors = solution(END * t), {}, {}
    table = Table("", "equation", "initial condition", "error")
    for name, aggregator in AGGREGATORS.items():
        rate = optax.cosine_decay_schedule(1e-2, options.steps)
        tx = optax.chain(aggregator, optax.adam(rate))
        params, state = start, tx.init(start)
        generator, values = points, None
        for _ in track(range(options.steps), f"{name:>14}"):
            generator, batch = generator.get_batch()
            params, state, values = step(loss, params, state, batch, tx)
        places = jax.vmap(loss.u, (0, None))(jnp.asarray(t)[:, None], params)[:, 0]
        found[name] = np.asarray(places)
        error = np.linalg.norm(found[name] - expected) / np.linalg.norm(expected)
        errors[name] = float(error)
        of_terms = (f"{float(x):.1e}" for x in jax.tree.leaves(values))
        table.add_row(name, *of_terms, f"{error:.4f}")
    rich.print(table)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "jinns_adapter.png"
    draw(END * t, expected, found).savefig(path, dpi=100)
    print(f"The solutions are in {path}")
    return errors


def draw(t: np.ndarray, expected: np.ndarray, found: dict[str, np.ndarray]) -> Figure:
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(t, expected, color="black", linewidth=3, alpha=0.3, label="solution")
    for name, places in found.items():
        axes.plot(t, places, label=name)
    axes.set(xlabel="t", ylabel="u")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=int, default=4000, help="steps of 64 points in time")
    add("--output", type=Path, default=Path("out"), help="folder for the figure")
    options = parser.parse_args(argv)
    if options.steps < 1:
        parser.error(f"argument --steps: expected at least 1, got {options.steps}")
    return options


if __name__ == "__main__":
    main()
