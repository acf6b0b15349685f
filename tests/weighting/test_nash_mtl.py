"""Nash-MTL solves the paper's bargain, and limits and keeps weights as documented."""

import jax
import jax.numpy as jnp
import numpy as np
from numpy.testing import assert_allclose, assert_array_equal

import jaxjd

ORTHOGONAL = jnp.diag(jnp.array([1.0, 4.0, 1e-4, 1e4]))


def test_orthogonal_gradients():
    """s w = 1 / w for the squared norms s, so the update has norm 2."""
    weighting = jaxjd.weighting.nash_mtl(num_losses=4, max_norm=0)
    weights, _ = weighting.update(ORTHOGONAL, weighting.init())
    assert_allclose(weights, [1, 0.5, 100, 0.01], rtol=1e-5)
    weighting = jaxjd.weighting.nash_mtl(num_losses=4, max_norm=0.2)
    limited, _ = weighting.update(ORTHOGONAL, weighting.init())
    assert_allclose(limited, weights / 10, rtol=1e-5)


def test_weights_are_kept():
    weighting = jaxjd.weighting.nash_mtl(num_losses=4, update_every=2)
    rows = np.random.default_rng(0).normal(size=(4, 4, 8)).astype(np.float32)
    gramians = jnp.asarray(rows @ rows.swapaxes(1, 2))

    def step(state, gramian):
        _, state = weighting.update(gramian, state)
        return state, state.weights

    _, weights = jax.lax.scan(step, weighting.init(), gramians)
    assert_array_equal(weights[0], weights[1])
    assert_array_equal(weights[2], weights[3])
    shares = (gramians[::2] @ weights[::2, :, None])[..., 0] * weights[::2]
    assert_allclose(shares, 1, rtol=1e-4)
