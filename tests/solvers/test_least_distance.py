"""Is the step the shortest one that makes the progress owed?"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from jax.test_util import check_grads

from jaxjd.solvers import least_distance
from tests.solvers import problems

solve = jax.jit(least_distance)


def exact_step(J, h):
    """argmin |x| with J x >= h, by Lawson and Hanson's reduction to NNLS.

    It works on J itself, in float64. None if infeasible.
    """
    E = np.vstack([J.T, h])
    target = np.zeros(len(E))
    target[-1] = 1
    mu, norm = scipy.optimize.nnls(E, target, maxiter=1000)
    residual = E @ mu - target
    return None if norm < 1e-7 else -residual[:-1] / residual[-1]


@pytest.mark.parametrize("family", [problems.normal, problems.conflicting])
def test_the_step_is_that_of_nnls(x64, family):
    rng = np.random.default_rng(0)
    for decades in (0, 3):
        J = problems.spread(rng, family(rng, 8), decades)
        # Some losses may get worse, up to a level.
        h = rng.normal(size=8) * np.linalg.norm(J, axis=1)
        result = solve(J @ J.T, h)
        assert result.feasible
        assert result.certificate.converged
        x = J.T @ result.solution
        expected = exact_step(J, h)
        np.testing.assert_allclose(x, expected, atol=1e-10 * np.linalg.norm(expected))


def test_feasible_or_not_is_what_a_linear_program_says():
    rng = np.random.default_rng(1)
    seen = set()
    for _ in range(60):
        J = rng.normal(size=(6, 3))
        h = np.full(6, 0.02)
        free = scipy.optimize.linprog(
            np.zeros(3), A_ub=-J, b_ub=-h, bounds=[(None, None)] * 3
        )
        J32 = J.astype(np.float32)
        result = solve(J32 @ J32.T, h.astype(np.float32))
        assert bool(result.feasible) == (free.status == 0)
        seen.add(bool(result.feasible))
        if not result.feasible:
            # The proof: a combination that vanishes, and would have to be positive.
            mu = np.asarray(result.solution, float)
            assert mu.min() >= 0
            size = np.abs(mu) @ np.linalg.norm(J, axis=1)
            assert np.linalg.norm(J.T @ mu) <= 2e-6 * size
            assert mu @ h > 0
    assert seen == {True, False}


def test_nothing_owed_and_zero_gradients():
    G = np.diag([1.0, 0.0, 4.0]).astype(np.float32)
    result = solve(G, np.array([-1.0, -1.0, 0.0], np.float32))
    np.testing.assert_array_equal(result.solution, [0, 0, 0])
    assert result.feasible
    assert not solve(G, np.array([0.0, 1.0, 0.0], np.float32)).feasible
    result = solve(G, np.array([3.0, 0.0, 8.0], np.float32))
    # Divided by what rounding leaves of 1 - 0.6.
    np.testing.assert_allclose(result.solution, [3, 0, 2], rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan(bad):
    G, h = np.eye(3, dtype=np.float32), np.ones(3, np.float32)
    broken = G.copy()
    broken[0, 1] = broken[1, 0] = bad
    for gramian, levels in ((broken, h), (G, np.array([1, bad, 1], np.float32))):
        result = solve(gramian, levels)
        assert np.isnan(result.solution).all()
        assert not result.certificate.converged


def test_the_derivative_is_that_of_finite_differences(x64):
    rng = np.random.default_rng(2)
    J = jnp.asarray(problems.normal(rng, 4))
    h = jnp.array([1.0, 2.0, -3.0, 1.5])

    def step(J, h):
        return J.T @ solve(J @ J.T, h).solution

    check_grads(step, (J, h), order=1, modes=["rev"], eps=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("levels", "options", "message"),
    [
        (np.ones(3), {}, r"`levels` must have shape \(2,\).*Got \(3,\)"),
        (np.ones(2), {"max_iterations": 0}, "`max_iterations`.*0"),
    ],
)
def test_bad_input_is_refused_while_tracing(levels, options, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(functools.partial(least_distance, **options), np.eye(2), levels)
