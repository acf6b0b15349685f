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


def timed(run: Compiled, steps: int) -> tuple[dict[str, np.ndarray], float]:
    """What a run measures, and the seconds of processor time that it takes.

    Processor time, of all threads, does not count what else the machine does.
    """
    start = time.process_time()
    measured = run(steps)
    return measured, time.process_time() - start


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


def evaluate(
    problem: Problem, method: Method, baseline: float | None
) -> dict[str, Any]:
    """One row of a table, given the processor time of the mean's run."""
    run, compiling = compiled(problem, method)
    per_stage = problem.steps // STAGES
    measured, seconds = timed(run, per_stage)
    found = {
        "processor_s": float(f"{seconds:.3g}"),
        "compile_s": round(compiling, 1),
        **results(measured),
    }
    if problem.equal_time:
        ratio = 1.0 if baseline is None else seconds / baseline
        shorter = found
        if ratio > ALIKE:
            shorter = results(run(max(1, round(per_stage / ratio))))
        found["equal_time"] = {"measures": shorter["measures"]}
    return found
