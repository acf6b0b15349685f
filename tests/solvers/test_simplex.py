"""Is the convex combination of the gradients the shortest one?"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxjd.solvers import minimise_on_simplex
from tests.solvers import problems

solve = jax.jit(minimise_on_simplex)


def brute_force(G):
    """The least value over all faces of the simplex, by one linear solve each."""
    m = len(G)
    best = np.inf
    for size in range(1, m + 1):
        for face in itertools.combinations(range(m), size):
            block = G[np.ix_(face, face)]
            bordered = np.block([[block, -np.ones((size, 1))], [np.ones(size), 0]])
            weights = np.linalg.lstsq(bordered, np.eye(size + 1)[-1])[0][:-1]
            if weights.min() >= -1e-9:
                best = min(best, weights @ block @ weights)
    return best


@pytest.mark.parametrize(
    "family", [*problems.NOT_STATIONARY, problems.stationary], ids=lambda f: f.__name__
)
def test_brute_force_finds_nothing_shorter(x64, family):
    rng = np.random.default_rng(0)
    J = problems.spread(rng, family(rng, 5), 1)
    if family is problems.stationary:
        J = family(rng, 5)
    G = J @ J.T
    result = solve(G)
    weights = np.asarray(result.solution)
    assert weights.min() >= 0
    assert abs(weights.sum() - 1) <= 1e-12
    expected = brute_force(G)
    assert abs(weights @ G @ weights - expected) <= 1e-12 * np.trace(G)
    np.testing.assert_allclose(weights @ G @ weights, expected, atol=1e-12, rtol=1e-9)
    assert result.certificate.converged


@pytest.mark.parametrize("decades", [0, 6])
@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_float32_at_any_scale(decades, scale):
    m = 16
    rng = np.random.default_rng(1)
    G = []
    for family in problems.NOT_STATIONARY:
        J = scale * problems.spread(rng, family(rng, m), decades)
        G.append(problems.gramian32(J)[1])
    result = batched(np.stack(G))
    assert result.certificate.converged.all()
    for gramian, weights in zip(G, np.asarray(result.solution, float), strict=True):
        gramian = gramian.astype(float)
        least = weights @ gramian @ weights
        d = np.sqrt(np.diagonal(gramian))
        # Along the update, every gradient is at least as long as the update.
        slack = (gramian @ weights - least) / (d * np.sqrt(least))
        assert slack.min() >= -1e-3
        # Those with weight are just as long, up to the rounding of its square.
        rounding = np.finfo(np.float32).eps * (weights @ d) ** 2
        assert abs(weights * (gramian @ weights - least)).max() <= 8 * rounding


batched = jax.jit(jax.vmap(minimise_on_simplex))


def test_two_gradients_have_a_closed_form():
    G = np.array([[17.0, -22], [-22, 38]], np.float32)
    expected = np.array([38 + 22, 17 + 22]) / (17 + 38 + 44)
    np.testing.assert_allclose(solve(G).solution, expected, rtol=1e-6)
    # One is so long that the other alone is the shortest.
    G = np.array([[1.0, 2], [2, 100]], np.float32)
    np.testing.assert_allclose(solve(G).solution, [1, 0], atol=1e-7)


def test_zero_gradients_one_gradient_and_nan():
    J = np.array([[1.0, 2], [0, 0], [3, -1], [0, 0]], np.float32)
    result = solve(J @ J.T)
    np.testing.assert_array_equal(result.solution, [0, 0.5, 0, 0.5])
    assert result.certificate.converged
    np.testing.assert_array_equal(solve(np.zeros((2, 2))).solution, [0.5, 0.5])
    np.testing.assert_array_equal(solve(np.full((1, 1), 3.0)).solution, [1.0])
    for bad in (np.nan, np.inf):
        G = J @ J.T
        G[0, 2] = G[2, 0] = bad
        result = solve(G)
        assert np.isnan(result.solution).all()
        assert not result.certificate.converged
    assert np.isnan(solve(np.full((1, 1), np.nan)).solution).all()


def test_the_derivative_is_that_of_finite_differences(x64):
    rng = np.random.default_rng(2)
    J = jnp.asarray(problems.spread(rng, problems.normal(rng, 5), 1))
    assert 2 <= (solve(J @ J.T).solution > 0).sum() <= 4

    @jax.jit
    def weights(J):
        return minimise_on_simplex(J @ J.T).solution

    check_grads(weights, (J,), order=1, modes=["rev"], eps=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("gramian", "options", "error", "message"),
    [
        (np.ones((2, 3)), {}, ValueError, r"`gramian`.*\(2, 3\)"),
        (np.eye(2, dtype=int), {}, TypeError, "`gramian`.*int"),
        (np.eye(2), {"max_iterations": 0}, ValueError, "`max_iterations`.*0"),
    ],
)
def test_bad_input_is_refused_while_tracing(gramian, options, error, message):
    with pytest.raises(error, match=message):
        jax.eval_shape(functools.partial(minimise_on_simplex, **options), gramian)
