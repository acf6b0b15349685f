"""Fill in the tables of methods in the documentation.

    python -m docs.tables

Each method has a hand-written row in the first table of `docs/aggregators.md` and a row
in the tests' registry. This script takes the parameters of the first table from the
signatures, and its marks and the table "Unusual gradients" from the registry. The
tables of `docs/evidence.md` come from the results of `python -m
benchmarks.tasks_quality`, those of `docs/optax.md` from those of `python -m
benchmarks.conflicts`.
"""

import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path

import jaxjd
from benchmarks import conflicts
from benchmarks._results import FOLDER
from benchmarks.quality import PROBLEMS, _report, front
from benchmarks.quality._methods import METHODS
from tests.weighting.registry import AGGREGATORS, KINDS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "aggregators.md"
EVIDENCE = ROOT / "docs" / "evidence.md"
OPTAX = ROOT / "docs" / "optax.md"
# Where the results of a problem go: between these two comments.
RESULTS = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
ROW = re.compile(r"^\| `(\w+)` \|(.*)\|$", re.MULTILINE)


def pages() -> dict[Path, str]:
    """The text that each page should have."""
    page = in_section(PAGE.read_text(), "# The aggregators", completed)
    page = in_section(page, "## Unusual gradients", unusual)
    return {
        PAGE: page,
        EVIDENCE: RESULTS.sub(results, EVIDENCE.read_text()),
        OPTAX: RESULTS.sub(of_conflicts, OPTAX.read_text()),
    }


def results(place: re.Match[str]) -> str:
    """The tables of a problem, of the front, or of everything at a glance."""
    begin, name, end = place.groups()
    if name == "glance":
        contents = [found for name in PROBLEMS if (found := _report.read(FOLDER, name))]
        table = _report.glance(contents, [name for name in METHODS if name != "mean"])
        return f"{begin}\n{_report.markdown(table)}\n\n{end}"
    content = _report.read(FOLDER, name)
    if content is None:
        return f"{begin}{end}"
    of = front.cells if name == front.NAME else _report.cells
    table = _report.markdown(of(content))
    return f"{begin}\n{_report.setting(content)}\n\n{table}\n\n{end}"


def of_conflicts(place: re.Match[str]) -> str:
    content = json.loads((FOLDER / "conflicts.json").read_text())
    begin, _, end = place.groups()
    return f"{begin}\n{conflicts.table(content)}\n\n{end}"


def in_section(text: str, title: str, table: Callable[[str], list[list[str]]]) -> str:
    """Replace the first table of a section of a page."""
    start = text.index(f"{title}\n")
    end = text.find("\n## ", start + len(title))
    section = text[start : end if end > 0 else len(text)]
    old = re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE)[0]
    header, *rows = table(section)
    lines = [written(header), "|" + "---|" * len(header) + "\n", *map(written, rows)]
    return text.replace(old, "".join(lines))


def written(row: list[str]) -> str:
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in row) + "\n"


def cells(section: str) -> dict[str, list[str]]:
    """The cells of each table row, by the name in its first cell."""
    return {
        name: [cell.strip() for cell in line.split("|")]
        for name, line in ROW.findall(section)
    }


def completed(section: str) -> list[list[str]]:
    """The rows, with parameters from the signatures and marks from the registry."""
    header = ["aggregator", "the update is", "looks at", "state", "parameters"]
    table = [[*header, "non-conflicting", "linear", "weighted", "reference"]]
    for name, row in sorted(cells(section).items()):
        claims = AGGREGATORS[name]
        denied = (claims.conflicts, claims.not_linear, claims.not_weighted)
        row[3] = ", ".join(parameters(name))
        for column, counterexample in enumerate(denied, 4):
            mark = "\u2013" if counterexample else "✓"
            row[column] = f"{mark} {row[column][1:].strip()}".strip()
        table.append([f"`{name}`", *row])
    return table


def parameters(name: str) -> list[str]:
    texts = []
    for parameter in inspect.signature(getattr(jaxjd, name)).parameters.values():
        default = parameter.default
        if default is parameter.empty:
            texts.append(f"`{parameter.name}`")
        else:
            default = default.__name__ if callable(default) else repr(default)
            texts.append(f"`{parameter.name}={default}`")
    return texts


def unusual(section: str) -> list[list[str]]:
    del section
    return [
        ["aggregator", *KINDS],
        *(
            [f"`{name}`", *row.unusual.split(" | ")]
            for name, row in AGGREGATORS.items()
        ),
    ]


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
