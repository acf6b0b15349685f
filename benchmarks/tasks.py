"""Measure a step of Jacobian descent with a few losses, beside a step along their sum.

    python -m benchmarks.tasks [--quick] [--rows "PINN,MLP trunk"] [--torchjd]

The rows are what people have a few losses for:

- PINN: Burgers' equation, a network of 4 x 64 tanh units, and a dict of 3 losses: the
  residual at 2,000 points, the initial and the boundary condition at 256 points each;
- RL: the critic of a multi-task agent, a network of 2 x 256 units that is told the
  task, with a minibatch of 256 transitions for each of 10 tasks;
- MLP trunk: 784-512-512-512, 256 examples, and m linear heads;
- CNN trunk: the convolutions of `benchmarks.step`, 64 images, and m linear heads;
- transformer trunk: the decoder of `benchmarks.step`, 32 x 64 tokens, and 4 linear
  heads;
- one vmap: an MLP trunk 64-256-256, 512 examples, and 64 heads that are stacked, so
  that their losses are one vectorised computation.

With a trunk, the trunk has UPGrad and each head its own gradient: `jaxjd.partition`.
Otherwise all parameters are shared, and have UPGrad.

Every number is a ratio to the step along the gradient of the sum of the losses, with
the same parameters, the same data and the same optimizer, Adam, which is included on
both sides. Each contender is compiled beforehand and runs right after that step, over
rounds, in one process. The ratio is the median of those of these pairs. The contenders:

- auto, structured, dense, chunked: `jaxjd.value_and_jac`, by its methods;
- by hand: one `jax.grad` for each loss, the Gramian of these gradients, their
  combination;
- features: `jaxjd.aggregate(weighting, features=...)` for the trunk: the Gramian of the
  gradients with respect to its output, and one backward pass through it. These are
  other weights than those of the contenders above. By hand: the same without jaxjd;
- TorchJD: its `mtl_backward`, or `backward` if there is no trunk, with all rows at once
  or one by one, whichever is faster, relative to a step along the sum in torch.

Before they are timed, all contenders are checked to take the same step. What "auto" and
the method that it chose compile to is timed once.

The bound is what the arithmetic of the rows takes: the step along the sum, with m
backward passes through the trunk instead of one, and UPGrad's weights. A backward pass
gives the gradients of activations and weights from those of the features. XLA counts
the operations of the passes. They share the time of the step along the sum, less that
of Adam alone, which is measured, as is that of the weights. A step can be faster: if
rows are passed back together, if the inner products come from the factors of the
gradients, and if the weights come from the features.

A second table says what XLA plans for temporary arrays, and how long it takes to trace
and lower the step. The script writes `tasks.md`, `tasks.json` and `tasks.png` to the
folder `results` beside this file.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxjd
from benchmarks._results import FOLDER, save
from benchmarks._tasks import FEATURES, ROWS, Tasks
from benchmarks._timing import machine, paired

RATE = 1e-3
# How far apart the steps of two contenders may be, relative to their length. UPGrad's
# weights are as exact as float32 allows.
TOLERANCE = 1e-5
UPGRAD = jaxjd.weighting.upgrad()


class Step(NamedTuple):
    """`run(params, state, *data)` returns the next parameters and state."""

    run: Callable[..., tuple[Any, optax.OptState]]
    state: optax.OptState


def along(direction: Callable[..., Any], params: Any) -> Step:
    """The step of Adam along `direction(params, *data)`."""
    adam = optax.adam(RATE)

    def run(params, state, *data):
        updates, state = adam.update(direction(params, *data), state, params)
        return optax.apply_updates(params, updates), state

    return Step(run, adam.init(params))


def by_jaxjd(tasks: Tasks, method: Any, features: str | None = None) -> Step:
    aggregator = jaxjd.aggregate(UPGRAD, features=features)
    if tasks.shared is not None:
        aggregator = jaxjd.partition(
            {"shared": aggregator, "own": jaxjd.sum()},
            {"trunk": "shared", "heads": "own"},
        )
    transformation = optax.chain(aggregator, optax.adam(RATE))

    def run(params, state, *data):
        _, jac = jaxjd.value_and_jac(tasks.losses, method=method)(params, *data)
        updates, state = transformation.update(jac, state, params)
        return optax.apply_updates(params, updates), state

    return Step(run, transformation.init(tasks.params))


def combine(rows: list[Any], weights: jax.Array) -> Any:
    return jax.tree.map(
        lambda *row: sum(w * x for w, x in zip(weights, row, strict=True)), *rows
    )


def gramian(rows: list[Any]) -> jax.Array:
    leaves = zip(*map(jax.tree.leaves, rows), strict=True)
    matrices = [jnp.stack([jnp.ravel(x) for x in leaf]) for leaf in leaves]
    return jnp.stack([x @ x.T for x in matrices]).sum(0)


def of_sum(tasks: Tasks) -> Callable[..., Any]:
    def direction(params, *data):
        def total(params):
            return sum(x.sum() for x in jax.tree.leaves(tasks.losses(params, *data)))

        return jax.grad(total)(params)

    return direction


def by_hand(tasks: Tasks) -> Callable[..., Any]:
    """One `jax.grad` for each loss."""

    def direction(params, *data):
        def loss(params, i):
            losses = jax.tree.leaves(tasks.losses(params, *data))
            return losses[i] if len(losses) == tasks.m else losses[0][i]

        rows = [jax.grad(loss)(params, i) for i in range(tasks.m)]
        if tasks.shared is None:
            return combine(rows, UPGRAD(gramian(rows)))
        trunks = [row["trunk"] for row in rows]
        return {
            "trunk": combine(trunks, UPGRAD(gramian(trunks))),
            "heads": jax.tree.map(lambda *x: sum(x), *[row["heads"] for row in rows]),
        }

    return direction


def from_features(tasks: Tasks) -> Callable[..., Any]:
    """The weights for the gradients of the features, by hand."""
    shared = tasks.shared
    assert shared is not None

    def direction(params, x, labels):
        features, pullback = jax.vjp(lambda p: shared.trunk(p, x), params["trunk"])
        both = jax.grad(shared.head, (0, 1))
        if shared.vectorised:
            heads, rows = jax.vmap(both, (0, None, 0))(
                params["heads"], features, labels
            )
        else:
            pairs = [
                both(head, features, wanted)
                for head, wanted in zip(params["heads"], labels, strict=True)
            ]
            heads, rows = [head for head, _ in pairs], jnp.stack([x for _, x in pairs])
        flat = rows.reshape(tasks.m, -1)
        weights = UPGRAD(flat @ flat.T)
        (trunk,) = pullback((weights @ flat).reshape(features.shape))
        return {"trunk": trunk, "heads": heads}

    return direction


METHODS = ("structured", "dense", "chunked")


def steps(tasks: Tasks) -> dict[str, Step]:
    """The contenders; "SGD" is the step along the sum of the losses."""
    found = {"SGD": along(of_sum(tasks), tasks.params)}
    for method in ("auto", *METHODS):
        found[method] = by_jaxjd(tasks, method)
    found["by hand"] = along(by_hand(tasks), tasks.params)
    if tasks.shared is not None:
        found["features"] = by_jaxjd(tasks, "auto", FEATURES)
        found["features, by hand"] = along(from_features(tasks), tasks.params)
    return found


def operations(function: Callable[..., Any], *args: Any) -> float:
    """How many operations XLA counts in a function."""
    analysis: Any = jax.jit(function).lower(*args).cost_analysis()
    return analysis["flops"]


def extra_passes(tasks: Tasks) -> float:
    """The operations of all backward passes but one, over those for the sum."""
    if tasks.shared is None:
        return 0.0
    whole = operations(of_sum(tasks), tasks.params, *tasks.data)
    trunk, x = tasks.shared.trunk, tasks.data[0]
    args = tasks.params["trunk"], x
    features = jax.eval_shape(trunk, *args)

    def both(params, x, cotangent):
        return jax.vjp(lambda params: trunk(params, x), params)[1](cotangent)

    backward = operations(both, *args, features) - operations(trunk, *args)
    return (tasks.m - 1) * backward / whole


def lowered(function: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """A function traced and lowered as if for the first time, and the seconds taken."""
    jax.clear_caches()
    start = time.perf_counter()
    found = jax.jit(function).lower(*args)
    return found, time.perf_counter() - start


def check(updates: dict[str, Any]) -> dict[str, float]:
    """How far each update is from the same by hand, relative to its length.

    **Raises:** `AssertionError` if it is too far.
    """

    def flat(tree):
        return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])

    distances = {}
    for name, update in updates.items():
        same = "features, by hand" if name == "features" else "by hand"
        if name in ("SGD", same):
            continue
        reference = updates[same]
        if name == "features, by hand":
            # Its weights differ, but the heads have their own gradients.
            update, reference = update["heads"], reference["heads"]
        expected = flat(reference)
        apart = np.linalg.norm(flat(update) - expected) / np.linalg.norm(expected)
        distances[name] = float(apart)
        assert apart <= TOLERANCE, f"{name} is {apart:.1e} from the update by hand"
    return distances


def measure(tasks: Tasks, rounds: int) -> dict[str, Any]:
    contenders = steps(tasks)
    compiled: dict[str, Any] = {}
    tracing, updates, runners = {}, {}, {}
    programs: dict[str, str] = {}  # The name of the first contender with this program.
    same: dict[str, str] = {}

    def add(name: str, function: Callable[..., Any], *args: Any) -> Any:
        """Compile a function, put it among those to be timed, and run it."""
        traced, tracing[name] = lowered(function, *args)
        same[name] = programs.setdefault(traced.as_text(), name)
        if same[name] == name:
            compiled[name] = traced.compile()
            runners[name] = lambda: jax.block_until_ready(compiled[name](*args))
        return compiled[same[name]](*args)

    for name, step in contenders.items():
        _, state = add(name, step.run, tasks.params, step.state, *tasks.data)
        # Adam's average of the updates, which was zero: a tenth of this one.
        updates[name] = optax.tree.get(state, "mu")
    distances = check(updates)
    adam = along(lambda params: params, tasks.params)
    add("Adam", adam.run, tasks.params, adam.state)
    rows = jax.random.normal(jax.random.key(0), (tasks.m, 1000))
    add("weights", UPGRAD, rows @ rows.T)

    timings = paired(runners, "SGD", rounds)
    ratios = {name: timings[of].ratio for name, of in same.items()}
    memory = {
        name: compiled[of].memory_analysis().temp_size_in_bytes
        for name, of in same.items()
    }
    extra = extra_passes(tasks) * (1 - ratios["Adam"])
    return {
        "tasks": tasks.name,
        "m": tasks.m,
        "method": jaxjd.explain(tasks.losses)(tasks.params, *tasks.data).method,
        "seconds": {name: timings[of].seconds for name, of in same.items()},
        "ratios": ratios,
        "bound": 1 + extra + ratios["weights"],
        "memory": memory,
        "tracing": tracing,
        "distances": distances,
    }


def measure_torchjd(tasks: Tasks, rounds: int) -> dict[str, float]:
    """Seconds of TorchJD's step and of torch's own along the sum, in a process."""
    arguments = (tasks.name, str(tasks.m), str(rounds))
    command = [sys.executable, "-m", "benchmarks._torch_tasks", *arguments]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(ended.stdout.splitlines()[-1])


COLUMNS = (
    "tasks, m",
    "sum, ms",
    "auto",
    "bound",
    "auto is",
    *METHODS,
    "by hand",
    "features",
    "features, by hand",
    "TorchJD",
)


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """The ratios of a row: to the step along the sum, each in its own framework."""
    torch = row.get("torchjd")
    return {
        **row["ratios"],
        "bound": row["bound"],
        **({"TorchJD": torch["TorchJD"] / torch["SGD"]} if torch else {}),
    }


def table(results: list[dict[str, Any]]) -> str:
    """Write a Markdown table of ratios to the step along the sum."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for row in results:
        cells = [f"{row['tasks']}, {row['m']}", f"{1e3 * row['seconds']['SGD']:.1f}"]
        for column in COLUMNS[2:]:
            if column == "auto is":
                cells.append(row["method"])
            else:
                number = numbers(row).get(column)
                cells.append("-" if number is None else f"{number:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def costs_table(results: list[dict[str, Any]]) -> str:
    """Write a Markdown table of temporary memory, and of the time until compilation."""
    columns = (
        "tasks, m",
        "sum, MB",
        "auto, MB",
        "by hand, MB",
        "trace the sum, s",
        "trace auto, s",
        "ratio",
    )
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in results:
        memory, tracing = row["memory"], row["tracing"]
        cells = [f"{row['tasks']}, {row['m']}"]
        cells += [f"{memory[name] / 1e6:.1f}" for name in ("SGD", "auto", "by hand")]
        cells += [f"{tracing[name]:.2f}" for name in ("SGD", "auto")]
        cells.append(f"{tracing['auto'] / tracing['SGD']:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# What the picture shows: the columns, as its legend names them.
DRAWN = {
    "auto": "jaxjd",
    "by hand": "one jax.grad per loss",
    "TorchJD": "TorchJD / SGD in torch",
    "features": "jaxjd, weights from the features",
}


def draw(results: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Draw the ratios of every row, and where the bounds are."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    width = 0.8 / len(DRAWN)
    for n, (column, label) in enumerate(DRAWN.items()):
        found = {
            place + n * width: numbers(row)[column]
            for place, row in enumerate(results)
            if column in numbers(row)
        }
        if found:
            places, ratios = list(found), list(found.values())
            axes.bar(places, ratios, width, align="edge", label=label)
    starts = list(range(len(results)))
    ends = [start + 0.8 for start in starts]
    bounds = [row["bound"] for row in results]
    axes.hlines(bounds, starts, ends, "black", "dotted", label="bound")
    axes.axhline(1, color="gray", linewidth=0.5)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    labels = [f"{row['tasks']}\n{row['m']}".replace(" trunk", "") for row in results]
    axes.set_xticks([start + 0.4 for start in starts], labels, fontsize=8)
    axes.set_ylabel("time of a step / time of a step\nalong the sum of the losses")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few rounds, few rows")
    parser.add_argument("--rows", help="comma-separated names; default: all")
    parser.add_argument("--torchjd", action="store_true", help="measure TorchJD too")
    arguments = parser.parse_args()
    packages = ("jax", "flax", *(("torch", "torchjd") if arguments.torchjd else ()))
    on = machine(packages)
    wanted = arguments.rows.split(",") if arguments.rows else None
    results, text = [], on
    for make, args in ROWS:
        tasks = make(*args)
        if wanted is not None and tasks.name not in wanted:
            continue
        if arguments.quick and tasks.m > 10:
            continue
        row = measure(tasks, 3 if arguments.quick else 9)
        if arguments.torchjd:
            row["torchjd"] = measure_torchjd(tasks, 3)
        results.append(row)
        print(table([row]).splitlines()[-1], flush=True)
        # Save after each row, so that a run that is cut short loses nothing.
        record = {"machine": on, "rows": results}
        text = "\n\n".join([on, table(results), costs_table(results)])
        save(FOLDER, "tasks", text, record)
    draw(results, FOLDER / "tasks.png")
    print(text)


if __name__ == "__main__":
    main()
