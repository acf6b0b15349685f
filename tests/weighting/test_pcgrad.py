"""PCGrad projects conflicts away, in random order."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

import jaxjd
from jaxjd.weighting._pcgrad import pcgrad_weights
from jaxjd.weighting._permutations import row_permutations

pytestmark = pytest.mark.usefixtures("x64")
weights_of = jax.jit(pcgrad_weights)


def test_two_gradients_that_conflict():
    """Each becomes orthogonal to the other, in either order."""
    J = np.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    inner, (a, b) = J[0] @ J[1], (J**2).sum(1)
    weighting = jaxjd.weighting.pcgrad()
    weights, _ = weighting.update(jnp.asarray(J @ J.T), weighting.init())
    assert_allclose(weights, [1 - inner / a, 1 - inner / b], rtol=1e-12)


def test_losses_that_are_missing():
    """The others are projected in the same order as without the missing ones."""
    rng = np.random.default_rng(0)
    J = rng.normal(size=(6, 4))
    G = J @ J.T
    orders = np.argsort(rng.normal(size=(6, 6)), axis=1)
    present = np.array([0, 2, 3, 5])
    mask = np.isin(np.arange(6), present)
    masked = np.where(mask[:, None] & mask, G, 0)
    weights = weights_of(jnp.asarray(masked), jnp.asarray(mask), jnp.asarray(orders))
    among = np.stack([np.searchsorted(present, o[mask[o]]) for o in orders[present]])
    some = jnp.asarray(G[np.ix_(present, present)])
    alone = weights_of(some, jnp.ones(4, bool), jnp.asarray(among))
    assert_allclose(weights[present], alone, rtol=1e-12)
    assert (np.abs(alone - 1) > 0.1).any()


def test_norms_from_1e_minus_6_to_1e6():
    """float32 and float64 agree, so no threshold depends on the scale."""
    rng = np.random.default_rng(1)
    J = rng.normal(size=(6, 4)) * 10.0 ** np.linspace(-6, 6, 6)[:, None]
    orders = jnp.asarray(np.argsort(rng.normal(size=(6, 6)), axis=1))
    G = (J.astype(np.float32) @ J.T.astype(np.float32)).astype(float)
    exact = weights_of(jnp.asarray(G), jnp.ones(6, bool), orders)
    rounded = weights_of(jnp.asarray(G, jnp.float32), jnp.ones(6, bool), orders)
    assert_allclose(rounded, exact, rtol=1e-4)


def test_every_order_is_as_likely():
    """Each of the 6 orders of 3 comes equally often, within 5 standard deviations."""
    keys = jax.random.split(jax.random.key(0), 2000)
    orders = jax.jit(jax.vmap(lambda key: row_permutations(key, 3)))(keys)
    assert orders.shape == (2000, 3, 3)
    for order in itertools.permutations(range(3)):
        times = (np.asarray(orders) == order).all(axis=2).sum(axis=0)
        assert_allclose(times, 2000 / 6, atol=5 * np.sqrt(2000 * 5 / 36))
    # The rows of a step are independent.
    same = (orders[:, 0] == orders[:, 1]).all(axis=1).sum()
    assert_allclose(same, 2000 / 6, atol=5 * np.sqrt(2000 * 5 / 36))
