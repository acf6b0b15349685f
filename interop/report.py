"""Print how far apart jaxjd and TorchJD are on the same inputs, beside the bounds."""

import argparse
import itertools
import json
import math
import pathlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

from . import (
    aggregators,
    exact,
    gramians,
    optimality,
    scalarizers,
    steps,
    training,
    weights,
)
from .check import Check, Measurement
from .precision import Precision

PRECISIONS: tuple[Precision, ...] = get_args(Precision)

DESCRIPTION = """\
Run jaxjd and TorchJD on the same inputs and print how far apart they are.

The first table gives the largest relative difference, in float32 and in float64, of
Gramians; of weights and updates under TorchJD's regularisation (norm_eps=1e-4,
reg_eps=1e-4); of every other method; of 20 steps of every method with a state; of
every scalarizer and its gradient; and of short training runs, compared with TorchJD's
in float64. Random methods of jaxjd get the numbers that TorchJD drew. The second table
says how far each library's UPGrad, with default settings, is from the exact projection
onto the dual cone. The third table says how well each library solves the problems that
define other methods.

The exit code is 1 if a difference is over its bound, an update of jaxjd conflicts with
a gradient, or TorchJD solves a problem better. Otherwise it is 0.
"""


def checks(quick: bool = False) -> list[Check]:
    """The rows of the first table."""
    rows = [
        *gramians.checks(),
        *weights.checks(),
        *aggregators.checks(),
        *steps.checks(),
        *scalarizers.checks(),
        *training.checks(),
    ]
    return [row for row in rows if row.quick or not quick]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report.

    **Returns:** the exit code, 1 if anything is over its bound.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="fewer rows: all methods of the engine and of aggregation in fewer "
        "variants, and training of the MLP only",
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        type=pathlib.Path,
        help="also write every number to FILE",
    )
    options = parser.parse_args(argv)
    if options.json is not None and not options.json.absolute().parent.is_dir():
        parser.error(f"argument --json: no folder {options.json.absolute().parent}")

    parity = []
    for check in checks(options.quick):
        progress(f"{check.group}: {check.name}")
        parity.append((check, {p: check.measure(p) for p in PRECISIONS}))
    comparisons = []
    for name in exact.QUICK if options.quick else exact.cases():
        progress(f"exact projection: {name}")
        comparisons.append({p: exact.compare(name, p) for p in PRECISIONS})
    problems = []
    for name, case in itertools.product(
        optimality.PROBLEMS, optimality.QUICK if options.quick else optimality.cases()
    ):
        progress(f"optimality: {name}, {case}")
        problems.append({p: optimality.compare(name, case, p) for p in PRECISIONS})
    progress("")

    passed = [m.passed for _, measured in parity for m in measured.values()]
    passed += [c.cosine.passed for both in comparisons for c in both.values()]
    passed += [c.residual.passed for both in problems for c in both.values()]
    print(parity_table(parity))
    print()
    print(exact_table(comparisons))
    print()
    print(optimality_table(problems))
    print()
    print(f"{passed.count(True)} of {len(passed)} within their bounds.")
    if options.json is not None:
        content = {
            "passed": all(passed),
            "parity": [parity_record(*row) for row in parity],
            "exact": [exact_record(both) for both in comparisons],
            "optimality": [optimality_record(both) for both in problems],
        }
        options.json.write_text(json.dumps(content, indent=2) + "\n")
    return 0 if all(passed) else 1


def parity_table(rows: Iterable[tuple[Check, Mapping[Precision, Measurement]]]) -> str:
    header = ["", "largest relative difference", "float32", "bound", "float64", "bound"]
    lines = []
    for check, measured in rows:
        cells = [check.group, check.name]
        for precision in PRECISIONS:
            measurement = measured[precision]
            cells += [f"{measurement.value:.1e}", f"{measurement.bound:.0e}"]
        lines.append([*cells, verdict(measured.values())])
    note = (
        "Random methods: TorchJD drew the numbers, and jaxjd was given the same ones.\n"
        "(It is an error if jaxjd is not given all of them.)"
    )
    return table([*header, ""], lines) + "\n\n" + note


def exact_table(rows: Iterable[Mapping[Precision, exact.Comparison]]) -> str:
    header = [
        "UPGrad, default settings",
        "",
        "distance to exact",
        "",
        "worst cosine",
        "",
    ]
    lines = [["", "", "jaxjd", "TorchJD", "jaxjd", "TorchJD", ""]]
    for both in rows:
        for precision in PRECISIONS:
            row = both[precision]
            lines.append(
                [
                    row.name,
                    precision,
                    f"{row.jaxjd.distance:.1e}",
                    f"{row.torchjd.distance:.1e}",
                    f"{row.jaxjd.cosine:+.1e}",
                    f"{row.torchjd.cosine:+.1e}",
                    verdict([row.cosine]),
                ]
            )
    note = (
        "The distance is ‖Jᵀ(w - w*)‖ / ‖Jᵀw*‖, where w* are the exact weights.\n"
        "The cosine is the smallest between the update and a gradient: below 0, a\n"
        f"loss increases. jaxjd must reach {exact.WORST_COSINE:g}; TorchJD is shown "
        "for comparison."
    )
    return table([*header, ""], lines) + "\n\n" + note


def optimality_table(
    rows: Iterable[Mapping[Precision, optimality.Comparison]],
) -> str:
    header = ["how far from solved", "", "float32", "", "float64", ""]
    lines = [["", "", "jaxjd", "TorchJD", "jaxjd", "TorchJD", ""]]
    for both in rows:
        cells = [both["float32"].method, both["float32"].case]
        for precision in PRECISIONS:
            row = both[precision]
            cells += [f"{row.jaxjd:.1e}", f"{row.torchjd:.1e}"]
        lines.append([*cells, verdict(row.residual for row in both.values())])
    note = (
        "All are relative. mgda: how much longer the update is than the shortest.\n"
        "cagrad: how much more progress the worst-off loss could make.\n"
        "fairgrad: max |(Gw)ᵢ wᵢ^(1/alpha) - 1|. nash_mtl: max |(Gw)ᵢ wᵢ - 1|.\n"
        "jaxjd passes if it is at least as close as TorchJD, up to rounding: "
        + ", ".join(f"{x:g} in {p}" for p, x in optimality.ROUNDING.items())
        + "."
    )
    return table([*header, ""], lines) + "\n\n" + note


def parity_record(
    check: Check, measured: Mapping[Precision, Measurement]
) -> dict[str, Any]:
    numbers = {
        p: {"difference": number(m.value), "bound": m.bound, "passed": m.passed}
        for p, m in measured.items()
    }
    return {"group": check.group, "name": check.name, **numbers}


def exact_record(both: Mapping[Precision, exact.Comparison]) -> dict[str, Any]:
    record: dict[str, Any] = {}
    for precision, row in both.items():
        record["name"] = row.name
        record[precision] = {
            "jaxjd": {k: number(x) for k, x in vars(row.jaxjd).items()},
            "torchjd": {k: number(x) for k, x in vars(row.torchjd).items()},
            "passed": row.cosine.passed,
        }
    return record


def optimality_record(
    both: Mapping[Precision, optimality.Comparison],
) -> dict[str, Any]:
    record: dict[str, Any] = {}
    for precision, row in both.items():
        record |= {"method": row.method, "case": row.case}
        record[precision] = {
            "jaxjd": number(row.jaxjd),
            "torchjd": number(row.torchjd),
            "passed": row.residual.passed,
        }
    return record


def number(value: float) -> float | None:
    """The value, or None for NaN and infinity, which JSON lacks."""
    return value if math.isfinite(value) else None


def verdict(measurements: Iterable[Measurement]) -> str:
    return "pass" if all(m.passed for m in measurements) else "FAIL"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a Markdown table, padded so that it also reads well as plain text."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def progress(what: str) -> None:
    """Show one line, which the next overwrites. Print nothing outside a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{what}", end="", file=sys.stderr, flush=True)
