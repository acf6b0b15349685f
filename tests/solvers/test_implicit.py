"""Does the derivative of a projection agree with finite differences?"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import jaxjd
from jaxjd.solvers import project_dual_cone
from tests.solvers import problems

TORCHJD = {"norm_eps": 1e-4, "reg_eps": 1e-4}
# Enough to change some of these weights by a tenth.
NOISE = {"noise_eps": 0.5}


@pytest.mark.parametrize("options", [{}, NOISE, TORCHJD], ids=str)
def test_with_respect_to_gramian_and_bounds(x64, options):
    # A random problem, so strict complementarity holds.
    m = 6
    rng = np.random.default_rng(0)
    J = jnp.asarray(problems.spread(rng, problems.conflicting(rng, m), 0.5))
    u = jnp.asarray(np.concatenate([np.eye(m) / m, rng.normal(size=(2, m))]))

    @jax.jit
    def weights(J, u):
        return project_dual_cone(u, J @ J.T, **options).solution

    check_grads(weights, (J, u), order=1, modes=["rev"], eps=1e-6, rtol=1e-5)


def test_of_the_update_where_the_gramian_is_singular(x64):
    m = 8
    rng = np.random.default_rng(1)
    J = jnp.asarray(problems.rank_half(rng, m))
    assert J.shape[1] == m // 2

    @jax.jit
    def update(J):
        return J.T @ project_dual_cone(jnp.eye(m) / m, J @ J.T).solution.sum(0)

    check_grads(update, (J,), order=1, modes=["rev"], eps=1e-6, rtol=1e-4)


def test_the_gradient_is_finite_at_zero_and_symmetric():
    @jax.jit
    @jax.grad
    def gradient_of_total(G):
        return project_dual_cone(jnp.eye(3), G).solution[:, 0].sum()

    J = jnp.array([[-4.0, 1, 1], [0, 0, 0], [6, 1, 1]])
    for G in (J @ J.T, jnp.zeros((3, 3))):
        gradient = gradient_of_total(G)
        assert jnp.isfinite(gradient).all()
        np.testing.assert_array_equal(gradient, gradient.T)


def test_through_the_weights_of_upgrad(x64):
    rng = np.random.default_rng(3)
    J = jnp.asarray(problems.conflicting(rng, 5))
    weighting = jaxjd.weighting.upgrad()

    @jax.jit
    def weights(gramian):
        return weighting((gramian + gramian.T) / 2)

    check_grads(weights, (J @ J.T,), order=1, modes=["rev"], eps=1e-6, rtol=1e-5)
