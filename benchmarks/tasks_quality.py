"""Does it help? Every aggregator and loss balancer on problems with a vector of losses.

    python -m benchmarks.tasks_quality [--only burgers,scales_unequal] [--all] [--again]
        [--methods mean,upgrad]

Each method trains from 5 or 10 seeds with 4 learning rates of Adam, which decay to
zero. The runs are one compiled program: `vmap` over seeds and rates, a loop over steps.
For each method the rate with the best mean validation counts, and the tables show the
mean and the standard deviation of the seeds on the test. The mean gradient has the same
choice.

A seed has the same first parameters and the same batches for all methods, so methods
are compared seed by seed. One is "better" or "worse" if the 95% interval of its mean
difference to the mean gradient, by Student's t, does not contain zero. With 30 methods
in a table, expect about one of them to be called either by chance.

The cost is the processor time of all runs, relative to the mean's. "In the time of the
mean" are runs with fewer steps for methods whose steps cost more.

Results are saved after each method to `results/quality_PROBLEM.json` and `.md`, beside
this file, and what is there is not run again without `--again`. Expensive problems run
about ten methods, and all with `--all`.
"""

import argparse
import pathlib
import time
from typing import Any

import jax

from benchmarks._results import FOLDER
from benchmarks._timing import machine
from benchmarks.quality import PROBLEMS, front
from benchmarks.quality._evaluation import evaluate
from benchmarks.quality._methods import FEW, METHODS, of_problem
from benchmarks.quality._problem import Problem
from benchmarks.quality._report import BASELINE, read, save, write

FRONT_STEPS = 1000
IMAGES = pathlib.Path(__file__).parents[1] / "docs" / "images"
PACKAGES = ("jax", "optax", "scikit-learn", "mlxtend")


def described(name: str, problem: Problem) -> dict[str, Any]:
    """All that is saved about a problem except its rows."""
    params = jax.eval_shape(problem.init, jax.random.key(0))
    return {
        "name": name,
        "title": problem.title,
        "machine": machine(PACKAGES),
        "num_losses": problem.num_losses,
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "steps": problem.steps,
        "seeds": problem.seeds,
        "rates": list(problem.rates),
        "measures": {name: of._asdict() for name, of in problem.measures.items()},
    }


def measure(name: str, wanted: list[str] | None, everything: bool, again: bool) -> None:
    """Run the methods that have no row yet, and save after each."""
    problem = PROBLEMS[name]()
    content = described(name, problem)
    old = read(FOLDER, name)
    if old is not None:
        compared = set(content) - {"machine"}
        if again or any(old.get(key) != content[key] for key in compared):
            old = None  # What it measured was another problem.
    content["rows"] = {} if old is None else old["rows"]
    if old is not None:
        content["machine"] = old["machine"]
    methods = of_problem(problem, everything)
    missing = [
        method
        for method in methods
        if method not in content["rows"] and (wanted is None or method in wanted)
    ]
    missing.sort(key=lambda method: method not in FEW)  # The most telling ones first.
    if not missing:
        write(FOLDER, content)
        return
    for method in missing:
        start = time.perf_counter()
        seconds = content["rows"].get(BASELINE, {}).get("processor_s")
        row = evaluate(problem, methods[method], seconds)
        content["rows"][method] = row
        content["rows"] = {
            x: content["rows"][x] for x in METHODS if x in content["rows"]
        }
        seconds = time.perf_counter() - start
        print(f"{name}: {method}, {seconds:.0f} s, {row['measures']}", flush=True)
        if BASELINE in content["rows"]:
            write(FOLDER, content)


def trace_front(again: bool) -> None:
    """Run the methods that take a preference, over preferences."""
    head = {
        **described(front.NAME, PROBLEMS["resources"]()),
        "steps": FRONT_STEPS,
        "seeds": front.SEEDS,
        "rates": [front.RATE],
    }
    content = (None if again else read(FOLDER, front.NAME)) or {**head, "rows": {}}
    for method in front.METHODS:
        if method not in content["rows"]:
            content["rows"][method] = front.measured(method, FRONT_STEPS)
            volumes = content["rows"][method]["hypervolume"]
            print(f"front: {method}, {volumes}", flush=True)
            save(FOLDER, content)
    front.draw(content, IMAGES / "quality_front.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", help=f"of {', '.join(PROBLEMS)}, front")
    parser.add_argument("--methods", help="comma-separated names; default: all")
    parser.add_argument(
        "--all", action="store_true", help="all methods on expensive problems too"
    )
    parser.add_argument("--again", action="store_true", help="forget saved results")
    arguments = parser.parse_args()
    everything = [*PROBLEMS, front.NAME]
    names = arguments.only.split(",") if arguments.only else everything
    if not set(names) <= set(everything):
        parser.error(f"argument --only: expected some of {everything}, got {names}")
    wanted = arguments.methods.split(",") if arguments.methods else None
    for name in names:
        if name == front.NAME:
            trace_front(arguments.again)
            continue
        measure(name, wanted, arguments.all, arguments.again)


if __name__ == "__main__":
    main()
