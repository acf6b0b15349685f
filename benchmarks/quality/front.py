"""The front that preferences trace: one run for each preference, all of them at once.

The world is resource gathering, with its three rewards. For each method that takes a
preference, `vmap` trains a policy for each of 15 preferences, spread evenly over the
simplex, from each seed. The hypervolume is the part of the cube of possible losses that
the policies of one seed dominate: 1 if one policy were the best in all objectives.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import jaxjd
from benchmarks.quality import vector_reward
from benchmarks.quality._evaluation import rounded
from benchmarks.quality._methods import Make, Method
from benchmarks.quality._training import STAGES, runs

NAME = "front"
PARTS = 4  # The preferences are multiples of 1/4.
SEEDS, RATE = 3, 3e-2

METHODS: dict[str, tuple[Callable[[Float[Array, " m"]], Any], bool]] = {
    # Makes it from a preference; whether it needs the losses.
    "constant": (jaxjd.constant, False),
    "upgrad": (jaxjd.upgrad, False),
    "dualproj": (jaxjd.dualproj, False),
    "cagrad": (lambda u: jaxjd.cagrad(preference=u), False),
    "conflict_free": (jaxjd.conflict_free, False),
    "aligned_mtl": (jaxjd.aligned_mtl, False),
    "stch": (lambda u: jaxjd.stch(0.1, u), True),
    "cosmos": (lambda u: jaxjd.cosmos(1.0, u), True),
    "pbi": (lambda u: jaxjd.pbi(preference=u), True),
}


def preferences(m: int) -> Float[np.ndarray, "p m"]:
    """All multiples of 1/PARTS on the simplex."""
    whole = np.indices(m * [PARTS + 1]).reshape(m, -1).T
    return (whole[whole.sum(axis=1) == PARTS] / PARTS).astype(np.float32)


def losses_of(
    make: Callable[[Float[Array, " m"]], Any], of_losses: bool, steps: int, seeds: int
) -> Float[np.ndarray, "p seeds m"]:
    """The exact losses of the policies, for each preference and seed."""
    problem = vector_reward.problem("resources")

    def run(preference: Float[Array, " m"]) -> dict[str, Array]:
        made: Make = lambda _: make(preference)  # noqa: E731
        each = runs(problem, Method(made, of_losses))
        keys = jax.random.split(jax.random.key(1), seeds)
        return each(keys, jnp.array([RATE]), steps // STAGES)

    found = jax.jit(jax.vmap(run))(preferences(problem.num_losses))
    names = vector_reward.OBJECTIVES
    return np.stack([found[name][:, 0, :, -1] for name in names], axis=-1)


def hypervolume(losses: Float[np.ndarray, "p m"]) -> float:
    """The part of the unit cube in which each point is worse than one of `losses`.

    The coordinates of the points divide the cube into cells, each dominated as a whole
    or not at all.
    """
    losses = np.clip(losses, 0, 1)
    edges = [np.unique([0, 1, *column]) for column in losses.T]
    lower = np.stack(np.meshgrid(*[e[:-1] for e in edges], indexing="ij"), axis=-1)
    sizes = np.stack(np.meshgrid(*map(np.diff, edges), indexing="ij"), axis=-1)
    dominated = (losses <= lower[..., None, :]).all(axis=-1).any(axis=-1)
    return float((dominated * sizes.prod(axis=-1)).sum())


def front(losses: Float[np.ndarray, "p m"]) -> Float[np.ndarray, "q m"]:
    """The points that no other one dominates."""
    better = (losses[:, None] <= losses).all(-1) & (losses[:, None] < losses).any(-1)
    return losses[~better.any(axis=0)]


def measured(name: str, steps: int, seeds: int = SEEDS) -> dict[str, Any]:
    losses = losses_of(*METHODS[name], steps, seeds)
    of_seeds = losses.swapaxes(0, 1)
    return {
        "hypervolume": rounded(np.array([hypervolume(x) for x in of_seeds])),
        "losses": [[rounded(point) for point in x] for x in of_seeds],
    }


def cells(content: dict[str, Any]) -> list[list[str]]:
    """The table, the largest hypervolume first."""
    table = [["method", "hypervolume", "best gold", "best gem", "points on the front"]]

    def size(name: str) -> float:
        return float(np.mean(content["rows"][name]["hypervolume"]))

    for name in sorted(content["rows"], key=size, reverse=True):
        row = content["rows"][name]
        values, losses = np.array(row["hypervolume"]), np.array(row["losses"])
        best = 1 - losses.min(axis=(0, 1))
        points = np.mean([len(front(x)) for x in losses])
        table.append(
            [
                f'<a id="front-{name.replace("_", "-")}"></a>{name}',
                f"{values.mean():.3f} ± {values.std(ddof=1):.3f}",
                *(f"{x:.2f}" for x in best[:2]),
                f"{points:.1f}",
            ]
        )
    return table


def draw(content: dict[str, Any], path: pathlib.Path) -> None:
    """Draw the returns of the policies of all seeds, one panel per method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.4), layout="constrained")
    panels = figure.subplots(3, 3, sharex=True, sharey=True).ravel()
    for axes, (name, row) in zip(panels, content["rows"].items(), strict=False):
        gold, gem, safe = 1 - np.array(row["losses"]).reshape(-1, 3).T
        shown = axes.scatter(gold, gem, c=safe, vmin=0.5, vmax=1, s=18)
        axes.set_title(f"{name}: {np.mean(row['hypervolume']):.2f}", fontsize=9)
    for axes in panels[-3:]:
        axes.set_xlabel("gold")
    for axes in panels[::3]:
        axes.set_ylabel("gems")
    figure.colorbar(shown, ax=panels, label="not attacked")
    figure.savefig(path, dpi=100)
