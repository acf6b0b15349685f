"""There is a loss for each example and task, and the program learns both."""

import jax
import numpy as np
import pytest

import jaxjd
from tests.examples.running import example, run

program = example("iwmtl")

pytestmark = pytest.mark.slow


def test_trains_and_draws(tmp_path):
    errors = run(program, tmp_path, "--steps", "60")
    assert list(errors) == list(program.AGGREGATORS)
    for wrong, away in errors.values():
        assert 0 <= wrong < 0.9  # Chance.
        assert 0 < away < 0.5


def test_each_example_has_two_losses():
    params = program.init(jax.random.key(0))
    images = jax.random.uniform(jax.random.key(1), (3, 64))
    per_example = jaxjd.value_and_jac(program.losses, in_axes=(None, 0, 0))
    values, jac = per_example(params, images, np.arange(3))
    assert jac.num_losses == 6
    halves = program.predict(params, images[:, :32])["lower"]
    expected = np.mean((np.asarray(halves) - images[:, 32:]) ** 2, axis=1)
    np.testing.assert_allclose(values["lower"], expected, rtol=1e-5)
