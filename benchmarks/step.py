"""Measure a step of Jacobian descent beside a step of SGD on the same model.

    python -m benchmarks.step [--quick] [--models MLP,CNN] [--torchjd]

There is one loss per example. For each model and number m of examples, the contenders
alternate in one process, and the times are medians over rounds:

- SGD: `jax.grad` of the mean loss, and a step along it;
- engine: the Gramian, and the combination of the rows with weights that depend on it;
- UPGrad: a whole step, with weights by `jaxjd.weighting.upgrad()`;
- per-example: `jax.vmap(jax.grad)`, and the products of all rows;
- TorchJD: its engine and its whole UPGrad step, relative to an SGD step in torch.

The bounds are what the arithmetic takes: that of the SGD step, whose weight gradients
cost as much as the rows of J or a weighted weight gradient do, and that of the inner
products, each parameter's computed in the way that `jaxjd.explain` names, of all pairs
once. For UPGrad the time of the weights is added, which is measured. A step can be
faster, if its products are larger than those of SGD, and slower, if they are limited by
memory.

A second table says where the time goes. It starts with the forward and backward pass
that give the activations and cotangents, and adds the Gramian, the combination and the
weights.

Memory is what XLA plans for temporary arrays. For torch it is how much the memory of
the process grows. The script writes `step.md`, `step.json` and `step.png` to the folder
`results` beside this file.
"""

import argparse
import functools
import json
import math
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jaxjd
from benchmarks._models import Model, models
from benchmarks._operations import operations
from benchmarks._results import FOLDER, save
from benchmarks._timing import alternating, machine
from jaxjd import engine
from jaxjd.engine.structured import Structured, plan, structured

RATE = 0.1

# The target ratios to SGD: (engine, UPGrad).
TARGETS = {
    ("MLP", 64): (1.3, 1.8),
    ("MLP", 128): (1.3, 2.5),
    ("MLP", 256): (1.6, 6.0),
    ("CNN", 32): (1.3, 1.4),
    ("CNN", 64): (1.3, 1.4),
    ("CNN", 128): (1.3, 1.4),
    ("transformer", 16): (1.25, 1.3),
    ("transformer", 32): (1.25, 1.3),
    ("GRU", 64): (1.5, 2.0),
    ("GRU", 128): (1.5, 2.0),
}


def descend(params: Any, direction: Any) -> Any:
    return jax.tree.map(lambda p, g: p - RATE * g, params, direction)


def steps(model: Model, m: int) -> dict[str, Callable[..., Any]]:
    """The contenders: functions of parameters and examples.

    All but "passes" and "Gramian" return the next parameters.
    """

    def sgd(params, *examples):
        def mean_loss(params):
            return jax.vmap(model.loss, model.in_axes)(params, *examples).mean()

        return descend(params, jax.grad(mean_loss)(params))

    def jacobian_of(params, *examples):
        function, inputs, places, _, _ = engine.trace(
            lambda *args: (model.loss(*args), None),
            (params, *examples),
            model.in_axes,
            identity=model.loss,
        )
        found = plan(function, places[: len(jax.tree.leaves(params))])
        jacobian, _ = structured(found, inputs)
        assert isinstance(jacobian, Structured)  # Not chunked.
        return jacobian

    def weighted(weighting):
        def step(params, *examples):
            jacobian = jacobian_of(params, *examples)
            direction = jacobian.vjp(weighting(jacobian.gramian()))
            tree = jax.tree.structure(params)
            return descend(params, jax.tree.unflatten(tree, direction))

        return step

    def uniform(gramian):
        # The weights must depend on the whole Gramian, or XLA would not compute it
        # (not even behind `jax.lax.optimization_barrier`). XLA cannot drop 0 * x,
        # because x may be NaN.
        return 1 / m + 0 * gramian.sum(0)

    def per_example(params, *examples):
        gradient = jax.vmap(jax.grad(model.loss), model.in_axes)
        leaves, tree = jax.tree.flatten(gradient(params, *examples))
        rows = [leaf.reshape(m, -1) for leaf in leaves]
        weights = uniform(sum(x @ x.T for x in rows))
        combined = [jnp.tensordot(weights, leaf, 1) for leaf in leaves]
        return descend(params, jax.tree.unflatten(tree, combined))

    return {
        "SGD": sgd,
        "passes": lambda *args: jacobian_of(*args).passes,
        "Gramian": lambda *args: jacobian_of(*args).gramian(),
        "engine": weighted(uniform),
        "UPGrad": weighted(jaxjd.weighting.upgrad()),
        "per-example": per_example,
    }


def inner_products(model: Model, examples: tuple[Any, ...]) -> int:
    """The operations of the Gramian and of combining rows, but not of forming them."""
    explained = jaxjd.explain(model.loss, in_axes=model.in_axes)
    found = explained(model.params, *examples)
    m = found.num_losses

    def of_parameter(entry: Any) -> int:
        if entry.contraction == "rows":
            return (m * (m + 1) + 2 * m) * math.prod(entry.shape)
        # The cost counts both (i, j) and (j, i).
        return entry.cost.flops * (m + 1) // (2 * m)

    return sum(map(of_parameter, found.parameters.entries))


def measure(model: Model, m: int, rounds: int) -> dict[str, Any]:
    examples = model.batch(m)
    contenders = steps(model, m)
    compiled: dict[str, Any] = {
        name: jax.jit(step).lower(model.params, *examples).compile()
        for name, step in contenders.items()
    }
    arguments = dict.fromkeys(compiled, (model.params, *examples))
    arguments["weights"] = (compiled["Gramian"](model.params, *examples),)
    weights = jax.jit(jaxjd.weighting.upgrad())
    compiled["weights"] = weights.lower(*arguments["weights"]).compile()
    runners = {
        name: functools.partial(run, step, *arguments[name])
        for name, step in compiled.items()
    }
    for runner in runners.values():
        runner()
    seconds = alternating(runners, rounds)
    extra = inner_products(model, examples)
    bound = 1 + extra / operations(contenders["SGD"], model.params, *examples)
    analyses: dict[str, Any] = {
        name: step.memory_analysis() for name, step in compiled.items()
    }
    memory = {name: of.temp_size_in_bytes for name, of in analyses.items()}
    return {
        "model": model.name,
        "m": m,
        "seconds": seconds,
        "memory": memory,
        "bounds": {
            "engine": bound,
            "UPGrad": bound + seconds["weights"] / seconds["SGD"],
        },
    }


def run(step: Callable[..., Any], *args: Any) -> None:
    jax.block_until_ready(step(*args))


def measure_torchjd(model: Model, m: int, rounds: int) -> dict[str, Any] | None:
    """Measure TorchJD's steps, each with the number of threads that suits it best.

    Each measurement runs in its own process, so that its memory can be measured and
    running out of memory does no harm. Returns None if TorchJD's engine refuses the
    model.
    """
    found = []
    for threads in sorted({1, os.cpu_count() or 1}):
        arguments = (model.name, str(m), str(rounds), str(threads))
        command = [sys.executable, "-m", "benchmarks._torch_models", *arguments]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode:
            reason = ended.stderr.strip().splitlines()[-1:] or [ended.returncode]
            print(f"TorchJD on {model.name}, {m}: {reason[0]}", flush=True)
            return None
        found.append(json.loads(ended.stdout.splitlines()[-1]))
    names = found[0]["seconds"]
    return {
        "seconds": {name: min(of["seconds"][name] for of in found) for name in names},
        "memory": {name: min(of["memory"][name] for of in found) for name in names},
    }


COLUMNS = (
    "model, m",
    "SGD, ms",
    "engine",
    "bound",
    "UPGrad",
    "bound",
    "per-example",
    "TorchJD engine",
    "TorchJD UPGrad",
    "TorchJD / jaxjd, UPGrad",
    "SGD, MB",
    "engine, MB",
    "UPGrad, MB",
    "torch SGD, MB",
    "TorchJD engine, MB",
)


def table(results: list[dict[str, Any]]) -> str:
    """Write a Markdown table of times, ratios to SGD, and temporary memory."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for row in results:
        seconds, memory = row["seconds"], row["memory"]
        targets = TARGETS.get((row["model"], row["m"]), (None, None))
        cells = [f"{row['model']}, {row['m']}", f"{1e3 * seconds['SGD']:.1f}"]
        for name, target in (
            ("engine", targets[0]),
            ("UPGrad", targets[1]),
            ("per-example", None),
        ):
            goal = "" if target is None else f" (≤ {target})"
            cells.append(f"{seconds[name] / seconds['SGD']:.2f}{goal}")
            if name in row["bounds"]:
                cells.append(f"{row['bounds'][name]:.2f}")
        torch = row.get("torchjd")
        times = torch and torch["seconds"]
        for name in ("engine", "UPGrad"):
            cells.append(f"{times[name] / times['SGD']:.1f}" if times else "-")
        faster = times and times["UPGrad"] / seconds["UPGrad"]
        cells.append(f"{faster:.1f}" if faster else "-")
        cells += [f"{memory[name] / 1e6:.1f}" for name in ("SGD", "engine", "UPGrad")]
        for name in ("SGD", "engine"):
            cells.append(f"{torch['memory'][name] / 1e6:.1f}" if torch else "-")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


PARTS = ("passes", "Gramian", "engine", "UPGrad")


def parts_table(results: list[dict[str, Any]]) -> str:
    """Write a Markdown table of cumulative times of a step's parts, relative to SGD."""
    columns = ("model, m", "passes", "and Gramian", "and combination", "and weights")
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in results:
        seconds = row["seconds"]
        ratios = [f"{seconds[part] / seconds['SGD']:.2f}" for part in PARTS]
        lines.append(f"| {row['model']}, {row['m']} | {' | '.join(ratios)} |")
    return "\n".join(lines)


def draw(results: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Draw the ratio to SGD against m, two lines per model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    names = dict.fromkeys(row["model"] for row in results)
    for color, name in enumerate(names):
        rows = [row for row in results if row["model"] == name]
        ms = [row["m"] for row in rows]
        for kind, style in (("engine", "o--"), ("UPGrad", "s-")):
            ratios = [row["seconds"][kind] / row["seconds"]["SGD"] for row in rows]
            label = f"{name}, {kind}"
            axes.plot(ms, ratios, style, color=f"C{color}", label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({row["m"] for row in results}))
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_xlabel("losses m (one per example)")
    axes.set_ylabel("time of a step / time of an SGD step")
    axes.axhline(1, color="gray", linewidth=0.5)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few rounds, smallest m")
    parser.add_argument("--models", help="comma-separated names; default: all")
    parser.add_argument("--torchjd", action="store_true", help="measure TorchJD too")
    arguments = parser.parse_args()
    packages = ("jax", "flax", *(("torch", "torchjd") if arguments.torchjd else ()))
    on = machine(packages)
    wanted = arguments.models.split(",") if arguments.models else None
    results, text = [], on
    for model in models():
        if wanted is not None and model.name not in wanted:
            continue
        for m in model.sizes[:1] if arguments.quick else model.sizes:
            row = measure(model, m, 5 if arguments.quick else 15)
            if arguments.torchjd:
                row["torchjd"] = measure_torchjd(model, m, 3)
            results.append(row)
            print(table([row]).splitlines()[-1], flush=True)
            # Save after each row, so that a run that is cut short loses nothing.
            record = {"machine": on, "rows": results}
            text = "\n\n".join([on, table(results), parts_table(results)])
            save(FOLDER, "step", text, record)
    draw(results, FOLDER / "step.png")
    print(text)


if __name__ == "__main__":
    main()
