"""`python -m interop` prints what it measured, with the right exit code."""

import pytest

pytest.importorskip("torchjd")

import json
import math

from interop import exact, optimality, report
from interop.check import Check


def fake_checks(value):
    bounds = {"float32": 1e-5, "float64": 1e-9}
    differences = {"float32": value, "float64": 1e-12}
    return lambda quick: [
        Check("weights", "upgrad, random", differences.__getitem__, bounds)
    ]


def fake_compare(cosine):
    def compare(name, precision):
        ours, theirs = exact.Quality(1e-6, cosine), exact.Quality(1e-3, -0.75)
        return exact.Comparison(name, precision, ours, theirs)

    return compare


def fake_problem(residual):
    def compare(name, case, precision):
        return optimality.Comparison(name, case, precision, residual, 1e-3)

    return compare


@pytest.mark.parametrize(
    ("value", "cosine", "residual", "code", "line"),
    [
        (9e-6, 0.1, 1e-6, 0, "| 9.0e-06 | 1e-05 | 1.0e-12 | 1e-09 | pass |"),
        (2e-5, 0.1, 1e-6, 1, "| 2.0e-05 | 1e-05 | 1.0e-12 | 1e-09 | FAIL |"),
        (math.nan, 0.1, 1e-6, 1, "| nan     | 1e-05 | 1.0e-12 | 1e-09 | FAIL |"),
        (9e-6, -2e-3, 1e-6, 1, "-2.0e-03     | -7.5e-01 | FAIL |"),
        (9e-6, math.nan, 1e-6, 1, "+nan         | -7.5e-01 | FAIL |"),
        (9e-6, 0.1, 1e-2, 1, "| 1.0e-02 | 1.0e-03 | FAIL |"),
        (9e-6, 0.1, math.nan, 1, "| nan     | 1.0e-03 | FAIL |"),
    ],
)
def test_exit_code_and_tables(
    value, cosine, residual, code, line, monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr(report, "checks", fake_checks(value))
    monkeypatch.setattr(exact, "compare", fake_compare(cosine))
    monkeypatch.setattr(optimality, "compare", fake_problem(residual))
    file = tmp_path / "report.json"
    assert report.main(["--quick", "--json", str(file)]) == code
    assert line in capsys.readouterr().out
    content = json.loads(file.read_text())
    assert content["passed"] == (code == 0)
    (row,) = content["parity"]
    assert row["float64"] == {"difference": 1e-12, "bound": 1e-9, "passed": True}
    assert row["float32"]["difference"] == (value if math.isfinite(value) else None)
    assert len(content["exact"]) == len(exact.QUICK)
    problems = content["optimality"]
    assert [row["method"] for row in problems] == list(optimality.PROBLEMS)
    assert problems[0]["float64"]["torchjd"] == 1e-3


def test_quick_leaves_rows_out_and_no_group():
    every, quick = report.checks(), report.checks(quick=True)
    assert len(quick) < len(every)
    assert {row.group for row in quick} == {row.group for row in every}
    names = [(row.group, row.name) for row in every]
    assert len(set(names)) == len(names)


def test_help_and_unknown_options(capsys):
    with pytest.raises(SystemExit) as stopped:
        report.main(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "python -m interop" in printed
    assert "exit code is 1" in printed
    with pytest.raises(SystemExit) as stopped:
        report.main(["--json", "/no/such/folder/report.json"])
    assert stopped.value.code == 2
    assert "no folder" in capsys.readouterr().err
