"""Do the weights solve the bargaining equations?"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxjd.solvers import bargain
from tests.solvers import problems

solvers = {
    alpha: jax.jit(functools.partial(bargain, alpha=alpha))
    for alpha in (0.5, 1.0, 2.0, 10.0)
}


@pytest.mark.parametrize("alpha", solvers)
def test_the_equations_hold(x64, alpha):
    rng = np.random.default_rng(0)
    for family in (problems.normal, problems.rank_half, problems.near_duplicate):
        J = problems.spread(rng, family(rng, 8), 2)
        result = solvers[alpha](J @ J.T)
        w = np.asarray(result.solution)
        assert result.certificate.converged
        assert w.min() > 0
        np.testing.assert_allclose((J @ (J.T @ w)) * w ** (1 / alpha), 1, rtol=1e-11)


@pytest.mark.parametrize("alpha", solvers)
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_float32_at_any_scale(alpha, scale):
    rng = np.random.default_rng(1)
    J, G = problems.gramian32(scale * problems.spread(rng, problems.normal(rng, 8), 1))
    result = solvers[alpha](G)
    assert result.certificate.converged
    w = np.asarray(result.solution, float)
    # A share is a sum of products that are larger than it.
    np.testing.assert_allclose((J @ (J.T @ w)) * w ** (1 / alpha), 1, rtol=2e-5)


@pytest.mark.parametrize("alpha", solvers)
@pytest.mark.parametrize("max_iterations", [1, 2, 3])
def test_the_certificate_bounds_the_distance(x64, alpha, max_iterations):
    rng = np.random.default_rng(2)
    J = problems.spread(rng, problems.normal(rng, 8), 1)
    G = J @ J.T
    result = bargain(G, alpha=alpha, max_iterations=max_iterations)
    update, expected = result.solution @ J, solvers[alpha](G).solution @ J
    distance = np.linalg.norm(update - expected) / np.linalg.norm(update)
    assert distance <= result.certificate.residual
    # The search has not finished, and the bound is within a factor of 10.
    assert distance > 1e-9
    if result.certificate.residual < 0.5:
        assert result.certificate.residual <= 10 * distance


def test_orthogonal_gradients_have_a_closed_form():
    G = np.diag([1.0, 4.0, 0.0, 1e4]).astype(np.float32)
    w = solvers[2.0](G).solution
    # s w = w^(-1/2).
    np.testing.assert_allclose(w, [1, 4 ** (-2 / 3), 0, 1e4 ** (-2 / 3)], rtol=1e-5)


def test_a_pareto_stationary_point_has_no_solution():
    J = np.array([[1.0, 0], [-1.0, 0], [0, 1.0]], np.float32)
    result = solvers[1.0](J @ J.T)
    assert not result.certificate.converged
    w = np.asarray(result.solution, float)
    assert np.isfinite(w).all()
    # The two that cancel differ by little, relative to their weights.
    assert abs(w[0] - w[1]) <= 1e-3 * w[0]


def test_zero_missing_and_nan():
    G = np.eye(3, dtype=np.float32)
    np.testing.assert_array_equal(solvers[1.0](0 * G).solution, [0, 0, 0])
    masked = bargain(G, mask=jnp.array([True, False, True]))
    np.testing.assert_allclose(masked.solution, [1, 0, 1], rtol=1e-6)
    result = solvers[1.0](G * np.nan)
    assert np.isnan(result.solution).all()
    assert not result.certificate.converged


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"`alpha` must be in \(0, inf\). Got 0"):
        bargain(np.eye(2), alpha=0)
    with pytest.raises(ValueError, match=r"`mask` must have shape \(2,\)"):
        bargain(np.eye(2), mask=np.ones(3, bool))
    with pytest.raises(ValueError, match="`gramian` must be a square matrix"):
        bargain(np.ones((2, 3)))
