r"""Burgers' equation by a physics-informed network, whose losses are a dict of three.

$u_t + u u_x = \nu u_{xx}$ on $[-1, 1]$ with $u(0, x) = -\sin \pi x$, $u(t, \pm 1) = 0$
and $\nu = 0.01 / \pi$ (Raissi et al., 2019). The losses are those of the equation, of
the initial condition and of the boundary. The solution has a steep front at $x = 0$.

    python examples/physics_informed.py
    python examples/physics_informed.py --steps 10000

It prints the error of each aggregator and draws the solutions into
`out/physics_informed.png`. Install what it needs with `pip install '.[examples]'`.
"""

import argparse
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich
from jaxtyping import Array, Float, PyTree
from matplotlib.figure import Figure
from rich.progress import track
from rich.table import Table

import jaxjd

VISCOSITY = 0.01 / np.pi
CHUNK = 50  # Steps in one call.
AGGREGATORS = {"mean": jaxjd.mean(), "upgrad": jaxjd.upgrad()}
AGGREGATORS["nash_mtl"] = jaxjd.nash_mtl(num_losses=3)


def init(key: Array, widths=(2, 32, 32, 32, 1)) -> PyTree:
    keys = jax.random.split(key, len(widths))
    return [
        {"w": jax.random.normal(k, (i, o)) / np.sqrt(i), "b": jnp.zeros(o)}
        for k, i, o in zip(keys, widths, widths[1:], strict=False)
    ]


def u(params: PyTree, t: Array, x: Array) -> Float[Array, ""]:
    h = jnp.stack([2 * t - 1, x])
    for layer in params[:-1]:
        h = jnp.tanh(h @ layer["w"] + layer["b"])
    return (h @ params[-1]["w"] + params[-1]["b"])[0]


def residual(params: PyTree, t: Array, x: Array) -> Float[Array, ""]:
    u_t, u_x = jax.grad(u, (1, 2))(params, t, x)
    u_xx = jax.grad(jax.grad(u, 2), 2)(params, t, x)
    return u_t + u(params, t, x) * u_x - VISCOSITY * u_xx


def losses(params: PyTree, key: Array) -> dict[str, Float[Array, ""]]:
    """The three losses, at points that are drawn anew in every step."""
    keys = jax.random.split(key, 4)
    t, s = jax.random.uniform(keys[0], (128,)), jax.random.uniform(keys[1], (32,))
    x = jax.random.uniform(keys[2], (128,), minval=-1, maxval=1)
    y = jax.random.uniform(keys[3], (32,), minval=-1, maxval=1)
    at = jax.vmap(functools.partial(u, params))
    sides = jnp.tile(jnp.array([-1.0, 1.0]), 16)
    return {
        "equation": jnp.mean(jax.vmap(residual, (None, 0, 0))(params, t, x) ** 2),
        "initial": jnp.mean((at(jnp.zeros(32), y) + jnp.sin(np.pi * y)) ** 2),
        "boundary": jnp.mean(at(s, sides) ** 2),
    }


@functools.partial(jax.jit, static_argnames="tx")
def train(params, state, key, *, tx):
    def step(carry, key):
        params, state = carry
        values, jac = jaxjd.value_and_jac(losses)(params, key)
        updates, state = tx.update(jac, state, params)
        return (optax.apply_updates(params, updates), state), values

    return jax.lax.scan(step, (params, state), jax.random.split(key, CHUNK))


def solution(t: np.ndarray, x: np.ndarray) -> np.ndarray:
    r"""By Cole and Hopf's transformation to the heat equation, and quadrature.

    $u = -\int \sin(\pi y) f(y) g(x - y) dy / \int f(y) g(x - y) dy$ with
    $f(y) = e^{-\cos(\pi y) / 2 \pi \nu}$ and $g(y) = e^{-y^2 / 4 \nu t}$.
    """
    nodes, weights = np.polynomial.hermite.hermgauss(200)
    y = x[..., None] - 2 * np.sqrt(VISCOSITY * t)[..., None] * nodes
    f = weights * np.exp(-np.cos(np.pi * y) / (2 * np.pi * VISCOSITY))
    return -(np.sin(np.pi * y) * f).sum(-1) / f.sum(-1)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Returns the relative L2 error, by aggregator."""
    options = parse_options(argv)
    t, x = np.meshgrid(np.linspace(0, 1, 101), np.linspace(-1, 1, 201), indexing="ij")
    expected = solution(t, x)
    on_grid = jax.jit(jax.vmap(jax.vmap(u, (None, 0, 0)), (None, 0, 0)))
    found, errors = {}, {}
    table = Table("", "boundary", "equation", "initial", "relative L2 error")
    table.title = f"Mean losses of the last {CHUNK} steps"
    for name, aggregator in AGGREGATORS.items():
        rate = optax.cosine_decay_schedule(1e-2, options.steps)
        tx = optax.chain(aggregator, optax.adam(rate))
        params = init(jax.random.key(0))
        state, values = tx.init(params), {}
        for chunk in track(range(0, options.steps, CHUNK), f"{name:>8}"):
            key = jax.random.fold_in(jax.random.key(1), chunk)
            (params, state), values = train(params, state, key, tx=tx)
        found[name] = np.asarray(on_grid(params, np.float32(t), np.float32(x)))
        away = np.linalg.norm(found[name] - expected)
        errors[name] = float(away / np.linalg.norm(expected))
        last = (f"{values[loss].mean():.1e}" for loss in sorted(values))
        table.add_row(name, *last, f"{errors[name]:.3f}")
    rich.print(table)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "physics_informed.png"
    draw(x[0], expected, found).savefig(path, dpi=100)
    print(f"The solutions are in {path}")
    return errors


def draw(x: np.ndarray, expected: np.ndarray, found: dict[str, np.ndarray]) -> Figure:
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    several = figure.subplots(1, 3, sharey=True)
    for axes, row in zip(several, (25, 50, 100), strict=True):
        axes.plot(x, expected[row], color="black", lw=3, alpha=0.3, label="solution")
        for name, values in found.items():
            axes.plot(x, values[row], label=name)
        axes.set(title=f"t = {row / 100}", xlabel="x")
        axes.grid(alpha=0.3)
    several[0].legend()
    return figure


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--steps", type=int, default=3000, help="in calls of 50 (default: 3000)")
    add("--output", type=Path, default=Path("out"), help="folder (default: out)")
    options = parser.parse_args(argv)
    if options.steps < 1:
        parser.error(f"argument --steps: expected at least 1, got {options.steps}")
    return options


if __name__ == "__main__":
    main()
