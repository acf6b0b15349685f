"""Do the programs in the README run, and learn?"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import jaxjd

README = (Path(__file__).parents[1] / "README.md").read_text()
PROGRAMS = re.findall(r"^### (.+?)$.*?^```python\n(.*?)^```$", README, re.DOTALL | re.M)
REPORT = """
values = globals().get("values") or {"mean": losses.mean()}
print(max(map(float, values.values())))
"""


def test_all_programs_are_found():
    assert len(PROGRAMS) == README.count("```python") == 3


# At the start the largest of the printed losses is above 1 in each.
@pytest.mark.parametrize(
    ("program", "threshold"),
    [
        (program, bound)
        for (_, program), bound in zip(PROGRAMS, [0.35, 0.2, 0.2], strict=True)
    ],
    ids=[title for title, _ in PROGRAMS],
)
def test_program(program, threshold):
    if "flax" in program:
        pytest.importorskip("flax")
    # In a process of its own, compiled as a user's would be, not as the tests are.
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", program + REPORT],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout.split()[-1]) < threshold


def test_every_method_has_its_row():
    section = README.split("## Methods")[1].split("\n## ")[0]
    rows = set(re.findall(r"^\| `(\w+)` \|", section, re.M))
    weightings = {n for n in vars(jaxjd.weighting) if n[0].islower() and n[0] != "_"}
    transformations = {n for n in weightings if hasattr(jaxjd, n)}
    assert rows == transformations | {"graddrop", "trimmed_mean", "excess_mtl"}
    for combinator in weightings - transformations:
        assert re.search(rf"\b{combinator}\b", section)
