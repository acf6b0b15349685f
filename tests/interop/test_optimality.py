"""The residuals of the third table are right, and jaxjd solves its problems."""

import functools
import math

import pytest

pytest.importorskip("torchjd")

import numpy as np

from interop import optimality
from interop.optimality import cagrad_residual, fairgrad_residual, mgda_residual
from interop.report import PRECISIONS

# Solved by hand.
ORTHOGONAL = np.diag([1.0, 2.0])
EQUAL = np.eye(2)
SOLVED = [
    (mgda_residual, ORTHOGONAL, [0.8, 0.2]),
    (functools.partial(cagrad_residual, c=0.5), EQUAL, [0.75, 0.75]),
    # s w = w^(-1 / alpha), where s are the squared norms.
    (functools.partial(fairgrad_residual, alpha=2.0), ORTHOGONAL, [1, 4 ** (-2 / 3)]),
    (functools.partial(fairgrad_residual, alpha=1.0), ORTHOGONAL, [1, 0.5]),
]


@pytest.mark.parametrize(
    "precision",
    # Both have the same code, and float64 shows a fault that rounding would hide.
    [pytest.param(p, marks=[pytest.mark.slow] * (p == "float32")) for p in PRECISIONS],
)
@pytest.mark.parametrize("case", optimality.cases())
@pytest.mark.parametrize("name", optimality.PROBLEMS)
def test_jaxjd_is_not_the_farther(name, case, precision):
    comparison = optimality.compare(name, case, precision)
    # Python's own True, not NumPy's, so that JSON can hold it.
    assert comparison.residual.passed is True, comparison


@pytest.mark.parametrize(("residual", "jacobian", "exact"), SOLVED)
def test_residuals(residual, jacobian, exact):
    """Residuals are zero for the exact weights, not for longer or other ones."""
    exact = np.array(exact)
    assert abs(residual(exact, jacobian)) < 1e-15
    assert residual(1.01 * exact, jacobian) > 5e-3
    assert residual(exact * [0.98, 1.02], jacobian) > 1e-4


def test_no_update_at_all_is_far_from_solved():
    assert cagrad_residual(np.zeros(2), EQUAL, c=0.5) == 1


@pytest.mark.parametrize(
    ("ours", "theirs", "passed"),
    [
        (1e-3, 1e-2, True),
        (1e-14, 0.0, True),
        (1e-2, 1e-3, False),
        (math.nan, 1.0, False),
        (1e-3, math.nan, False),
    ],
)
def test_who_passes(ours, theirs, passed):
    comparison = optimality.Comparison("mgda", "random", "float64", ours, theirs)
    assert comparison.residual.passed == passed
