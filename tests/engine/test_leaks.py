"""Does no tracer outlive its trace? `jax.checking_leaks()` finds one that does.

Tracing is all that matters here, so nothing is compiled.
"""

import gc

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import lax

import jaxjd
from tests import models


@pytest.fixture(autouse=True)
def checking_leaks():
    gc.collect()
    # Each trace searches all objects for its tracers. Those of before are none.
    gc.freeze()
    with jax.checking_leaks():
        yield
    gc.unfreeze()


def test_a_leak_is_seen():
    kept = []
    with pytest.raises(Exception, match="Leaked trace"):
        jax.eval_shape(lambda x: kept.append(x) or x, 1.0)


def nested(params, x, y):
    """Every kind of body that is walked twice."""
    w, b = params["hidden"]

    @jax.checkpoint
    def layer(h):
        return lax.cond(h.sum() > 0, lambda: jnp.tanh(h @ w + b), lambda: h @ w)

    def step(h, scale):
        return layer(x) * scale + h, None

    h, _ = lax.scan(step, jnp.zeros(3), params["scale"] * jnp.arange(2.0))
    return ((jax.jit(lambda h: h @ w.T @ w)(h) - y) ** 2).sum()


@pytest.mark.parametrize("fun", [models.loss, nested], ids=lambda fun: fun.__name__)
def test_training_step(fun):
    params, (x, y) = models.parameters(jnp.float32), models.examples(5, jnp.float32)
    tx = optax.chain(jaxjd.mgda(), optax.sgd(0.1))

    @jax.jit
    def train(params, state):
        def step(carry, _):
            params, state = carry
            losses, jac = jaxjd.value_and_jac(fun, in_axes=(None, 0, 0))(params, x, y)
            updates, state = tx.update(jac, state, params)
            return (optax.apply_updates(params, updates), state), losses.sum()

        return lax.scan(step, (params, state), None, length=2)[1]

    assert jax.eval_shape(train, params, tx.init(params)).shape == (2,)


METHODS = [
    {},
    {"chunk_size": 2},
    {"method": "chunked", "chunk_size": 2},
    {"method": "dense"},
]


@pytest.mark.parametrize("options", METHODS, ids=str)
def test_jacobian(options):
    """It leaves a `jit`, and is used in others."""
    params, (x, y) = models.parameters(jnp.float32), models.examples(5, jnp.float32)
    make = jaxjd.jac(models.task_losses, in_axes=(None, 0, 0), **options)
    jac = jax.eval_shape(jax.jit(make), params, x, y)
    everything = jax.eval_shape(
        lambda jac: (jac.gramian(), jac.vjp(jnp.ones(15)), jac.dense()), jac
    )
    assert everything[0].shape == (15, 15)
    some = jac.restrict({"hidden": True, "scale": False})
    cross = jax.eval_shape(lambda some: some.cross_gramian(some), some)
    assert cross.shape == (15, 15)
    jax.eval_shape(lambda jac: jac.jvp(params), jac)


def test_losses_of_tasks_and_explanation():
    params, (x, y) = models.parameters(jnp.float32), models.examples(5, jnp.float32)

    @jax.jit
    def gramian(x):
        # The function closes over a tracer.
        together = models.batched(models.loss)
        return jaxjd.jac(lambda p: together(p, x, y))(params).gramian()

    assert jax.eval_shape(gramian, x).shape == (5, 5)
    explain = jaxjd.explain(nested, in_axes=(None, 0, 0))
    assert "dot_general" in str(explain(params, x, y))
