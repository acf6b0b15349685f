"""Measure the time until the first step: trace, lower and compile.

    python -m benchmarks.first_step [--quick] [--rows 6,12,heads] [--trace-only]

The steps train a transformer of 6 to 48 layers, with a loss for each of 16 examples,
and four models whose function returns all the losses: a transformer trunk of two layers
with 8 heads, a physics-informed network with 3 losses, a critic with a minibatch for
each of 10 tasks, and 64 heads under one `jax.vmap`:

- SGD: `jax.value_and_grad` of the mean loss, and Adam;
- jaxjd: `jaxjd.value_and_jac`, and `optax.chain(jaxjd.upgrad(), optax.adam(1e-3))`.

Each measurement has a process of its own, because JAX keeps what it has traced. The two
steps alternate. Seconds are of the processor, because other programs slow down tracing,
which is work of one thread; to compile takes several. Times are medians over rounds.
Ratios, of trace and lower together, are medians of those of each round. The script
writes `first_step.md` and `first_step.json` to the folder `results` beside this file.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jaxjd
from benchmarks._models import decoder
from benchmarks._results import FOLDER, save
from benchmarks._tasks import Tasks, agent, physics, transformer_trunk, vectorised
from benchmarks._timing import machine

EXAMPLES, HEADS = 16, 8
# Functions that return all their losses. The other rows are numbers of layers.
TASKS: dict[str, Callable[[], Tasks]] = {
    "heads": partial(transformer_trunk, HEADS),
    "PINN": physics,
    "RL": partial(agent, 10),
    "vmap": partial(vectorised, 64),
}
ROWS = ("6", "12", "24", "48", *TASKS)
STEPS = ("SGD", "jaxjd")
STAGES = ("trace", "lower", "compile")
TARGET = 1.5


def losses(row: str) -> tuple[Callable[..., Any], Any, tuple[Any, ...], Any]:
    """A function of parameters and data, the two, and `in_axes`."""
    if row in TASKS:
        tasks = TASKS[row]()
        return tasks.losses, tasks.params, tasks.data, None
    model = decoder(int(row))
    return model.loss, model.params, model.batch(EXAMPLES), model.in_axes


def training_step(row: str, name: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A whole step, and its arguments."""
    fun, params, data, in_axes = losses(row)
    adam = optax.adam(1e-3)
    tx = adam if name == "SGD" else optax.chain(jaxjd.upgrad(), adam)
    vectorised = fun if in_axes is None else jax.vmap(fun, in_axes)

    def mean_loss(params, *data):
        leaves = jax.tree.leaves(vectorised(params, *data))
        return jnp.mean(jnp.stack([jnp.mean(leaf) for leaf in leaves]))

    def step(params, state, *data):
        if name == "SGD":
            values, gradient = jax.value_and_grad(mean_loss)(params, *data)
        else:
            values, gradient = jaxjd.value_and_jac(fun, in_axes=in_axes)(params, *data)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, values

    return step, (params, tx.init(params), *data)


def measure_here(row: str, name: str, compiled: bool) -> dict[str, float]:
    """Seconds of each stage, in a process that has traced no other step."""
    step, arguments = training_step(row, name)
    start = time.process_time()
    traced = jax.jit(step).trace(*arguments)
    times = [time.process_time()]
    lowered = traced.lower()
    times.append(time.process_time())
    found = {"trace": times[0] - start, "lower": times[1] - times[0]}
    if compiled:
        executable = lowered.compile()
        found["compile"] = time.process_time() - times[1]
        analysis: Any = executable.cost_analysis()
        found["GFLOP"] = analysis["flops"] / 1e9
    return found


def measure(row: str, rounds: int, compiled: bool) -> dict[str, Any]:
    """Each step in each round, compiled in the first one at most."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in STEPS}
    for number in range(rounds):
        for name in STEPS:
            command = [
                sys.executable,
                "-m",
                "benchmarks.first_step",
                "--here",
                row,
                name,
            ]
            ended = subprocess.run(
                command + ["--compile"] * (compiled and number == 0),
                capture_output=True,
                text=True,
                check=True,
            )
            runs[name].append(json.loads(ended.stdout.splitlines()[-1]))
    measured = {
        name: {
            stage: statistics.median(run[stage] for run in of if stage in run)
            for stage in of[0]
        }
        for name, of in runs.items()
    }
    ratios = [
        (jd["trace"] + jd["lower"]) / (sgd["trace"] + sgd["lower"])
        for sgd, jd in zip(runs["SGD"], runs["jaxjd"], strict=True)
    ]
    ratio = statistics.median(ratios)
    return {"row": row, "rounds": rounds, "measured": measured, "ratio": ratio}


def table(results: list[dict[str, Any]]) -> str:
    columns = ["model"]
    columns += [f"{name}: {stage}, s" for name in STEPS for stage in STAGES]
    columns += [f"trace and lower (≤ {TARGET})", "compile", "GFLOP of a step"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for of in results:
        row = of["row"]
        cells = [TASKS[row]().name if row in TASKS else f"{row} layers"]
        sgd, jd = (of["measured"][name] for name in STEPS)
        found = [step.get(stage) for step in (sgd, jd) for stage in STAGES]
        found.append(of["ratio"])
        found += [jd[x] / sgd[x] if x in sgd else None for x in ("compile", "GFLOP")]
        cells += ["-" if number is None else f"{number:.2f}" for number in found]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one round of 6 layers")
    parser.add_argument("--rows", help="comma-separated; default: all")
    parser.add_argument("--trace-only", action="store_true", help="compile nothing")
    parser.add_argument("--here", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--compile", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        row, name = arguments.here
        print(json.dumps(measure_here(row, name, arguments.compile)))
        return
    rows = ROWS[:1] if arguments.quick else ROWS
    if arguments.rows:
        rows = arguments.rows.split(",")
    on = machine(("jax", "flax", "optax"))
    results, text, rounds = [], on, 1 if arguments.quick else 3
    for row in rows:
        results.append(measure(row, rounds, not arguments.trace_only))
        print(table(results).splitlines()[-1], flush=True)
        # Save after each row, so that a run that is cut short loses nothing.
        text = "\n\n".join([on, table(results)])
        save(FOLDER, "first_step", text, {"machine": on, "rows": results})
    print(text)


if __name__ == "__main__":
    main()
