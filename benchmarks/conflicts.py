"""How many losses does the step that is taken increase, after each optimizer?

    python -m benchmarks.conflicts [--quick]

UPGrad's update increases no loss, to first order. Momentum, scaling by coordinate and
weight decay come after it. Two problems are trained by each optimizer, after UPGrad and
after the mean gradient, and `jaxjd.conflicts` looks at every step:

- one loss per example: a network of 196-32-10 tanh units, 3,000 digits of MNIST of 14 x
  14 pixels, batches of 32;
- two tasks: two overlaid digits, of `benchmarks.quality.multimnist`, with the second
  loss multiplied by 10, batches of 64. After UPGrad in the trunk each head has its own
  gradient.

All seeds are one compiled program, `vmap` over a loop over steps. They have the same
first parameters and batches for all optimizers. A loss counts as increasing if the
cosine between its gradient and the step is above 0.001. Learning rates are not tuned.
The last column is the mean loss of a batch in the last 50 steps of each run. The script
writes `conflicts.md` and `conflicts.json` to the folder `results` beside this file.
"""

import argparse
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Key

import jaxjd
from benchmarks._results import FOLDER, save
from benchmarks._timing import machine
from benchmarks.quality import instance_wise, multimnist
from benchmarks.quality._networks import dense_layers

SEEDS = 3
LAST = 50  # How many steps the loss at the end is the mean of.
PACKAGES = ("jax", "optax", "mlxtend")


class Problem(NamedTuple):
    """What is trained; `upgrad` is UPGrad, for those parameters that losses share."""

    title: str
    init: Callable[[Key[Array, ""]], Any]
    batch: Callable[[Key[Array, ""]], Any]
    losses: Callable[..., Any]
    in_axes: tuple[int | None, ...] | None
    upgrad: optax.GradientTransformation


def one_loss_per_example() -> Problem:
    digits = instance_wise.problem(wrong_labels=0.0)
    return Problem(
        "one loss per example, m = 32",
        lambda key: dense_layers(key, (196, 32, 10)),
        digits.batch,
        digits.losses,
        digits.in_axes,
        jaxjd.upgrad(),
    )


def two_tasks() -> Problem:
    digits = multimnist.problem()

    def losses(params, x, y):
        return digits.losses(params, x, y) * jnp.array([1.0, 10.0])

    return Problem(
        "two tasks, the second times 10",
        digits.init,
        digits.batch,
        losses,
        None,
        jaxjd.partition({"shared": jaxjd.upgrad(), "own": jaxjd.sum()}, digits.labels),
    )


OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "SGD": lambda: optax.sgd(3e-2),
    "SGD, momentum 0.9": lambda: optax.sgd(3e-3, momentum=0.9),
    "RMSProp": lambda: optax.chain(
        optax.scale_by_rms(decay=0.999, bias_correction=True), optax.sgd(1e-3)
    ),
    "Adam": lambda: optax.adam(1e-3),
    "AdamW, decay 0.01": lambda: optax.adamw(1e-3, weight_decay=0.01),
    "Muon": lambda: optax.contrib.muon(3e-3),
}


def contenders(problem: Problem) -> dict[tuple[str, str], Any]:
    """By the names of the aggregator and of the optimizer."""
    found: dict[tuple[str, str], Any] = {}
    for name, make in OPTIMIZERS.items():
        found["`mean`", name] = optax.chain(jaxjd.mean(), make())
        found["`upgrad`", name] = optax.chain(problem.upgrad, make())
    ours = jaxjd.precondition_by_rms(problem.upgrad)
    of_ours = "`precondition_by_rms(upgrad)`"
    found[of_ours, "SGD"] = optax.chain(ours, optax.sgd(3e-3))
    found[of_ours, "SGD, momentum 0.9"] = optax.chain(
        ours, optax.sgd(3e-4, momentum=0.9)
    )
    return found


def trained(
    problem: Problem, tx: optax.GradientTransformation, steps: int
) -> Callable[[Key[Array, " s"]], tuple[Array, Array, Array]]:
    """Of keys: the fraction, the worst cosine, the mean loss, each [seeds, steps]."""
    tx = optax.with_extra_args_support(tx)

    def run(key):
        of_params, of_batches = jax.random.split(key)
        params = problem.init(of_params)

        def step(carry, number):
            params, state = carry
            batch = problem.batch(jax.random.fold_in(of_batches, number))
            losses, jac = jaxjd.value_and_jac(problem.losses, in_axes=problem.in_axes)(
                params, *batch
            )
            updates, state = tx.update(jac, state, params)
            shown = jaxjd.conflicts(jac, updates)
            params = optax.apply_updates(params, updates)
            return (params, state), (shown.fraction, shown.worst, losses.mean())

        return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(steps))[1]

    return jax.jit(jax.vmap(run))


def measure(problem: Problem, steps: int) -> list[dict[str, Any]]:
    keys = jax.random.split(jax.random.key(0), SEEDS)
    rows = []
    for (aggregator, optimizer), tx in contenders(problem).items():
        start = time.perf_counter()
        found = trained(problem, tx, steps)(keys)
        fraction, worst, loss = (np.asarray(x, float) for x in found)
        row = {
            "problem": problem.title,
            "aggregator": aggregator,
            "optimizer": optimizer,
            "share of losses": fraction.mean(1).tolist(),
            "share of steps": (fraction > 0).mean(1).tolist(),
            "mean of the worst cosines": worst.mean(1).tolist(),
            "worst cosine": worst.max(1).tolist(),
            "loss": loss[:, -LAST:].mean(1).tolist(),
        }
        rows.append(row)
        seconds = time.perf_counter() - start
        shown = {key: np.round(np.mean(row[key]), 4) for key in COLUMNS}
        print(problem.title, aggregator, optimizer, f"{seconds:.0f} s", shown)
    return rows


COLUMNS = {
    "share of losses": "losses that increase",
    "share of steps": "steps that increase one",
    "mean of the worst cosines": "largest cosine, mean over steps",
    "worst cosine": "largest cosine of all",
    "loss": "loss at the end",
}
PERCENT = ("share of losses", "share of steps")


def table(content: dict[str, Any]) -> str:
    """A Markdown table for each problem, with the standard deviation of the seeds."""
    parts = []
    for title in dict.fromkeys(row["problem"] for row in content["rows"]):
        header = ["aggregator", "then", *COLUMNS.values()]
        lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
        for row in content["rows"]:
            if row["problem"] != title:
                continue
            cells = [row["aggregator"], row["optimizer"]]
            for key in COLUMNS:
                mean, deviation = np.mean(row[key]), np.std(row[key], ddof=1)
                if key in PERCENT:
                    cells.append(f"{mean:.1%} ± {deviation:.1%}")
                elif key == "worst cosine":
                    cells.append(f"{np.max(row[key]):.3f}")
                else:
                    cells.append(f"{mean:.3f} ± {deviation:.3f}")
            lines.append(f"| {' | '.join(cells)} |")
        parts.append(f"{title[0].upper()}{title[1:]}:\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="20 steps, nothing saved")
    parser.add_argument("--folder", type=pathlib.Path, default=FOLDER)
    arguments = parser.parse_args()
    steps = 20 if arguments.quick else 300
    described = machine(PACKAGES)
    print(f"{described}; {SEEDS} seeds from jax.random.key(0), {steps} steps")
    rows = [
        row
        for problem in (one_loss_per_example(), two_tasks())
        for row in measure(problem, steps)
    ]
    content = {"machine": described, "seeds": SEEDS, "steps": steps, "rows": rows}
    print(table(content))
    if not arguments.quick:
        setting = f"{described}; {SEEDS} seeds, {steps} steps of each run"
        text = f"{setting}\n\n{table(content)}"
        save(arguments.folder, "conflicts", text, content)


if __name__ == "__main__":
    main()
