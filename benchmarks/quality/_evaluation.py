"""Measure one method on one problem: its results at the best rate, and its cost."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.quality._methods import Method
from benchmarks.quality._problem import Problem
from benchmarks.quality._training import STAGES, runs

ROUNDS = 5
TIMED = 0.25  # The seconds that a run of the baseline must last to be timed.
# A run as long as the mean's is only made for a method that costs more than this.
ALIKE = 1.1

# A compiled run of all seeds and rates: from steps per stage to measures.
Compiled = Callable[[int], dict[str, np.ndarray]]


def compiled(problem: Problem, method: Method) -> tuple[Compiled, float]:
    """The run of all seeds and rates as one program, and the seconds to compile it."""
    keys = jax.random.split(jax.random.key(0), problem.seeds)
    rates = jnp.asarray(problem.rates)
    start = time.perf_counter()
    program = jax.jit(runs(problem, method)).lower(keys, rates, 0).compile()
    seconds = time.perf_counter() - start
    return lambda steps: jax.device_get(program(keys, rates, steps)), seconds


def seconds_of(run: Compiled, steps: int) -> float:
    start = time.perf_counter()
    run(steps)
    return time.perf_counter() - start


def cost(run: Compiled, baseline: Compiled) -> tuple[float, float]:
    """Seconds of a step of all runs, and its ratio to the baseline's.

    The measurements between steps are in runs of one step per stage too, and are
    subtracted. The shortest time counts: whatever else the machine does adds to it.
    """
    steps = 2
    while seconds_of(baseline, steps) < TIMED:
        steps *= 2

    rounds = [
        [seconds_of(of, n) for of in (baseline, run) for n in (steps, 1)]
        for _ in range(ROUNDS)
    ]
    base, base_1, ours, ours_1 = np.min(rounds, axis=0)
    seconds = (ours - ours_1) / (STAGES * (steps - 1))
    return seconds, (ours - ours_1) / (base - base_1)


def results(measured: dict[str, np.ndarray]) -> dict[str, Any]:
    """All measures at the end of the runs with the best rate, one for each seed.

    The best rate has the lowest mean validation. A run whose validation is not finite
    is the worst there is.
    """
    validation = measured["validation"][..., -1]
    validation = np.where(np.isfinite(validation), validation, np.inf)
    best = int(validation.mean(axis=1).argmin())
    of_seeds = {
        name: rounded(values[best, :, -1])
        for name, values in measured.items()
        if name != "validation"
    }
    curves = {
        name: rounded(values[best].mean(axis=0))
        for name, values in measured.items()
        if name != "validation"
    }
    return {
        "best": best,
        "validation": rounded(validation.mean(axis=1)),
        "measures": of_seeds,
        "curves": curves,
    }


def rounded(values: np.ndarray) -> list[float | None]:
    """Five digits, or None for what is not finite, which JSON has no number for."""
    return [float(f"{x:.5g}") if np.isfinite(x) else None for x in values.tolist()]


def evaluate(problem: Problem, method: Method, baseline: Compiled) -> dict[str, Any]:
    """One row of a table."""
    run, compiling = compiled(problem, method)
    seconds, ratio = cost(run, baseline)
    per_stage = problem.steps // STAGES
    start = time.perf_counter()
    row = results(run(per_stage))
    found = {
        "ratio": float(f"{ratio:.3g}"),
        "ms_per_step": float(f"{1e3 * seconds:.3g}"),
        "compile_s": round(compiling, 1),
        "run_s": round(time.perf_counter() - start, 1),
        **row,
    }
    if problem.equal_time:
        fewer = max(1, round(per_stage / ratio))
        shorter = row if ratio < ALIKE else results(run(fewer))
        found["equal_time"] = {"measures": shorter["measures"]}
    return found
