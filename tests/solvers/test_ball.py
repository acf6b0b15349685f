"""Does the worst-off loss make the most progress that is possible within the ball?"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from jaxjd.solvers import maximise_on_ball
from tests.solvers import problems

M = 6
MEAN = np.full(M, 1 / M)
MEAN32 = MEAN.astype(np.float32)
solvers = {
    c: jax.jit(functools.partial(maximise_on_ball, c=c)) for c in (0.0, 0.5, 1.0, 2.0)
}


def best(J, c):
    """max t with J x >= t in the ball, by SLSQP from many starts, in float64."""
    centre = MEAN @ J
    radius = c * np.linalg.norm(centre)
    rng = np.random.default_rng(0)
    levels = []
    for _ in range(5):
        start = centre + 0.1 * radius * rng.normal(size=len(centre))
        solved = scipy.optimize.minimize(
            lambda z: -z[-1],
            np.append(start, (J @ start).min()),
            method="SLSQP",
            constraints=[
                {"type": "ineq", "fun": lambda z: J @ z[:-1] - z[-1]},
                {
                    "type": "ineq",
                    "fun": lambda z: radius**2 - np.sum((z[:-1] - centre) ** 2),
                },
            ],
            options={"maxiter": 500, "ftol": 1e-14},
        )
        if np.linalg.norm(solved.x[:-1] - centre) <= radius * (1 + 1e-9):
            levels.append((J @ solved.x[:-1]).min())
    return max(levels)


@pytest.mark.parametrize("c", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(
    "family", [problems.normal, problems.conflicting, problems.rank_half]
)
def test_nothing_serves_the_worst_better(x64, c, family):
    rng = np.random.default_rng(1)
    J = problems.spread(rng, family(rng, M), 0.5)
    result = solvers[c](J @ J.T, MEAN)
    assert result.certificate.converged
    x = (MEAN + result.solution) @ J
    centre = MEAN @ J
    distance = np.linalg.norm(x - centre)
    np.testing.assert_allclose(distance, c * np.linalg.norm(centre), rtol=1e-9)
    scale = np.linalg.norm(centre) * np.linalg.norm(J, axis=1).max()
    # SLSQP stops at 1e-7 or so.
    assert abs((J @ x).min() - best(J, c)) <= 1e-6 * scale
    # The duality gap is only rounding, but bounds the square of the distance.
    assert result.certificate.residual <= 1e-6


def test_float32(x64):
    rng = np.random.default_rng(2)
    for family in problems.NOT_STATIONARY[:4]:
        J, G = problems.gramian32(problems.spread(rng, family(rng, M), 1))
        exact = solvers[0.5](J @ J.T, MEAN).solution
        result = solvers[0.5](G, MEAN32)
        assert result.solution.dtype == jnp.float32
        assert result.certificate.converged
        x, expected = (
            (MEAN + np.asarray(s, float)) @ J for s in (result.solution, exact)
        )
        distance = np.linalg.norm(x - expected)
        assert distance <= 1e-3 * np.linalg.norm(expected)
        residual = float(result.certificate.residual)
        assert distance <= residual * 1.5 * np.linalg.norm(MEAN @ J)


def test_a_ball_without_radius_is_its_centre():
    J = np.random.default_rng(3).normal(size=(M, 9)).astype(np.float32)
    np.testing.assert_array_equal(solvers[0.0](J @ J.T, MEAN32).solution, np.zeros(M))


@pytest.mark.parametrize("c", [0.5, 1.0, 2.0])
def test_a_pareto_stationary_point(c):
    J = problems.stationary(np.random.default_rng(4), M)
    J[0] *= 2
    J, G = problems.gramian32(J)
    x = (MEAN + np.asarray(solvers[c](G, MEAN32).solution, float)) @ J
    centre = np.linalg.norm(MEAN @ J)
    if c >= 1:
        # Zero is in the ball, and nothing is better.
        assert np.linalg.norm(x) <= 1e-5 * centre
    else:
        assert np.linalg.norm(x - MEAN @ J) == pytest.approx(c * centre, rel=1e-4)


def test_zero_gradients_and_nan():
    G = np.zeros((M, M), np.float32)
    np.testing.assert_array_equal(solvers[0.5](G, MEAN32).solution, np.zeros(M))
    result = solvers[0.5](G * np.nan, MEAN32)
    assert np.isnan(result.solution).all()
    assert not result.certificate.converged


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"`c` must be in \[0, inf\). Got -1"):
        maximise_on_ball(np.eye(2), np.ones(2), -1)
    with pytest.raises(ValueError, match=r"`u` must have shape \(2,\).*Got \(3,\)"):
        maximise_on_ball(np.eye(2), np.ones(3), 1)
    with pytest.raises(ValueError, match=r"`mask` must have shape \(2,\)"):
        maximise_on_ball(np.eye(2), np.ones(2), 1, mask=np.ones(3, bool))
    with pytest.raises(ValueError, match="`max_iterations` must be at least 1. Got 0"):
        maximise_on_ball(np.eye(2), np.ones(2), 1, max_iterations=0)


def test_losses_that_are_left_out(x64):
    J = np.random.default_rng(6).normal(size=(M, 9))
    kept = np.array([1, 0, 1, 1, 0, 1], bool)
    G = J @ J.T
    alone = maximise_on_ball(G[kept][:, kept], np.full(4, 0.25), 0.5).solution
    # Their rows and columns, and their entries of u, must not matter.
    G[~kept] = G[:, ~kept] = np.nan
    centre = np.where(kept, 0.25, 7.0)
    together = maximise_on_ball(G, centre, 0.5, mask=kept).solution
    np.testing.assert_array_equal(together[~kept], 0)
    np.testing.assert_allclose(together[kept], alone, rtol=1e-9, atol=1e-12)


def test_a_gradient_of_zero_and_two_opposed_ones(x64):
    """If no progress is possible, zero is best, if the ball allows it.

    The constraints can only hold with equality, so rounding could decide.
    """
    rng = np.random.default_rng(5)
    J = rng.normal(size=(M, 9))
    J[1], J[2] = 0, -2 * J[0]
    gap = J @ (MEAN @ J)
    assert gap.min() < 0
    for c in (1.0, 2.0):
        result = solvers[c](J @ J.T, MEAN)
        assert result.certificate.converged
        assert np.linalg.norm((MEAN + result.solution) @ J) <= 1e-9
    # In a ball that is too small for that, the worst-off loss is better off than with
    # the mean, and zero gradients make no difference.
    result = solvers[0.5](J @ J.T, MEAN)
    assert result.certificate.converged
    x = (MEAN + result.solution) @ J
    assert gap.min() < (J @ x).min() <= 0
