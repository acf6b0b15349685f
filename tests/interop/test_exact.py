"""The second table's exact projection is exact, and jaxjd keeps its promise."""

import pytest

pytest.importorskip("torchjd")

import numpy as np

from interop import exact, jacobians
from interop.report import PRECISIONS


@pytest.mark.parametrize("name", exact.cases())
def test_the_exact_projection_satisfies_the_optimality_conditions(name):
    """v >= u and J Jᵀ v >= 0, and for every loss one of the two is an equality.

    Each is relative to the norms that enter it, so the tolerances are float64 rounding.
    """
    jacobian = exact.cases()[name]
    m = len(jacobian)
    norms = np.linalg.norm(jacobian, axis=1)
    for u in np.eye(m) / m:
        scale = np.linalg.norm(u @ jacobian)
        v = exact.exact_projection(u, jacobian)
        excess = (v - u) * norms / scale
        slope = jacobian @ (v @ jacobian) / norms / scale
        assert excess.min() >= 0
        assert slope.min() >= -1e-13
        assert np.abs(excess * slope).max() <= 1e-13


def test_the_exact_update_of_the_documented_example():
    jacobian = np.array([[-4.0, 1, 1], [6, 1, 1]])
    update = exact.exact_upgrad(jacobian) @ jacobian
    np.testing.assert_allclose(update, [0.29240, 1.90058, 1.90058], atol=1e-5)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", exact.cases())
def test_jaxjd_conflicts_with_no_gradient_and_is_the_closer(name, precision):
    comparison = exact.compare(name, precision)
    assert comparison.cosine.passed, comparison
    # A hundred times (float32) and a thousand times (float64) what was measured.
    bound = {"float32": 3e-4, "float64": 5e-11}[precision]
    if name.endswith("1..1e6"):
        # By default the shortest of these are at the edge of float32's rounding, below
        # which gradients are ignored, in float64 too. Ten times what was measured.
        bound = max(bound, 3e-5)
    assert comparison.jaxjd.distance < bound
    assert comparison.jaxjd.distance < comparison.torchjd.distance


def test_quality_sees_a_conflict():
    jacobian = np.array([[1.0, 0.0], [-3.0, 1.0]])
    w = exact.exact_upgrad(jacobian)
    assert exact.quality(w, w, jacobian).distance == 0
    assert exact.quality(w, w, jacobian).cosine > -1e-15
    mean = exact.quality(np.full(2, 0.5), w, jacobian)
    assert mean.cosine == pytest.approx(-2 / np.hypot(2, 1))


def test_conflicting_rows_conflict_in_pairs():
    rows = jacobians.conflicting(16)
    assert (rows @ rows.T)[~np.eye(16, dtype=bool)].max() < 0
