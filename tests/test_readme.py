"""The programs in the README run, and their losses fall."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from docs import tables
from tests.weighting.registry import AGGREGATORS, COMBINATORS

README = (Path(__file__).parents[1] / "README.md").read_text()
PROGRAMS = re.findall(r"^### (.+?)$.*?^```python\n(.*?)^```$", README, re.DOTALL | re.M)
REPORT = """
values = globals().get("values") or {"mean": losses.mean()}
print(max(map(float, values.values())))
"""


def test_all_programs_are_found():
    assert len(PROGRAMS) == README.count("```python") == 2


# At the start the largest printed loss of each program is above 1. The second program
# ends at 0.28 to 0.37, depending on how each release of JAX rounds.
@pytest.mark.parametrize(
    ("program", "threshold"),
    [
        (program, bound)
        for (_, program), bound in zip(PROGRAMS, [0.2, 0.45], strict=True)
    ],
    ids=[title for title, _ in PROGRAMS],
)
def test_program(program, threshold):
    # Run in a separate process, compiled as for a user, without the tests' XLA flags.
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", program + REPORT],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout.split()[-1]) < threshold


def test_the_tables_of_methods_are_written():
    """The tables are as `make format` writes them, with a row for every method."""
    for path, text in tables.pages().items():
        assert path.read_text() == text
    page = tables.PAGE.read_text()
    assert list(tables.cells(page.split("\n## ")[0])) == list(AGGREGATORS)
    for combinator in COMBINATORS:
        assert re.search(rf"\b{combinator}\b", page.split("\n## Combining")[1])
