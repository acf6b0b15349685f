"""CR-MOGM averages the weights of each loss separately."""

import jax
import jax.numpy as jnp
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import jaxjd

ONE = jnp.eye(3)


def given(gramian, mask, values, state):
    """A weighting with given weights, whose state counts the steps."""
    del gramian
    values = jnp.asarray(values)
    return jnp.where(mask, values, 0) if mask is not None else values, state + 1


INNER = jaxjd.Weighting(
    lambda: jnp.zeros((), int),
    lambda gramian, state, /, *, mask=None, values=(1.0, 2.0, 3.0), **extra_args: given(
        gramian, mask, values, state
    ),
)


def run(weighting, steps):
    """Run steps of (values, mask). Returns all weights and the final state."""
    update = jax.jit(
        lambda state, values, mask: weighting.update(
            ONE, state, mask=mask, values=values
        )
    )
    state, weights = weighting.init(), []
    for values, mask in steps:
        chosen, state = update(
            state, jnp.asarray(values, float), jnp.asarray(mask, bool)
        )
        weights.append(chosen)
    return weights, state


def test_a_loss_that_is_missing_keeps_its_average():
    """A loss that was missing at first starts with its first weight."""
    weighting = jaxjd.weighting.cr_mogm(INNER, 0.75, num_losses=3)
    weights, state = run(
        weighting,
        [
            ([4.0, 8.0, 5.0], [1, 1, 0]),
            ([0.0, 5.0, 6.0], [1, 0, 1]),
            ([3.0, 0.0, 2.0], [1, 1, 1]),
        ],
    )
    assert_allclose(weights, [[4, 8, 0], [3, 0, 6], [3, 6, 5]], rtol=1e-6)
    assert_allclose(state.average, [3, 6, 5], rtol=1e-6)
    assert int(state.weighting) == int(state.count) == 3


def test_weights_that_are_not_finite():
    """They are returned, but do not enter the average."""
    weighting = jaxjd.weighting.cr_mogm(INNER, 0.5, num_losses=3)
    every = [1, 1, 1]
    weights, state = run(
        weighting,
        [([2.0, 2.0, 2.0], every), ([1.0, jnp.nan, 1.0], every), ([4.0] * 3, every)],
    )
    assert jnp.isnan(weights[1][1])
    assert_allclose(weights[2], [3, 3, 3], rtol=1e-6)
    # The inner weighting manages its own state.
    assert int(state.weighting) == 3
    assert int(state.count) == 2


def test_a_schedule_and_initial_weights():
    """The schedule is called with the number of steps made."""
    weighting = jaxjd.weighting.cr_mogm(
        INNER,
        optax.linear_schedule(1.0, 0.0, 2),
        num_losses=3,
        initial_weights=[7, 7, 7],
    )
    steps = [([1.0, 2.0, 3.0], [1, 1, 1])] * 3
    weights, _ = run(weighting, steps)
    assert_allclose(weights[0], [7, 7, 7])
    assert_allclose(weights[1], [4, 4.5, 5], rtol=1e-6)
    assert_allclose(weights[2], [1, 2, 3], rtol=1e-6)


def test_in_a_transformation():
    """The mask and extra arguments reach the inner weighting."""
    tx = jaxjd.cr_mogm(INNER, num_losses=3)
    params = jnp.zeros(3)
    mask = jnp.array([True, False, True])
    update, _ = tx.update(
        jnp.eye(3), tx.init(params), params, mask=mask, values=[5.0, 6.0, 7.0]
    )
    assert_array_equal(update, [5, 0, 7])


def test_not_a_weighting():
    with pytest.raises(TypeError, match="`weighting` must be a jaxjd.Weighting"):
        jaxjd.weighting.cr_mogm(jaxjd.mean(), num_losses=3)
