"""Do whole training loops work: scanned, vmapped, saved and restored?"""

import jax
import jax.numpy as jnp
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import jaxjd
from tests import models

BATCHES, BATCH = 6, 8


def data():
    x, y = models.examples(BATCHES * BATCH, jnp.float32)
    return x.reshape(BATCHES, BATCH, 5), y.reshape(BATCHES, BATCH, 3)


def transformation():
    return optax.chain(jaxjd.upgrad(), optax.adam(1e-2))


def step(carry, batch):
    params, state = carry
    losses, jac = jaxjd.value_and_jac(models.loss, in_axes=(None, 0, 0))(params, *batch)
    updates, state = transformation().update(jac, state, params)
    return (optax.apply_updates(params, updates), state), losses.mean()


def start():
    params = models.parameters(jnp.float32)
    return params, transformation().init(params)


def test_an_epoch_is_one_scan():
    (params, state), losses = jax.jit(lambda carry: jax.lax.scan(step, carry, data()))(
        start()
    )
    carry = start()
    by_hand = []
    compiled = jax.jit(step)
    for batch in zip(*data(), strict=True):
        carry, loss = compiled(carry, batch)
        by_hand.append(loss)
    # Not bitwise equal: XLA fuses a loop body differently, and Adam makes six steps.
    assert_allclose(losses, by_hand, rtol=1e-5)
    assert_allclose(models.ravel(params), models.ravel(carry[0]), rtol=1e-4, atol=1e-5)
    assert jax.tree.structure(state) == jax.tree.structure(carry[1])


def test_vmap_over_seeds():
    """A whole training step runs for several initialisations at once."""
    keys = jax.random.split(jax.random.key(3), 4)

    def initialise(key):
        params = models.parameters(jnp.float32)
        noise = jax.random.normal(key, ())
        params = jax.tree.map(lambda p: p + noise, params)
        return params, transformation().init(params)

    batch = jax.tree.map(lambda x: x[0], data())
    carries = jax.vmap(initialise)(keys)
    (params, _), losses = jax.jit(jax.vmap(step, (0, None)))(carries, batch)
    for i, key in enumerate(keys):
        (alone, _), loss = jax.jit(step)(initialise(key), batch)
        assert_allclose(losses[i], loss, rtol=1e-5)
        together = jax.tree.map(lambda p, i=i: p[i], params)
        assert_allclose(models.ravel(together), models.ravel(alone), atol=1e-4)


def test_saved_and_restored_training_continues_to_the_bit(tmp_path):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    compiled = jax.jit(step)
    carry = start()
    batches = list(zip(*data(), strict=True))
    for batch in batches[:3]:
        carry, _ = compiled(carry, batch)
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", carry)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", start())
    for batch in batches[3:]:
        carry, _ = compiled(carry, batch)
        restored, _ = compiled(restored, batch)
    jax.tree.map(assert_array_equal, restored, carry)


def test_bfloat16_parameters():
    x, y = (z[0].astype(jnp.bfloat16) for z in data())
    params = models.parameters(jnp.bfloat16)
    tx = optax.chain(jaxjd.upgrad(), optax.sgd(1e-2))

    @jax.jit
    def train(params, state):
        losses, jac = jaxjd.value_and_jac(models.loss, in_axes=(None, 0, 0))(
            params, x, y
        )
        updates, state = tx.update(jac, state, params)
        return optax.apply_updates(params, updates), state, losses.mean(), jac.gramian()

    state = tx.init(params)
    history = []
    for _ in range(20):
        params, state, loss, gramian = train(params, state)
        history.append(loss)
    assert gramian.dtype == jnp.float32
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert history[-1] < history[0]


def test_a_trunk_and_two_heads():
    """Each head gets its task's gradient; the trunk's update conflicts with no task."""
    x, _ = models.examples(32, jnp.float32)
    targets = {"a": jnp.sin(x[:, 0]), "b": -jnp.sin(x[:, 0]) + x[:, 1]}
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "trunk": jax.random.normal(keys[0], (5, 8)) / 2,
        "heads": {
            k: jax.random.normal(key, (8,))
            for k, key in zip("ab", keys[1:], strict=True)
        },
    }

    def losses(params):
        features = jnp.tanh(x @ params["trunk"])
        return {
            task: jnp.mean((features @ head - targets[task]) ** 2)
            for task, head in params["heads"].items()
        }

    aggregators = {"trunk": jaxjd.upgrad(), "heads": jaxjd.sum()}
    tx = jaxjd.partition(aggregators, {"trunk": "trunk", "heads": "heads"})

    @jax.jit
    def update(params):
        _, jac = jaxjd.value_and_jac(losses)(params)
        return tx.update(jac, tx.init(params), params)[0]

    result = update(params)
    for task in "ab":
        expected = jax.grad(lambda p, task=task: losses(p)[task])(params)
        assert_allclose(
            result["heads"][task], expected["heads"][task], rtol=1e-4, atol=1e-6
        )
        # The trunk's update increases no task's loss.
        inner = jnp.sum(expected["trunk"] * result["trunk"])
        norms = jnp.linalg.norm(expected["trunk"]) * jnp.linalg.norm(result["trunk"])
        assert inner > -1e-5 * norms
