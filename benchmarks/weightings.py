"""Measure how long the weights take, beside TorchJD's.

    python -m benchmarks.weightings [--quick] [--only upgrad,mean]

For each aggregator and number m of losses, the time is the median over calls that
alternate between the libraries in one process. The script prints a table, and writes
`weightings.md`, `weightings.json` and `weightings.png` to `--out`.
"""

import argparse
import inspect
import itertools
import math
import pathlib
import signal
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import torch
import torchjd.aggregation as reference
import torchjd.scalarization as scalarization

import jaxjd
from benchmarks._results import FOLDER, save
from benchmarks._timing import alternating, machine
from interop.aggregators import counterpart
from jaxjd.weighting import Weighting

matplotlib.use("Agg")
import matplotlib.pyplot as plt

METHOD = """\
Each library gets its own float32 arrays, made beforehand. Calls cycle through the same
four problems: Gramians of normal Jacobians with n = 1000, whose gradients share a
direction, so that no point is stationary. If TorchJD needs the Jacobian itself (marked
J), both libraries start from it and return the update. Methods of jaxjd are compiled by
`jax.jit`. Scalarizers (marked L) start from the losses, and both libraries return the
gradient in them; what UW and IMTL-L learn, an Adam of each library learns. The times of
jaxjd include the dispatch but not the compilation, which is given for the largest m. In
both libraries the state passes from call to call. TorchJD is called as its
documentation does, with torch's default number of threads. A cell of TorchJD is left
out if a call takes more than {limit} s. A ratio above 1 means that jaxjd is faster. The
first row is the time of the call itself, the least that a compiled function
can take."""

SIZES = (2, 8, 32, 128)
QUICK_SIZES = (2, 8)
N = 1000
PROBLEMS = 4
# The most seconds for one call of TorchJD, and for all calls of a cell.
LIMIT = 20
BUDGET = 1.0
# For these TorchJD calls cvxpy, scipy, quadprog, or a Python loop that grows with m.
# jaxjd should be TARGET times faster.
SOLVED = {
    "cagrad",
    "fairgrad",
    "gradvac",
    "mgda, 100 steps",
    "nash_mtl",
    "pcd",
    "pcgrad",
    "sdmgrad",
    "upgrad",
}
TARGET = 10


class Row(NamedTuple):
    """Both sides of a comparison, made for m losses.

    `ours` makes a weighting, for Gramians, an optax transformation, for Jacobians, or a
    scalarizer, for losses.
    """

    ours: Callable[[int], Any]
    theirs: Callable[[int], Callable[[torch.Tensor], torch.Tensor]] | None
    of_two_batches: bool = False
    of_losses: bool = False
    least: int = 1


w = jaxjd.weighting
s = jaxjd.scalarization
REGULARISED: dict[str, Any] = {"norm_eps": 1e-4, "reg_eps": 1e-4}


def linear(m: int) -> Any:
    return np.linspace(0.5, 1.5, m, dtype=np.float32) / m


def of_scalarizer(
    make: Callable[[int], Any],
) -> Callable[[int], Callable[[torch.Tensor], torch.Tensor]]:
    """TorchJD's scalarizer as a step: backward, and what it learns."""

    def made(m: int) -> Callable[[torch.Tensor], torch.Tensor]:
        scalarizer = make(m)
        is_famo = isinstance(scalarizer, scalarization.FAMO)
        learned = [] if is_famo else list(scalarizer.parameters())
        adam = torch.optim.Adam(learned, 0.025) if learned else None

        def call(losses: torch.Tensor) -> torch.Tensor:
            losses = losses.clone().requires_grad_()
            scalarizer(losses).backward()
            if is_famo:
                scalarizer.update(0.9 * losses.detach())
            if adam is not None:
                adam.step()
                adam.zero_grad()
            assert losses.grad is not None
            return losses.grad

        return call

    return made


# The methods that take arguments besides the number of losses.
SPECIAL = {
    "(a call)": Row(lambda m: Weighting(tuple, lambda G, s, **_: (G[0], s)), None),
    "cagrad": Row(lambda m: w.cagrad(0.5), lambda m: reference.CAGradWeighting(0.5)),
    "constant": Row(
        lambda m: w.constant(linear(m)),
        lambda m: reference.ConstantWeighting(torch.from_numpy(linear(m))),
    ),
    "cosmos": Row(
        lambda m: s.cosmos(1.0),
        of_scalarizer(lambda m: scalarization.COSMOS(1.0, torch.full((m,), 1 / m))),
        of_losses=True,
    ),
    "cr_mogm(upgrad)": Row(
        lambda m: w.cr_mogm(w.upgrad(**REGULARISED), num_losses=m),
        lambda m: reference.CRMOGMWeighting(reference.UPGradWeighting()),
    ),
    "dwa": Row(
        lambda m: s.dwa(num_losses=m, epoch_steps=100),
        of_scalarizer(lambda m: scalarization.DWA()),
        of_losses=True,
    ),
    "dualproj": Row(
        lambda m: w.dualproj(**REGULARISED), lambda m: reference.DualProjWeighting()
    ),
    "fairgrad": Row(
        lambda m: w.fairgrad(2.0), lambda m: reference.FairGradWeighting(2.0)
    ),
    "famo": Row(
        lambda m: s.famo(num_losses=m),
        of_scalarizer(scalarization.FAMO),
        of_losses=True,
    ),
    "geometric_mean": Row(
        lambda m: s.geometric_mean(),
        of_scalarizer(lambda m: scalarization.GeometricMean()),
        of_losses=True,
    ),
    "gradnorm": Row(lambda m: s.gradnorm(num_losses=m), None, of_losses=True),
    "imtl_l": Row(
        lambda m: s.imtl_l(num_losses=m),
        of_scalarizer(scalarization.IMTLL),
        of_losses=True,
    ),
    "krum": Row(
        lambda m: w.krum(1, 2), lambda m: reference.KrumWeighting(1, 2), least=4
    ),
    "mgda": Row(lambda m: w.mgda(), lambda m: reference.MGDAWeighting()),
    "mgda, 100 steps": Row(
        lambda m: w.mgda(frank_wolfe_steps=100), lambda m: reference.MGDAWeighting()
    ),
    "modo": Row(
        lambda m: w.modo(num_losses=m),
        lambda m: reference.MoDoWeighting(),
        of_two_batches=True,
    ),
    "nash_mtl": Row(
        lambda m: jaxjd.nash_mtl(num_losses=m), lambda m: reference.NashMTL(m)
    ),
    "pbi": Row(
        lambda m: s.pbi(5.0),
        of_scalarizer(lambda m: scalarization.PBI(5.0, torch.full((m,), 1 / m))),
        of_losses=True,
    ),
    "sdmgrad": Row(
        lambda m: w.sdmgrad(num_losses=m),
        lambda m: reference.SDMGradWeighting(),
        of_two_batches=True,
    ),
    "stch": Row(
        lambda m: s.stch(0.1),
        of_scalarizer(lambda m: scalarization.STCH(0.1)),
        of_losses=True,
    ),
    "trimmed_mean": Row(
        lambda m: jaxjd.trimmed_mean(1), lambda m: reference.TrimmedMean(1), least=3
    ),
    "upgrad": Row(
        lambda m: w.upgrad(**REGULARISED), lambda m: reference.UPGradWeighting()
    ),
    "uw": Row(
        lambda m: s.uw(num_losses=m), of_scalarizer(scalarization.UW), of_losses=True
    ),
}


def default(name: str) -> Row:
    """A method that needs no arguments, except perhaps the number of losses."""
    theirs = counterpart(name)
    of_rows = not hasattr(w, name) or (
        theirs is not None and not issubclass(theirs, reference.Weighting)
    )
    make = getattr(jaxjd if of_rows else w, name)
    sized = "num_losses" in inspect.signature(make).parameters
    return Row(
        lambda m: make(num_losses=m) if sized else make(),
        None if theirs is None else lambda m: theirs(),
    )


def rows() -> dict[str, Row]:
    """Every method by name, those of `SPECIAL` with their arguments."""
    weightings = inspect.getmembers(w, inspect.isfunction)
    names = {name for name, _ in weightings if hasattr(jaxjd, name)}
    names |= {"excess_mtl", "graddrop", "momentum_conflict_free", "trimmed_mean"}
    plain = names - {title.split("(")[0] for title in SPECIAL}
    every = {name: default(name) for name in plain} | SPECIAL
    return {name: every[name] for name in sorted(every)}


def problems(m: int, of_two_batches: bool) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Jacobians [m, N], with their Gramians or the cross Gramians of two batches."""
    rng = np.random.default_rng(m)
    jacobians, gramians = [], []
    for _ in range(PROBLEMS):
        # Any two gradients have a cosine of about 0.1.
        J, other = rng.normal(size=(2, m, N)) + 0.33 * rng.normal(size=N)
        J, other = (x.astype(np.float32) / math.sqrt(N) for x in (J, other))
        jacobians.append(J)
        gramians.append(J @ (other if of_two_batches else J).T)
    return jacobians, gramians


def our_call(row: Row, m: int, inputs: list[np.ndarray]) -> tuple[Callable, float]:
    """jaxjd's call, a function without arguments, and its compile time in seconds."""
    made = row.ours(m)
    arrays = itertools.cycle([jnp.asarray(x) for x in inputs])
    params = jnp.zeros(N)
    of_gramian = isinstance(made, Weighting)
    state = made.init(params) if of(row, made) == "J" else made.init()

    @jax.jit
    def step(x, state):
        if row.of_losses:
            # Norms that the loop does not have to compute.
            extra_args = {"losses_after": 0.9 * x, "squared_norms": x * x}

            def scalar(x):
                return made.update(x, state, **extra_args)

            return jax.grad(scalar, has_aux=True)(x)
        if not of_gramian:
            return made.update(x, state, params)
        extra_args = {"cross_gramian": x} if row.of_two_batches else {}
        return made.update(x, state, **extra_args)

    start = time.perf_counter()
    step.lower(next(arrays), state).compile()
    compilation = time.perf_counter() - start

    def call():
        nonlocal state
        result, state = step(next(arrays), state)
        return result

    return call, compilation


def of(row: Row, made: Any) -> str:
    """What a method starts from: losses, the Gramian or the Jacobian."""
    return "L" if row.of_losses else "G" if isinstance(made, Weighting) else "J"


def their_call(row: Row, m: int, inputs: list[np.ndarray]) -> Callable:
    assert row.theirs is not None
    theirs = row.theirs(m)
    tensors = itertools.cycle([torch.from_numpy(x) for x in inputs])
    return lambda: theirs(next(tensors))


def seconds_of(call: Callable) -> float:
    """The seconds of one call, or infinity if it is over the limit."""

    def give_up(signum, frame):
        raise TimeoutError

    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(LIMIT)
    start = time.perf_counter()
    try:
        jax.block_until_ready(call())
    except TimeoutError:
        return math.inf
    finally:
        signal.alarm(0)
    return time.perf_counter() - start


def measure(name: str, row: Row, m: int, theirs_too: bool) -> dict[str, Any]:
    """Measure a cell: the median seconds of a call of each library."""
    jacobians, gramians = problems(m, row.of_two_batches)
    start = of(row, row.ours(m))
    losses = [np.square(J).sum(1) for J in jacobians]
    inputs = {"L": losses, "G": gramians, "J": jacobians}[start]
    ours, compilation = our_call(row, m, inputs)
    calls = {"jaxjd": ours}
    left_out = row.theirs is not None and not theirs_too
    if row.theirs is not None and theirs_too:
        theirs = their_call(row, m, inputs)
        left_out = seconds_of(theirs) > LIMIT
        if not left_out:
            calls["torchjd"] = theirs
    once = sum(min(seconds_of(call) for _ in range(2)) for call in calls.values())
    seconds = alternating(
        {
            name: lambda call=call: jax.block_until_ready(call())
            for name, call in calls.items()
        },
        int(np.clip(BUDGET / once, 3, 500)),
    )
    print(f"  {name}, m = {m}: {seconds}", flush=True)
    return {
        "aggregator": name,
        "m": m,
        "of": start,
        "compile_s": compilation,
        "seconds": seconds,
        "left_out": left_out,
    }


def ratio(cell: dict[str, Any]) -> float | None:
    seconds = cell["seconds"]
    return seconds["torchjd"] / seconds["jaxjd"] if "torchjd" in seconds else None


def missed(cells: list[dict[str, Any]]) -> list[str]:
    """The cells whose ratio to TorchJD is below its target."""
    lines = []
    for cell in cells:
        target = TARGET if cell["aggregator"] in SOLVED else 1
        measured = ratio(cell)
        if measured is not None and measured < target:
            lines.append(
                f"- {cell['aggregator']}, m = {cell['m']}: {measured:.2g} "
                f"(target {target})"
            )
    return lines


def table(cells: list[dict[str, Any]]) -> str:
    sizes = sorted({cell["m"] for cell in cells})
    head = ["aggregator", "from", *(f"µs, m = {m}" for m in sizes)]
    head += [f"TorchJD, m = {m}" for m in sizes]
    head += [f"ratio, m = {m}" for m in sizes] + ["compile s"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name in dict.fromkeys(cell["aggregator"] for cell in cells):
        of_name = {cell["m"]: cell for cell in cells if cell["aggregator"] == name}
        largest = of_name[max(of_name)]
        texts = [name, largest["of"]]
        texts += [microseconds(of_name.get(m), "jaxjd") for m in sizes]
        texts += [microseconds(of_name.get(m), "torchjd") for m in sizes]
        measured = [ratio(of_name[m]) if m in of_name else None for m in sizes]
        texts += ["" if x is None else f"{x:.3g}" for x in measured]
        texts.append(f"{largest['compile_s']:.2f}")
        lines.append("| " + " | ".join(texts) + " |")
    return "\n".join(lines)


def microseconds(cell: dict[str, Any] | None, library: str) -> str:
    if cell is None:
        return ""
    if library not in cell["seconds"]:
        return f"> {LIMIT} s" if cell["left_out"] else ""
    return f"{1e6 * cell['seconds'][library]:,.0f}"


def draw(cells: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Draw the ratios on a logarithmic axis, a line per aggregator, a dot per m."""
    measured = [(cell, ratio(cell)) for cell in cells]
    compared = [(cell, x) for cell, x in measured if x is not None]
    best: dict[str, float] = {}
    for cell, x in compared:
        best[cell["aggregator"]] = max(x, best.get(cell["aggregator"], 0))
    names = sorted(best, key=lambda name: best[name])
    figure, axes = plt.subplots(
        figsize=(6, 0.25 * len(names) + 1), layout="constrained"
    )
    colors = plt.get_cmap("viridis")
    sizes = sorted({cell["m"] for cell in cells})
    for i, m in enumerate(sizes):
        dots = [(x, names.index(c["aggregator"])) for c, x in compared if c["m"] == m]
        color = colors(i / max(len(sizes) - 1, 1))
        axes.plot(*np.transpose(dots), "o", color=color, label=f"m = {m}", alpha=0.8)
    axes.axvline(1, color="tab:gray", linewidth=1)
    axes.set_xscale("log")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("seconds of TorchJD / seconds of jaxjd, on the CPU")
    axes.grid(axis="x", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="m <= 8")
    parser.add_argument("--only", help="comma-separated names of rows")
    parser.add_argument("--out", type=pathlib.Path, default=FOLDER)
    options = parser.parse_args()
    compared = rows()
    if options.only is not None:
        compared = {name: compared[name] for name in options.only.split(",")}
    on = machine(("jax", "torch", "torchjd", "cvxpy", "scipy"))

    cells = []
    for name, row in compared.items():
        theirs_too = True
        for m in QUICK_SIZES if options.quick else SIZES:
            if m < row.least:
                continue
            cells.append(measure(name, row, m, theirs_too))
            theirs_too = not cells[-1]["left_out"]

    below = missed(cells)
    text = "\n\n".join(
        [
            "# The weights, beside TorchJD's",
            f"{METHOD.format(limit=LIMIT)}\n\nMeasured on {on}.",
            table(cells),
            f"These cells are below the target. It is {TARGET} for "
            f"{', '.join(sorted(SOLVED))}, where TorchJD calls a solver or loops in "
            "Python, and 1 for the others:",
            "\n".join(below) if below else "(no cell)",
        ]
    )
    save(options.out, "weightings", text, {"machine": on, "cells": cells})
    draw(cells, options.out / "weightings.png")
    print(text)


if __name__ == "__main__":
    main()
