"""Draw the path of every aggregator on two problems of two parameters and two losses.

The authors of Jacobian descent compare aggregators on these problems
(arXiv:2406.16232, and https://github.com/TorchJD/trajectories):

- EWQ, element-wise quadratic: each loss is the square of one parameter. The losses do
  not conflict, and only the origin is Pareto optimal.
- CQF, convex quadratic form: two long valleys that cross. The losses conflict and
  differ in scale. The Pareto set is a curve between their minima.

    python examples/trajectories.py
    python examples/trajectories.py --steps 100 --output out/short

The script prints how far from the Pareto front each aggregator ends, and draws one
picture per problem with one panel per aggregator. Install what it needs with
`pip install '.[examples]'`.
"""

import argparse
import functools
import inspect
import math
import time
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


class Method(NamedTuple):
    """An aggregator, and the factor `rate` for the problem's learning rate."""

    make: Callable[[], optax.GradientTransformation]
    rate: float = 1.0


# Factors for the learning rate, where updates are longer or shorter than the mean's.
RATES = {
    "graddrop": 0.5,
    "gradvac": 0.5,
    "imtl_g": 2.0,
    "nash_mtl": 2.0,
    "pcgrad": 0.5,
    "sum": 0.5,
}
ARGUMENTS = {"cr_mogm": (jaxjd.weighting.upgrad(),)}


def methods() -> dict[str, Method]:
    """Every aggregator that needs no argument except the number of losses.

    This leaves out `constant`, whose weights could be anything, and aggregators that
    drop losses (`krum`, `trimmed_mean`), which need three losses or more.
    """
    weightings = inspect.getmembers(jaxjd.weighting, inspect.isfunction)
    names = {name for name, _ in weightings if hasattr(jaxjd, name)}
    made = {}
    for name in sorted(names | {"excess_mtl", "graddrop", "trimmed_mean"}):
        make = getattr(jaxjd, name)
        parameters = inspect.signature(make).parameters.values()
        needed = [p.name for p in parameters if p.default is p.empty]
        arguments = ARGUMENTS.get(name, ())
        if set(needed[len(arguments) :]) <= {"num_losses"}:
            sizes = {"num_losses": 2} if "num_losses" in needed else {}
            make = functools.partial(make, *arguments, **sizes)
            made[name] = Method(make, RATES.get(name, 1.0))
    return made


METHODS = methods()


class Problem(NamedTuple):
    """Two losses of two parameters, with starting points and a learning rate.

    `pareto_set` is a line through Pareto optimal points, [k, 2].
    """

    name: str
    losses: Callable[[Float[Array, "2"]], Float[Array, "2"]]
    pareto_set: Float[np.ndarray, "k 2"]
    starts: Float[np.ndarray, "s 2"]
    learning_rate: float
    steps: int


class Descent(NamedTuple):
    """The `paths` of a method, [starts, steps + 1, 2], and the seconds they took."""

    method: str
    paths: Float[np.ndarray, "s t 2"]
    distance: float
    seconds: float


def main(argv: list[str] | None = None) -> dict[str, list[Descent]]:
    options = parse_options(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    descents = {}
    for problem in (element_wise_quadratic(), convex_quadratic_form()):
        steps = options.steps or problem.steps
        descents[problem.name] = [descend(problem, name, steps) for name in METHODS]
        path = options.output / f"trajectories_{problem.name.lower()}.png"
        draw(problem, descents[problem.name]).savefig(path, dpi=100)
        print(f"Drew the paths on {problem.name} in {path}")
    rich.print(results_table(descents))
    return descents


# The problems ------------------------------------------------------------------------


def element_wise_quadratic() -> Problem:
    starts = [[3.0, -2.0], [0.0, -3.0], [-4.0, 4.0], [-3.0, 4.0], [-3.5, -0.75]]
    return Problem(
        "EWQ",
        lambda x: x**2,
        pareto_set=np.zeros((1, 2)),
        starts=np.array(starts),
        learning_rate=0.075,
        steps=50,
    )


def convex_quadratic_form() -> Problem:
    r"""$f_i(x) = (x - u_i)^\top A_i (x - u_i)$, with axes rotated by ±π/16."""
    minima = np.array([[1.0, 0.0], [-1.0, 0.0]])
    curvatures = np.array([[1.0, 0.01], [4.0, 0.01]])
    angle = np.pi / 16
    forms = np.stack(
        [
            turn(angle) @ np.diag(curvatures[0]) @ turn(angle).T,
            turn(-angle) @ np.diag(curvatures[1]) @ turn(-angle).T,
        ]
    )

    def losses(x: Float[Array, "2"]) -> Float[Array, "2"]:
        away = x - minima
        return jnp.einsum("ij,ijk,ik->i", away, forms, away)

    # Pareto optimal points minimise a weighted sum of the losses. For most of the curve
    # the weights are close to 0 and 1.
    shares = 1 / (1 + np.exp(-np.linspace(-16, 16, 2001)))
    weights = np.stack([shares, 1 - shares], axis=1)
    matrices = np.einsum("ki,ijl->kjl", weights, forms)
    sides = np.einsum("ki,ijl,il->kj", weights, forms, minima)
    starts = [[0.8, 0.0], [-1.0, 7.0], [1.5, 6.0], [-1.5, 3.0], [0.5, -4.0]]
    return Problem(
        "CQF",
        losses,
        pareto_set=np.linalg.solve(matrices, sides[..., None])[..., 0],
        starts=np.array(starts),
        learning_rate=0.02,
        steps=2500,
    )


def turn(angle: float) -> Float[np.ndarray, "2 2"]:
    sine, cosine = math.sin(angle), math.cos(angle)
    return np.array([[cosine, -sine], [sine, cosine]])


# The descent -------------------------------------------------------------------------


def descend(problem: Problem, name: str, steps: int) -> Descent:
    """Descend from all starting points at once, with all steps in one `lax.scan`."""
    method = METHODS[name]
    sgd = optax.sgd(problem.learning_rate * method.rate)
    tx = optax.chain(method.make(), sgd)
    jac = jaxjd.jac(problem.losses)

    def path(start: Float[Array, "2"]) -> Float[Array, "t 2"]:
        def step(carry: tuple[Array, Any], _: None) -> tuple[tuple[Array, Any], Array]:
            x, state = carry
            jacobian = jac(x)
            # Stochastic methods need the cross Gramian of two batches. Here both
            # batches are the same. Other methods ignore this argument.
            updates, state = tx.update(
                jacobian, state, x, cross_gramian=jacobian.gramian()
            )
            x = jnp.asarray(optax.apply_updates(x, updates))
            return (x, state), x

        _, points = jax.lax.scan(step, (start, tx.init(start)), length=steps)
        return jnp.concatenate([start[None], points])

    began = time.perf_counter()
    paths = np.asarray(jax.jit(jax.vmap(path))(jnp.asarray(problem.starts, float)))
    seconds = time.perf_counter() - began
    return Descent(name, paths, distance_to_front(problem, paths[:, -1]), seconds)


def distance_to_front(problem: Problem, points: Float[np.ndarray, "s 2"]) -> float:
    """The mean distance of the losses at these points from the Pareto front."""
    losses = jax.vmap(problem.losses)
    front = np.asarray(losses(jnp.asarray(problem.pareto_set)))
    reached = np.asarray(losses(jnp.asarray(points)))[:, None]
    # Find the nearest point on each segment of the front.
    start, piece = front[:-1], np.diff(front, axis=0)
    if len(front) == 1:
        start, piece = front, np.zeros_like(front)
    along = ((reached - start) * piece).sum(-1)
    along = np.clip(along / np.maximum((piece**2).sum(-1), 1e-30), 0, 1)
    nearest = start + along[..., None] * piece
    return float(np.linalg.norm(reached - nearest, axis=-1).min(axis=1).mean())


# The results -------------------------------------------------------------------------


def results_table(descents: dict[str, list[Descent]]) -> Table:
    total = sum(one.seconds for column in descents.values() for one in column)
    table = Table(
        title="Mean distance to the Pareto front, in loss space",
        caption=f"{total:.1f} s in total, including compilation",
    )
    table.add_column("aggregator")
    for name, column in descents.items():
        steps = column[0].paths.shape[1] - 1
        table.add_column(f"{name} after\n{steps} steps", justify="right")
        table.add_column("\nseconds", justify="right")
    for row in zip(*descents.values(), strict=True):
        cells = [(f"{one.distance:.2e}", f"{one.seconds:.2f}") for one in row]
        table.add_row(row[0].method, *[text for cell in cells for text in cell])
    return table


def draw(problem: Problem, descents: list[Descent]) -> Figure:
    """Draw the paths in parameter space, one panel per method."""
    columns = min(5, len(descents))
    rows = math.ceil(len(descents) / columns)
    figure = Figure(figsize=(2.2 * columns, 2.4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    everything = np.concatenate([problem.starts, problem.pareto_set])
    low, high = everything.min(0) - 0.5, everything.max(0) + 0.5
    for panel in panels.flat[len(descents) :]:
        panel.axis("off")
    for panel, descent in zip(panels.flat, descents, strict=False):
        lone = len(problem.pareto_set) == 1
        panel.plot(
            *problem.pareto_set.T,
            color="#e76f51",
            lw=2.5,
            marker="*" if lone else None,
            zorder=3 if lone else 1,
        )
        for path in descent.paths:
            panel.plot(*path.T, color="#2a9d8f", lw=1.2, alpha=0.8)
            panel.plot(*path[0], "o", color="#555555", ms=3)
            panel.plot(*path[-1], "o", color="#1d6f65", ms=4)
        panel.set_title(descent.method, fontsize=9)
        panel.tick_params(labelsize=7)
        panel.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    figure.suptitle(
        f"{problem.name}: from the grey points to the Pareto set (orange)", fontsize=10
    )
    return figure


# The options -------------------------------------------------------------------------


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--steps", type=positive, help="steps per path (default: EWQ 50, CQF 2500)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("out"),
        help="folder for the pictures (default: out)",
    )
    return parser.parse_args(argv)


def positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(
            f"expected an integer of at least 1, got {text!r}"
        )
    return int(text)


if __name__ == "__main__":
    main()
