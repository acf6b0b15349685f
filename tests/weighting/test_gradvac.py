"""GradVac turns gradients towards the average cosines of earlier steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jaxjd.weighting._gradvac import gradvac_weights
from jaxjd.weighting._pcgrad import pcgrad_weights

pytestmark = pytest.mark.usefixtures("x64")
M = 5
step = jax.jit(functools.partial(gradvac_weights, decay=0.5, eps=1e-8))


def case(seed):
    rng = np.random.default_rng(seed)
    orders = np.argsort(rng.normal(size=(M, M)), axis=1)
    return rng.normal(size=(M, 8)), jnp.asarray(orders)


def test_the_first_step_is_that_of_pcgrad():
    """With targets of zero, GradVac projects conflicts away, as PCGrad does."""
    J, orders = case(0)
    G, every = jnp.asarray(J @ J.T), jnp.ones(M, bool)
    weights, _ = step(G, every, orders, jnp.zeros((M, M)))
    assert_allclose(weights, pcgrad_weights(G, every, orders), rtol=1e-7)


def test_two_gradients_reach_their_target():
    """g_1 + w g_2 has the target cosine with g_2. g_2 is above its own target."""
    J = np.array([[1.0, 0.2, 0.0], [-0.5, 3.0, 1.0]])
    order = jnp.array([[0, 1], [0, 1]])
    targets = jnp.array([[0.0, 0.7], [-1.0, 0.0]])
    weights, new = step(jnp.asarray(J @ J.T), jnp.ones(2, bool), order, targets)
    # Only g_1 is below its target.
    assert_allclose(weights[0], 1, rtol=1e-12)
    turned = J[0] + (weights[1] - 1) * J[1]
    cosine = turned @ J[1] / np.linalg.norm(turned) / np.linalg.norm(J[1])
    assert_allclose(cosine, 0.7, rtol=1e-6)
    before = J[0] @ J[1] / np.linalg.norm(J[0]) / np.linalg.norm(J[1])
    expected = [[0, (0.7 + before) / 2], [(before - 1) / 2, 0]]
    assert_allclose(new, expected, atol=1e-7)


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_no_scale(scale):
    """Scales cancel, even in float32. TorchJD's eps would dominate at 1e-8."""
    J, orders = case(1)
    targets = jnp.full((M, M), 0.3, jnp.float32)
    J = jnp.asarray(J, jnp.float32)
    args = jnp.ones(M, bool), orders, targets
    expected, averages = step(J @ J.T, *args)
    weights, scaled = step((scale * J) @ (scale * J).T, *args)
    assert_allclose(weights, expected, rtol=1e-4)
    assert_allclose(scaled, averages, atol=1e-5)


def test_losses_that_are_missing_keep_their_targets():
    J, orders = case(2)
    mask = np.array([True, False, True, True, False])
    both = mask[:, None] & mask
    G = jnp.asarray(np.where(both, J @ J.T, 0))
    targets = jnp.asarray(np.full((M, M), 0.4))
    weights, new = step(G, jnp.asarray(mask), orders, targets)
    assert_array_equal(weights[~mask], 0)
    changed = both & ~np.eye(M, dtype=bool)
    assert_array_equal(np.asarray(new)[~changed], 0.4)
    assert (np.asarray(new)[changed] != 0.4).all()
    # The others get the same weights as without the missing ones.
    present = np.flatnonzero(mask)
    among = [np.searchsorted(present, o[mask[o]]) for o in np.asarray(orders)[mask]]
    alone, _ = gradvac_weights(
        jnp.asarray((J @ J.T)[np.ix_(present, present)]),
        jnp.ones(3, bool),
        jnp.asarray(np.stack(among)),
        jnp.full((3, 3), 0.4),
        decay=0.5,
        eps=1e-8,
    )
    assert_allclose(weights[mask], alone, rtol=1e-12)


def test_a_target_of_one():
    """If gradients were equal before and now differ, eps bounds the turn."""
    order = jnp.array([[0, 1], [0, 1]])
    targets = jnp.ones((2, 2))
    G = jnp.array([[1.0, 0.5], [0.5, 1.0]])
    weights, _ = step(G, jnp.ones(2, bool), order, targets)
    assert_allclose(weights, 1 + np.sqrt(0.75) * 1e8, rtol=1e-6)
    exact, _ = gradvac_weights(G, jnp.ones(2, bool), order, targets, decay=0.5, eps=0.0)
    assert jnp.isfinite(exact).all()
