"""Random weights follow the distribution that they should."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from numpy.testing import assert_allclose, assert_array_equal

import jaxjd

STEPS = 4000


def test_the_law():
    """The logarithms of two weights differ by a normal number of variance 2.

    The bound is for the Kolmogorov-Smirnov statistic: true samples exceed it once in
    twenty thousand times.
    """
    weighting = jaxjd.weighting.random(key=1)
    mask = jnp.array([True, True, False, True])

    def step(state, _):
        weights, state = weighting.update(jnp.eye(4), state, mask=mask)
        return state, weights

    _, weights = jax.lax.scan(step, weighting.init(), None, STEPS)
    weights = np.asarray(weights, float)
    assert_array_equal(weights[:, 2], 0)
    assert_allclose(weights.sum(1), 1, rtol=1e-5)
    for i, j in [(0, 1), (1, 3)]:
        ordered = np.sort(np.log(weights[:, i] / weights[:, j]))
        law = np.array([(1 + math.erf(x / 2)) / 2 for x in ordered])
        distance = np.abs(law - (np.arange(STEPS) + 0.5) / STEPS).max()
        assert distance < 2.3 / np.sqrt(STEPS)
    # Steps are independent: consecutive weights are not correlated.
    first, second = weights[:-1, 0], weights[1:, 0]
    assert abs(np.corrcoef(first, second)[0, 1]) < 4.5 / np.sqrt(STEPS)


def test_a_batch_that_is_not_finite():
    """The weights do not depend on the Gramian, and the key advances."""
    weighting = jaxjd.weighting.random()
    state = weighting.init()
    spoilt, after = weighting.update(jnp.full((3, 3), jnp.nan), state)
    expected, _ = weighting.update(jnp.eye(3), state)
    assert_array_equal(spoilt, expected)
    assert after.key != state.key
