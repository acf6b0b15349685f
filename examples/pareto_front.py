"""Trace a Pareto front by one `vmap` over preferences, and by one over starting points.

Each of the runs descends for itself, all of them in one compiled program. Three
problems of two losses, whose fronts are known:

- FF, Fonseca and Fleming (1995): without bounds, and the front is not convex.
- ZDT1, Zitzler, Deb and Thiele (2000): parameters in [0, 1], clipped after each step.
- ZDT1, sigmoid: the same, as a function of the logits of its parameters.

    python examples/pareto_front.py --runs 32 --steps 3000

The script prints the inverted generational distance (IGD) of each method: the mean
distance of the points of the front from the nearest run. docs/pareto.md explains them.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich
from jaxtyping import Array, Float
from matplotlib.figure import Figure
from rich.table import Table

import jaxjd


class Problem(NamedTuple):
    """Two losses of n parameters, which start in [low, high]. Are they clipped?"""

    losses: Callable[[Float[Array, " n"]], dict[str, Float[Array, ""]]]
    front: Float[np.ndarray, "k 2"]
    n: int
    low: float
    high: float
    rate: float
    clipped: bool = False


def fonseca_fleming(x: Float[Array, " n"]) -> dict[str, Float[Array, ""]]:
    shift = 1 / jnp.sqrt(x.size)
    return {
        "f1": 1 - jnp.exp(-jnp.sum((x - shift) ** 2)),
        "f2": 1 - jnp.exp(-jnp.sum((x + shift) ** 2)),
    }


def zdt1(x: Float[Array, " n"]) -> dict[str, Float[Array, ""]]:
    g = 1 + 9 * jnp.mean(x[1:])
    # The root has no derivative at 0, where clipping may lead.
    return {"f1": x[0], "f2": g - jnp.sqrt(g * jnp.maximum(x[0], 1e-6))}


T = np.linspace(0, 1, 501)
FF_FRONT = 1 - np.exp(-4 * np.stack([1 - T, T], axis=1) ** 2)
ZDT1_FRONT = np.stack([T, 1 - np.sqrt(T)], axis=1)
PROBLEMS = {
    "FF": Problem(fonseca_fleming, FF_FRONT, n=3, low=-1, high=1, rate=0.05),
    "ZDT1": Problem(zdt1, ZDT1_FRONT, n=30, low=0, high=1, rate=0.02, clipped=True),
    "ZDT1, sigmoid": Problem(
        lambda z: zdt1(jax.nn.sigmoid(z)), ZDT1_FRONT, n=30, low=-3, high=3, rate=1.0
    ),
}
METHODS = {"upgrad": jaxjd.upgrad, "stch": lambda: jaxjd.stch(0.02)}
SWEEPS = ("preferences", "starting points")


def sweep(problem: Problem, method: str, over: str, runs: int, steps: int) -> Any:
    """The losses at the end of all runs, [runs, 2]."""
    tx = optax.chain(METHODS[method](), optax.sgd(problem.rate))
    value_and_jac = jaxjd.value_and_jac(problem.losses)
    keys = jax.random.split(jax.random.key(0), runs)

    def descend(x: Array, preference: dict[str, Array]) -> dict[str, Array]:
        def step(carry: tuple[Array, Any], _: None) -> tuple[tuple[Array, Any], None]:
            x, state = carry
            losses, jac = value_and_jac(x)
            updates, state = tx.update(
                jac, state, x, losses=losses, preference=preference
            )
            x = jnp.asarray(optax.apply_updates(x, updates))
            return (jnp.clip(x, 0, 1) if problem.clipped else x, state), None

        (x, _), _ = jax.lax.scan(step, (x, tx.init(x)), length=steps)
        return problem.losses(x)

    def start(key: Array) -> Array:
        return jax.random.uniform(key, (problem.n,), float, problem.low, problem.high)

    if over == "preferences":
        share = jnp.linspace(0.02, 0.98, runs)
        axes, args = (None, 0), (start(keys[0]), {"f1": share, "f2": 1 - share})
    else:
        half = jnp.asarray(0.5)
        axes, args = (0, None), (jax.vmap(start)(keys), {"f1": half, "f2": half})
    losses = jax.jit(jax.vmap(descend, axes))(*args)
    return np.stack([losses["f1"], losses["f2"]], axis=1)


def igd(front: Float[np.ndarray, "k 2"], found: Float[np.ndarray, "r 2"]) -> float:
    away = np.linalg.norm(front[:, None] - found, axis=-1)
    return float(away.min(axis=1).mean())


def draw(found: dict[tuple[str, str], dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    panels = figure.subplots(len(METHODS), len(PROBLEMS), squeeze=False)
    for panel, ((name, method), of) in zip(panels.T.flat, found.items(), strict=True):
        panel.plot(*PROBLEMS[name].front.T, color="grey", lw=4, alpha=0.4)
        for over, look in zip(SWEEPS, ("C1o", "C0x"), strict=True):
            panel.plot(*of[over].T, look, ms=5, mfc="none", label=over)
        panel.set_title(f"{method} on {name}", fontsize=10)
        panel.set(xlabel="f1", ylabel="f2", xlim=(-0.05, 1.05))
    panels[0, 0].legend(title="one run for each of the", fontsize=8, title_fontsize=8)
    return figure


def main(argv: list[str] | None = None) -> dict[tuple[str, str], dict[str, Any]]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--runs", type=int, default=32, help="in each sweep (default: 32)")
    add("--steps", type=int, default=3000, help="of each run (default: 3000)")
    add("--output", type=Path, default=Path("out"), help="folder (default: out)")
    options = parser.parse_args(argv)
    if min(options.runs, options.steps) < 1:
        parser.error("arguments --runs and --steps: expected at least 1")
    table = Table("problem", "method", *SWEEPS, title="IGD, by what the runs differ in")
    found = {}
    for name, problem in PROBLEMS.items():
        for method in METHODS:
            size = options.runs, options.steps
            of = {over: sweep(problem, method, over, *size) for over in SWEEPS}
            found[name, method] = of
            scores = [f"{igd(problem.front, of[over]):.3f}" for over in SWEEPS]
            table.add_row(name, method, *scores)
    rich.print(table)
    options.output.mkdir(parents=True, exist_ok=True)
    draw(found).savefig(options.output / "pareto_front.png", dpi=110)
    print(f"The runs are in {options.output}/pareto_front.png")
    return found


if __name__ == "__main__":
    main()
