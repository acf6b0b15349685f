"""The reference solution solves Burgers' equation, and the program learns it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.examples.running import example, run

program = example("physics_informed")


def test_the_reference_solves_the_equation():
    """By central differences, away from the front."""
    t, x = np.meshgrid(np.linspace(0.1, 0.9, 9), np.linspace(0.2, 0.9, 8))
    h = 1e-3

    def u(i=0, j=0):
        return program.solution(t + i * h, x + j * h)

    speed, slope = (u(1) - u(-1)) / (2 * h), (u(0, 1) - u(0, -1)) / (2 * h)
    curvature = (u(0, 1) - 2 * u() + u(0, -1)) / h**2
    terms = speed, u() * slope, program.VISCOSITY * curvature
    residual = terms[0] + terms[1] - terms[2]
    # The error of the differences, h² times a third derivative.
    assert np.abs(residual).max() < 1e-4 * max(np.abs(x).max() for x in terms)


def test_the_reference_starts_and_ends_as_it_should():
    x = np.linspace(-1, 1, 21)
    start = program.solution(np.zeros(21), x)
    np.testing.assert_allclose(start, -np.sin(np.pi * x), atol=1e-12)
    np.testing.assert_allclose(program.solution(np.ones(2), x[[0, -1]]), 0, atol=1e-12)


@pytest.mark.slow
def test_the_residual_is_that_of_differences(x64):
    params = program.init(jax.random.key(0))
    t, x, h = jnp.asarray(0.4), jnp.asarray(0.3), 1e-3

    def u(i=0, j=0):
        return program.u(params, t + i * h, x + j * h)

    expected = (u(1) - u(-1)) / (2 * h) + u() * (u(0, 1) - u(0, -1)) / (2 * h)
    expected -= program.VISCOSITY * (u(0, 1) - 2 * u() + u(0, -1)) / h**2
    assert program.residual(params, t, x) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.slow
def test_trains_and_draws(tmp_path):
    errors = run(program, tmp_path, "--steps", "50")
    assert list(errors) == ["mean", "upgrad", "nash_mtl"]
    # Zero has the error 1.
    assert all(0 < error < 1 for error in errors.values())
