"""The weights come from the layers that are named, and every variant trains."""

import jax
import numpy as np
import pytest

from tests.examples.running import example, run

pytest.importorskip("mlxtend")
program = example("partial")

pytestmark = pytest.mark.slow


def test_weights_come_from_the_last_layer():
    params = program.init(jax.random.key(0))
    images = jax.random.uniform(jax.random.key(1), (4, 784))
    labels = np.arange(4)
    rows = jax.vmap(jax.grad(program.loss), (None, 0, 0))(params, images, labels)
    last = np.hstack([np.reshape(x, (4, -1)) for x in jax.tree.leaves(rows["last"])])
    weights = program.UPGRAD(last @ last.T)
    expected = jax.tree.map(lambda x: np.tensordot(weights, x, 1), rows)
    tx = program.AGGREGATORS["the last"]
    _, jac = program.per_example(params, images, labels)
    update, _ = tx.update(jac, tx.init(params), params)
    for got, want in zip(*map(jax.tree.leaves, (update, expected)), strict=True):
        # Relative to the largest: float32 sums in two orders.
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_trains_and_draws(tmp_path):
    curves = run(program, tmp_path, "--steps", "3", "--batch-size", "8")
    assert list(curves) == list(program.AGGREGATORS)
    first = {float(values[0]) for values in curves.values()}
    assert max(first) == pytest.approx(min(first), rel=1e-5)  # The same batch.
    assert len({float(values[2]) for values in curves.values()}) == 4
