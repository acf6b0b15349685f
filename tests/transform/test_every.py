"""Weights that are computed only in some of the steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxjd
from jaxjd.engine import _jaxpr
from tests import models

pytestmark = pytest.mark.usefixtures("x64")

M = 3
UPGRAD = jaxjd.weighting.upgrad()


def task_losses(params, x):
    h = models.hidden(params, x)
    return [jnp.mean(h**2), jnp.mean(h[:, 0]), jnp.mean((h - 1) ** 2)]


def trained(every, params, batches, masks, method="auto"):
    """The weights of all steps, and the updates, without moving the parameters."""
    tx = jaxjd.aggregate(UPGRAD, every=every, num_losses=M)

    def step(state, batch):
        x, mask = batch
        jac = jaxjd.jac(task_losses, method=method)(params, x)
        update, state = tx.update(jac, state, params, mask=mask)
        return state, (models.ravel(update), UPGRAD(jac.gramian(), mask=mask))

    return jax.lax.scan(step, tx.init(params), (batches, masks))


@pytest.mark.parametrize("method", ["dense", "structured", "chunked"])
def test_weights_are_those_of_the_last_step_that_computed_them(method):
    params = models.parameters()
    batches = jax.random.normal(jax.random.key(2), (7, 4, 5), jnp.float64)
    masks = jnp.ones((7, M), bool).at[1, 2].set(False).at[3, 0].set(False)
    state, (updates, weights) = jax.jit(trained, static_argnums=(0, 4))(
        3, params, batches, masks, method
    )
    for n in range(7):
        # Computed in steps 0, 3 and 6. A loss that is missing then, or now, has none.
        reused = jnp.where(masks[n], weights[n - n % 3], 0)
        J = models.matrix(jax.jacrev(task_losses)(params, batches[n]), params)
        np.testing.assert_allclose(updates[n], reused @ J, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(state.reused.age, 1)


def test_every_step_is_as_without():
    params = models.parameters()
    jac = jaxjd.jac(task_losses)(params, jnp.ones((4, 5)))
    plain, always = jaxjd.upgrad(), jaxjd.aggregate(UPGRAD, every=1)
    expected = plain.update(jac, plain.init(params), params)
    found = always.update(jac, always.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_batch_that_is_not_finite_is_not_kept():
    params = models.parameters()
    batches = jnp.ones((4, 4, 5)).at[0].set(jnp.nan)
    masks = jnp.ones((4, M), bool)
    state, (updates, weights) = jax.jit(trained, static_argnums=(0, 4))(
        3, params, batches, masks, "auto"
    )
    assert np.isnan(updates[0]).all()
    assert np.isfinite(updates[1:]).all()
    np.testing.assert_allclose(state.reused.weights, weights[1], rtol=1e-12)
    np.testing.assert_array_equal(state.reused.age, 0)


def test_outside_of_jit_and_with_groups_and_rows():
    """Rows that are stacked by hand, weights for each parameter, no compilation."""
    params = models.parameters()
    tx = jaxjd.aggregate(UPGRAD, every=2, num_losses=M, group="leaf")
    state = tx.init(params)
    assert state.reused.weights.shape == (3, M)
    for n in range(3):
        x = jax.random.normal(jax.random.key(n), (4, 5), jnp.float64)
        rows = jaxjd.jac(task_losses)(params, x).dense()
        update, state = tx.update(rows, state, params)
        for leaf, J, w in zip(
            *map(jax.tree.leaves, (update, rows, list(state.reused.weights))),
            strict=True,
        ):
            J = J.reshape(M, -1)
            if n != 1:
                np.testing.assert_allclose(w, UPGRAD(J @ J.T), rtol=1e-9)
            np.testing.assert_allclose(np.ravel(leaf), w @ J, rtol=1e-9, atol=1e-12)


def products(jaxpr, branch=None):
    """Matrix products in a jaxpr; of a conditional those of one branch, or of none."""
    total = 0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        total += name == "dot_general"
        if name == "cond":
            if branch is not None:
                total += products(eqn.params["branches"][branch].jaxpr, None)
        elif name in _jaxpr.CALLS:
            total += products(_jaxpr.called(eqn)[0], branch)
    return total


@pytest.mark.parametrize("method", ["dense", "structured"])
def test_between_them_a_step_is_one_backward_pass(method):
    """Nothing that only the weights need is computed outside of their branch."""
    params = {"trunk": [jnp.ones((4, 4))] * 3, "heads": jnp.ones((8, 4))}

    def fun(params, x):
        for weight in params["trunk"]:
            x = jnp.tanh(x @ weight)
        return [jnp.mean((x @ head) ** 2) for head in params["heads"]]

    tx = jaxjd.aggregate(UPGRAD, every=10, num_losses=8)

    def step(params, state, x):
        found, jac = jaxjd.value_and_jac(fun, method=method)(params, x)
        return found, tx.update(jac, state, params)

    def of_sum(params, x):
        return jax.value_and_grad(lambda params: sum(fun(params, x)))(params)

    args = params, tx.init(params), jnp.ones((5, 4))
    whole = jax.make_jaxpr(step)(*args).jaxpr
    needed, _ = _jaxpr.needed(whole, whole.outvars)
    plain = products(jax.make_jaxpr(of_sum)(params, args[2]).jaxpr)
    # The forward pass is written down twice, which XLA finds out.
    forward = products(jax.make_jaxpr(fun)(params, args[2]).jaxpr)
    assert products(needed, 0) <= plain + forward
    assert products(needed, 1) > 2 * plain


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"every": 0}, ValueError, "`every` must be at least 1. Got 0"),
        ({"every": 2.0}, TypeError, "`every` must be an integer. Got 2.0"),
        ({"every": 2}, ValueError, "`num_losses` must be given with `every`"),
        ({"every": 2, "num_losses": 0}, ValueError, "`num_losses` must be at least 1"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        jaxjd.aggregate(UPGRAD, **arguments)


def test_another_number_of_losses():
    params = models.parameters()
    tx = optax.chain(jaxjd.aggregate(UPGRAD, every=2, num_losses=4))
    jac = jaxjd.jac(task_losses)(params, jnp.ones((4, 5)))
    with pytest.raises(ValueError, match="`num_losses` must be the number .* 3. Got 4"):
        tx.update(jac, tx.init(params), params)
