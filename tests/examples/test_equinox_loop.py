"""A step of the mean is that of Equinox's own gradient, and the program trains."""

import jax
import numpy as np
import optax
import pytest

import jaxjd
from tests.examples.running import example, run

eqx = pytest.importorskip("equinox")
program = example("equinox_loop")

pytestmark = pytest.mark.slow


def test_a_step_of_the_mean():
    model = eqx.nn.MLP(30, "scalar", 4, depth=1, key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (5, 30))
    y = np.array([0.0, 1.0, 1.0, 0.0, 1.0], np.float32)
    tx = optax.chain(jaxjd.mean(), optax.sgd(0.1))
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))
    found, _, loss = program.step(model, state, tx, x, y)

    def mean_loss(model):
        return jax.vmap(program.loss, (None, 0, 0))(model, x, y).mean()

    expected, gradient = eqx.filter_value_and_grad(mean_loss)(model)
    assert loss == pytest.approx(float(expected), rel=1e-5)
    moved = eqx.apply_updates(model, jax.tree.map(lambda g: -0.1 * g, gradient))
    for got, want in zip(*map(jax.tree.leaves, (found, moved)), strict=True):
        if eqx.is_array(got):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_trains_and_draws(tmp_path):
    errors = run(program, tmp_path, "--steps", "60", "--width", "8")
    assert list(errors) == list(program.AGGREGATORS)
    assert all(0 <= error < 0.4 for error in errors.values())
