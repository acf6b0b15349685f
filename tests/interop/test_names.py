"""Does docs/torchjd.md translate arguments that exist, in both libraries?"""

import inspect
import re
from pathlib import Path

import pytest

import jaxjd

reference = pytest.importorskip("torchjd.aggregation")
scalarization = pytest.importorskip("torchjd.scalarization")

PAGE = Path(__file__).parents[2] / "docs" / "torchjd.md"
CALL = re.compile(r"`(\w+)\(([\w, ]+)\)`")


def rows():
    table = PAGE.read_text().split("some arguments are called differently")[1]
    return re.findall(r"^\| (`\w+\(.*) \| (`.*) \|$", table.split("\n\n")[1], re.M)


def test_every_row_names_arguments_of_both():
    assert len(rows()) >= 11
    for row in rows():
        for libraries, cell in zip(
            ((reference, scalarization), (jaxjd,)), row, strict=True
        ):
            name, arguments = CALL.match(cell).groups()
            (found,) = (vars(x)[name] for x in libraries if name in vars(x))
            parameters = inspect.signature(found).parameters
            assert set(arguments.split(", ")) <= set(parameters), cell
        theirs, ours = (CALL.match(cell)[2].split(", ") for cell in row)
        assert len(theirs) == len(ours), row
