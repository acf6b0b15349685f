"""The Jacobian of a loss of jinns has the gradients that jinns computes itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.examples.running import example, run

pytest.importorskip("equinox")
pytest.importorskip("jinns")
program = example("jinns_adapter")

# Equinox warns of how the classes of jinns are written.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*init=False")]


def test_the_rows_are_the_gradients_of_jinns():
    loss, params, points = program.problem()
    _, batch = points.get_batch()
    values, jac = program.value_and_jac(loss, params, batch)
    expected, gradients = loss.values_and_grads(params, batch)
    np.testing.assert_allclose(*map(jax.tree.leaves, (values, expected)), rtol=1e-5)
    assert jac.num_losses == 2
    for i, term in enumerate((gradients.dyn_loss[0], gradients.initial_condition)):
        row = jac.vjp(jnp.zeros(2).at[i].set(1.0))
        for got, want in zip(*map(jax.tree.leaves, (row, term)), strict=True):
            np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_trains_and_draws(tmp_path):
    errors = run(program, tmp_path, "--steps", "3")
    assert list(errors) == list(program.AGGREGATORS)
    assert all(0 < error < 2 for error in errors.values())
