"""A flax.linen training loop works with two changed lines."""

import jax
import jax.numpy as jnp
import optax
import pytest
from numpy.testing import assert_allclose

import jaxjd

linen = pytest.importorskip("flax.linen")
train_state = pytest.importorskip("flax.training.train_state")


class Net(linen.Module):
    batch_norm: bool = False
    train: bool | None = None

    @linen.compact
    def __call__(self, x, train=False):
        x = linen.Dense(8)(x)
        if self.batch_norm:
            x = linen.BatchNorm(use_running_average=not train)(x)
        return linen.Dense(1)(linen.elu(x))[..., 0]


X = jax.random.normal(jax.random.key(0), (16, 3))
Y = jnp.sin(X).sum(axis=1)


def example_loss(apply):
    def loss(params, x, y):
        return (apply({"params": params}, x) - y) ** 2

    return loss


def test_train_state():
    model = Net()
    state = train_state.TrainState.create(
        apply_fn=model.apply,
        params=model.init(jax.random.key(1), X)["params"],
        tx=optax.chain(jaxjd.upgrad(), optax.adam(1e-2)),
    )

    @jax.jit
    def step(state):
        losses, jac = jaxjd.value_and_jac(
            example_loss(state.apply_fn), in_axes=(None, 0, 0)
        )(state.params, X, Y)
        return state.apply_gradients(grads=jac), losses

    first, losses = step(state)
    # Compute the expected step by hand.
    rows = jax.vmap(jax.grad(example_loss(model.apply)), (None, 0, 0))(
        state.params, X, Y
    )
    flat = jnp.concatenate([r.reshape(16, -1) for r in jax.tree.leaves(rows)], axis=1)
    weights = jaxjd.weighting.upgrad()(flat @ flat.T)
    update = jax.tree.map(lambda r: jnp.tensordot(weights, r, 1), rows)
    adam = optax.adam(1e-2)
    update, _ = adam.update(update, adam.init(state.params), state.params)
    expected = optax.apply_updates(state.params, update)
    # Adam's first step divides by the update, so small entries lose digits in float32.
    jax.tree.map(lambda a, b: assert_allclose(a, b, atol=1e-5), first.params, expected)

    state = first
    for _ in range(30):
        state, new = step(state)
    assert (new < losses).mean() > 0.8
    assert state.step == 31


def test_batch_norm_of_the_whole_batch():
    """A whole-batch function works in training mode, with its statistics as `aux`."""
    model = Net(batch_norm=True)
    variables = model.init(jax.random.key(1), X)

    def losses(params, statistics, x, y):
        prediction, updated = model.apply(
            {"params": params, "batch_stats": statistics},
            x,
            train=True,
            mutable=["batch_stats"],
        )
        return (prediction - y) ** 2, updated["batch_stats"]

    params, statistics = variables["params"], variables["batch_stats"]
    (_, updated), jac = jaxjd.value_and_jac(losses, has_aux=True)(
        params, statistics, X, Y
    )
    expected, _ = jax.jacrev(losses, has_aux=True)(params, statistics, X, Y)
    dense = jac.dense()
    jax.tree.map(lambda a, b: assert_allclose(a, b, atol=1e-5), dense, expected)
    mean = model.apply(variables, X, train=True, mutable=["batch_stats"])[1][
        "batch_stats"
    ]["BatchNorm_0"]["mean"]
    assert_allclose(updated["BatchNorm_0"]["mean"], mean, rtol=1e-6)


class TestBatchNormOfOneExample:
    def loss(self, train):
        model = Net(batch_norm=True)
        variables = model.init(jax.random.key(1), X)

        def loss(params, x, y):
            prediction, _ = model.apply(
                {"params": params, "batch_stats": variables["batch_stats"]},
                x,
                train=train,
                mutable=["batch_stats"],
            )
            return (prediction - y) ** 2

        return jaxjd.jac(loss, in_axes=(None, 0, 0)), variables["params"]

    def test_in_training_mode(self):
        make, params = self.loss(train=True)
        message = (
            "BatchNorm 'BatchNorm_0' is in training mode.*running averages.*GroupNorm"
        )
        with pytest.raises(ValueError, match=message):
            make(params, X, Y)

    def test_with_running_averages(self):
        make, params = self.loss(train=False)
        assert make(params, X, Y).num_losses == 16
