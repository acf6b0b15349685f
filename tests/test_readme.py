"""Do the programs in the README run, and learn?"""

import re
from pathlib import Path

import pytest

import jaxjd

README = (Path(__file__).parents[1] / "README.md").read_text()
PROGRAMS = re.findall(r"^### (.+?)$.*?^```python\n(.*?)^```$", README, re.DOTALL | re.M)


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
    names = {}
    exec(compile(program, "README.md", "exec"), names)
    values = names.get("values") or {"mean": names["losses"].mean()}
    assert max(values.values()) < threshold


def test_every_method_has_its_row():
    rows = re.findall(r"^\| `(\w+)` \|", README.split("## Methods")[1], re.M)
    weightings = [n for n in vars(jaxjd.weighting) if n[0].islower() and n[0] != "_"]
    assert set(weightings) <= set(rows)
