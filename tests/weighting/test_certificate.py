"""A user can read how well the problem behind the weights was solved."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose

import jaxjd
from tests.solvers import problems

M = 5
CERTIFIED = {
    "cagrad": {},
    "dualproj": {},
    "fairgrad": {},
    "mgda": {},
    "nash_mtl": {"num_losses": M},
    "pcd": {"num_losses": M},
    "upgrad": {},
}


@pytest.mark.parametrize("name", CERTIFIED)
def test_the_certificate_is_in_the_state_of_the_optimizer(name):
    tx = optax.chain(
        getattr(jaxjd, name)(certificate=True, **CERTIFIED[name]), optax.sgd(0.1)
    )
    params = jnp.zeros(8)
    state = tx.init(params)
    before = optax.tree.get(state, "certificate")
    assert before.iterations == 0
    rows = jax.random.normal(jax.random.key(0), (2, M, 8))
    update = jax.jit(tx.update)
    # A scan can carry the state, because its types do not change.
    assert jax.tree.map(jnp.result_type, state) == jax.tree.map(
        jnp.result_type, jax.eval_shape(update, rows[0], state, params)[1]
    )
    good, state = update(rows[0], state, params)
    certificate = optax.tree.get(state, "certificate")
    assert certificate.converged
    assert certificate.iterations >= 1
    assert all(jnp.shape(field) == () for field in certificate)
    # The root of rounding, and more near stationary points.
    assert 0 <= certificate.residual <= 1e-2
    _, state = update(rows[1].at[2, 3].set(jnp.nan), state, params)
    assert not optax.tree.get(state, "certificate").converged
    # Without `certificate=True` the update is the same, and there is no certificate.
    plain = optax.chain(getattr(jaxjd, name)(**CERTIFIED[name]), optax.sgd(0.1))
    expected, state = jax.jit(plain.update)(rows[0], plain.init(params), params)
    assert_allclose(good, expected, rtol=1e-5, atol=1e-6)
    assert optax.tree.get(state, "certificate") is None


def test_frank_wolfe_has_no_certificate():
    with pytest.raises(ValueError, match="`certificate` must be False"):
        jaxjd.mgda(frank_wolfe_steps=10, certificate=True)


@pytest.mark.parametrize("name", ["upgrad", "dualproj"])
def test_a_warm_start_gives_the_same_weights_in_fewer_iterations(name, x64):
    """The Jacobian changes by one percent per step."""
    m = 16
    rng = np.random.default_rng(0)
    J = problems.conflicting(rng, m)
    make = getattr(jaxjd.weighting, name)
    warm = make(warm_start=True, num_losses=m, certificate=True)
    cold = make(certificate=True)
    update_warm, update_cold = jax.jit(warm.update), jax.jit(cold.update)
    state, iterations = warm.init(), []
    for _ in range(6):
        gramian = jnp.asarray(J @ J.T)
        weights, state = update_warm(gramian, state)
        expected, certified = update_cold(gramian, cold.init())
        assert_allclose(weights, expected, rtol=1e-8)
        iterations.append([int(s.certificate.iterations) for s in (state, certified)])
        J = J + 0.01 * rng.normal(size=J.shape)
    iterations = np.array(iterations)
    assert iterations[0, 0] == iterations[0, 1]
    assert iterations[1:, 0].sum() < 0.8 * iterations[1:, 1].sum()


@pytest.mark.parametrize("name", ["upgrad", "dualproj"])
def test_a_warm_start_after_a_batch_that_is_not_finite(name):
    weighting = getattr(jaxjd.weighting, name)(warm_start=True, num_losses=3)
    rows = jax.random.normal(jax.random.key(1), (3, 6))
    update = jax.jit(weighting.update)
    gramian = rows @ rows.T
    broken, state = update(gramian.at[0, 0].set(jnp.nan), weighting.init())
    assert jnp.isnan(broken).all()
    weights, _ = update(gramian, state)
    assert_allclose(weights, getattr(jaxjd.weighting, name)()(gramian), rtol=1e-5)


def test_another_number_of_losses():
    weighting = jaxjd.weighting.upgrad(num_losses=3)
    with pytest.raises(ValueError, match="num_losses=3 losses.*Got 4"):
        weighting.update(jnp.eye(4), weighting.init())
    with pytest.raises(ValueError, match="`num_losses` must be at least 1. Got 0"):
        jaxjd.weighting.upgrad(num_losses=0)
    with pytest.raises(ValueError, match="`num_losses` must be given with `warm_start"):
        jaxjd.upgrad(warm_start=True)
