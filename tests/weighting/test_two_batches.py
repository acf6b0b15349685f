"""SDMGrad and MoDo use two batches and stay on the simplex."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import jaxjd
from jaxjd.weighting._simplex import project_onto_simplex, share_of_present

M = 4
MAKE = {
    "modo": lambda **kwargs: jaxjd.weighting.modo(num_losses=M, **kwargs),
    "sdmgrad": lambda **kwargs: jaxjd.weighting.sdmgrad(num_losses=M, **kwargs),
}
both = pytest.mark.parametrize("name", MAKE)


def losses(params, batch):
    """Four losses of a batch [examples, 3]."""
    predictions = jnp.tanh(batch @ params)
    targets = jnp.arange(M, dtype=batch.dtype) - 1.5
    return ((predictions[:, None] - targets[None]) ** 2).mean(0)


def batches(dtype=float):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(8, 3)), dtype) for _ in range(3)]


@both
def test_as_documented(name):
    """The weights come from two batches, the update from a third."""
    params = jnp.array([0.3, -0.2, 0.5])
    weighting = MAKE[name]()
    tx = optax.chain(jaxjd.aggregate(weighting), optax.sgd(1.0))

    @jax.jit
    def step(state, batches):
        jac1, jac2, jac3 = (jaxjd.jac(losses)(params, batch) for batch in batches)
        A = jac1.cross_gramian(jac2)
        weights, _ = weighting.update(jnp.eye(M), weighting.init(), cross_gramian=A)
        updates, state = tx.update(jac3, state, params, cross_gramian=A)
        return updates, state, weights, jac3.dense()

    updates, state, weights, rows = step(tx.init(params), batches())
    assert_allclose(updates, -weights @ rows, rtol=1e-5)
    kept = state[0].weighting.weights
    assert_allclose(kept.sum(), 1, rtol=1e-6)
    assert jnp.abs(kept - 1 / M).max() > 1e-3


@both
def test_without_a_second_batch(name):
    weighting, one = MAKE[name](), jnp.eye(M)
    with pytest.raises(ValueError, match=f"must be given to the update of {name}"):
        weighting.update(one, weighting.init())
    with pytest.raises(ValueError, match=r"shape of `gramian`, \(4, 4\). Got \(3, 3\)"):
        weighting.update(one, weighting.init(), cross_gramian=jnp.eye(3))
    with pytest.raises(TypeError, match="`cross_gramian` must be real floating-point"):
        weighting.update(one, weighting.init(), cross_gramian=jnp.eye(M, dtype=int))


@both
def test_losses_that_are_missing(name):
    """Missing losses keep their weight in the state. The others share the rest."""
    weighting = MAKE[name]()
    A = jnp.asarray(np.random.default_rng(1).normal(size=(M, M)), jnp.float32)
    mask = jnp.array([True, True, False, True])
    start = weighting.init()._replace(weights=jnp.array([0.1, 0.3, 0.4, 0.2]))
    update = jax.jit(weighting.update)
    weights, state = update(jnp.eye(M), start, mask=mask, cross_gramian=A)
    assert weights[2] == 0
    assert_allclose(weights.sum(), 1, rtol=1e-5)
    assert_allclose(state.weights[2], 0.4, rtol=1e-6)
    assert_allclose(state.weights.sum(), 1, rtol=1e-6)


def test_modo_by_hand():
    """One projected step from (1/2, 1/2) against the gradient (1, 0) / 2 + r w."""
    weighting = jaxjd.weighting.modo(num_losses=2, step_size=0.2, regularization=0.5)
    A = jnp.array([[1.0, 0.0], [-1.0, 1.0]])
    weights, _ = jax.jit(weighting.update)(
        jnp.eye(2), weighting.init(), cross_gramian=A
    )
    assert_allclose(weights, [0.45, 0.55], rtol=1e-6)


def test_sdmgrad_finds_the_shortest_update():
    """With many small steps and no regularization, the weights are MGDA's."""
    weighting = jaxjd.weighting.sdmgrad(
        num_losses=M, step_size=0.3, momentum=0.0, inner_steps=2000, regularization=0.0
    )
    J = np.array([[3.0, 0.0, 0], [0, 1.0, 0], [0, 0, 2.0], [4.0, 4.0, 4.0]])
    G = jnp.asarray(J @ J.T, jnp.float32)
    weights, _ = weighting.update(G, weighting.init(), cross_gramian=G)
    # The weights of orthogonal gradients are proportional to 1 / squared norm.
    expected = np.array([1 / 9, 1, 1 / 4, 0])
    assert_allclose(weights, expected / expected.sum(), atol=1e-4)


def test_the_projection(x64):
    """Only the closest point of the simplex fulfils these conditions."""
    project = jax.jit(project_onto_simplex)
    rng = np.random.default_rng(2)
    for scale in (0.1, 1.0, 1e6):
        point = scale * rng.normal(size=M)
        for mask in np.array([[1, 1, 1, 1], [0, 1, 1, 0], [0, 0, 0, 1]], bool):
            p = np.asarray(project(jnp.asarray(point), jnp.asarray(mask)))
            assert_array_equal(p[~mask], 0)
            assert_allclose(p.sum(), 1, rtol=1e-12)
            assert (p >= 0).all()
            # p - y is smallest, and the same, wherever p > 0.
            excess = (p - point)[mask]
            assert_allclose(excess[p[mask] > 0], excess.min(), rtol=1e-9, atol=1e-12)
    assert_array_equal(project(jnp.ones(M), jnp.zeros(M, bool)), 0)


def test_a_share_of_nothing():
    """Present losses whose weights are all zero start from equal weights."""
    mask = jnp.array([True, True, False, False])
    weights, share = share_of_present(jnp.array([0.0, 0.0, 0.5, 0.5]), mask)
    assert_array_equal(weights, [0.5, 0.5, 0, 0])
    assert share == 0
