"""The model sees nothing of what follows, and computes and learns as it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxjd
from tests.examples.running import example, run

program = example("language_model")

pytestmark = pytest.mark.slow


def test_precision_and_causality():
    params = program.init(jax.random.key(0), 8, 11)
    tokens = jax.random.randint(jax.random.key(1), (3, program.LENGTH + 1), 0, 11)
    x = jax.random.normal(jax.random.key(2), (program.LENGTH, 8))
    weights = jax.tree.map(lambda x: x[0], params["blocks"])
    # Only a block mixes positions.
    before, _ = program.block(x, weights)
    later, _ = program.block(x.at[40].set(x[0]), weights)
    np.testing.assert_array_equal(before[:40], later[:40])
    assert not np.allclose(before[41:], later[41:])
    losses, jac = jaxjd.value_and_jac(program.loss, in_axes=(None, 0))(params, tokens)
    assert losses.dtype == jac.gramian().dtype == jnp.float32
    update = jac.vjp(jnp.ones(3))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(update))
    # A model that knows nothing; its logits are near zero.
    np.testing.assert_allclose(losses, np.log(11), rtol=0.1)


def test_trains_and_draws(tmp_path):
    losses = run(program, tmp_path, "--steps", "3", "--width", "8")
    assert list(losses) == ["mean", "upgrad"]
    characters = len(np.unique(program.text()))
    for loss in losses.values():
        assert 0 < loss < np.log(characters) + 0.1
