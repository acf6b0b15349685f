"""Which losses a step increases, against the rows themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import jaxjd
from tests import models


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


@pytest.mark.parametrize("scale", [1.0, 1e-160])
def test_a_dict_of_losses_of_examples(x64, scale):
    """Of three losses for each of four examples, two of them in one array."""
    params, (x, y) = models.parameters(), models.examples(4)
    step = jax.tree.map(lambda p: scale * jnp.cos(p), params)
    mask = {"fit": np.arange(4) != 2, "moments": np.ones((4, 2), bool)}

    @jax.jit
    def found(params, step):
        axes = (None, 0, 0)
        jac = jaxjd.jac(models.task_losses, in_axes=axes)(params, x, y)
        return jaxjd.conflicts(jac, step), jaxjd.conflicts(jac, step, mask=mask)

    shown, masked = found(params, step)
    J = np.asarray(models.brute_force(models.batched(models.task_losses), params, x, y))
    u = np.asarray(models.ravel(step)) / scale
    cosines = J @ u / np.linalg.norm(J, axis=1) / np.linalg.norm(u)
    assert {"fit": (4,), "moments": (4, 2)} == jax.tree.map(np.shape, shown.cosines)
    assert_allclose(flat(shown.changes), J @ u * scale, rtol=1e-11)
    assert_allclose(flat(shown.cosines), cosines, rtol=1e-11)
    assert_array_equal(flat(shown.increases), cosines > 1e-3)
    assert_allclose(shown.fraction, np.mean(cosines > 1e-3))
    assert_allclose(shown.worst, cosines.max(), rtol=1e-11)
    present = flat(mask)
    assert_allclose(flat(masked.cosines), np.where(present, cosines, 0), rtol=1e-11)
    assert_allclose(masked.fraction, np.mean(cosines[present] > 1e-3))
    assert_allclose(masked.worst, cosines[present].max(), rtol=1e-11)


def test_of_the_final_update_over_training_of_several_seeds():
    """By momentum a loss increases though the aggregator conflicts with none."""

    def losses(params):
        x, y = params["x"], params["y"]
        return jnp.stack([(x - 1) ** 2 + 30 * y**2, (x + 1) ** 2 + (y - 1) ** 2])

    tx = optax.chain(jaxjd.upgrad(), optax.sgd(0.02, momentum=0.9))

    def train(start):
        def step(carry, _):
            params, state = carry
            _, jac = jaxjd.value_and_jac(losses)(params)
            updates, state = tx.update(jac, state, params)
            shown = jaxjd.conflicts(jac, updates)
            params = optax.apply_updates(params, updates)
            return (params, state), (shown, jac.dense(), updates)

        params = {"x": start[0], "y": start[1]}
        return jax.lax.scan(step, (params, tx.init(params)), None, 30)[1]

    starts = jnp.array([[2.0, 1.0], [-2.0, 0.5], [0.3, -1.0]])
    shown, rows, updates = jax.jit(jax.vmap(train))(starts)
    changes = sum(rows[k] * updates[k][..., None] for k in "xy")
    assert_allclose(shown.changes, changes, atol=1e-4 * np.abs(changes).max())
    assert shown.changes.shape == (3, 30, 2)
    assert shown.worst.max() > 0.1
    assert_array_equal(shown.worst, shown.cosines.max(-1))
    # The first step has no momentum yet.
    assert not shown.increases[:, 0].any()


def test_bfloat16_parameters_and_one_loss():
    params, (x, y) = models.parameters(jnp.bfloat16), models.examples(1, jnp.bfloat16)
    _, jac = jaxjd.value_and_jac(lambda p: models.loss(p, x[0], y[0]))(params)
    gradient = jac.vjp(jnp.ones(1))
    up, down = (
        jaxjd.conflicts(jac, jax.tree.map(lambda g, s=s: s * g, gradient))
        for s in (1, -1)
    )
    # A product in bfloat16 is rounded to 2^-9, and a norm is not.
    assert_allclose([up.cosines, down.cosines], [1, -1], rtol=2**-6)
    assert up.cosines.dtype == up.fraction.dtype == jnp.float32
    assert up.increases
    assert up.fraction == 1
    assert not down.increases
    assert down.fraction == 0


def test_what_is_zero_and_what_is_not_finite():
    _, jac = jaxjd.value_and_jac(lambda x: jnp.stack([x[0], 0 * x[1]]))(jnp.ones(2))
    still = jaxjd.conflicts(jac, jnp.zeros(2))
    assert not any(np.any(x) for x in jax.tree.leaves(still))
    assert_allclose(jaxjd.conflicts(jac, jnp.ones(2)).cosines, [np.sqrt(0.5), 0], 1e-6)
    spoilt = jaxjd.conflicts(jac, jnp.array([jnp.nan, 1.0]))
    assert np.isnan(spoilt.fraction)
    assert np.isnan(spoilt.worst)
    none = jaxjd.conflicts(jac, jnp.ones(2), mask=np.zeros(2, bool))
    assert none.fraction == none.worst == 0


def test_the_parameters_of_a_flax_model():
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    x = jnp.arange(12.0).reshape(4, 3)
    tx = optax.chain(jaxjd.upgrad(), optax.sgd(1e-2))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
    _, jac = jaxjd.nnx.value_and_jac(lambda m: {"a": m(x).sum(), "b": m(x)[0, 0]})(
        model
    )
    optimizer.update(model, jac)
    moved = jax.tree.map(jnp.subtract, nnx.state(model, nnx.Param), before)
    shown = jaxjd.conflicts(jac, moved)
    assert all(x < 0 for x in shown.changes.values())
    assert shown.fraction == 0


def test_errors():
    _, jac = jaxjd.value_and_jac(lambda x: {"a": x[0], "b": x[1]})(jnp.ones(2))
    with pytest.raises(TypeError, match="`jac` must be a jaxjd.Jacobian"):
        jaxjd.conflicts(jnp.ones((2, 2)), jnp.ones(2))
    with pytest.raises(ValueError, match="`updates` must have the shapes of the par"):
        jaxjd.conflicts(jac, jnp.ones(3))
    with pytest.raises(ValueError, match=r"`tolerance` must be in \[0, 1\]"):
        jaxjd.conflicts(jac, jnp.ones(2), tolerance=-1.0)
    with pytest.raises(ValueError, match="`mask`"):
        jaxjd.conflicts(jac, jnp.ones(2), mask={"a": True, "c": True})
