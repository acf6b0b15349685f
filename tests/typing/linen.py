# pyright: strict
# optax has no stubs, and some of jax's own functions are partly unknown.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# mypy: allow-untyped-calls, no-warn-return-any
"""A user's program with a flax.linen model, for type checkers only."""

from typing import Any, cast

import jax
import optax
from flax import linen
from flax.training.train_state import TrainState
from jax import Array

import jaxjd


class Net(linen.Module):
    @linen.compact
    def __call__(self, x: Array) -> Array:
        return linen.Dense(1)(linen.relu(linen.Dense(16)(x)))[..., 0]


def create(key: Array, x: Array) -> TrainState:
    net = Net()
    variables = net.init(key, x)
    tx = optax.chain(jaxjd.upgrad(), optax.adam(1e-3))
    return TrainState.create(apply_fn=net.apply, params=variables["params"], tx=tx)


@jax.jit
def step(state: TrainState, x: Array, y: Array) -> tuple[TrainState, Array]:
    def loss(params: Any, x: Array, y: Array) -> Array:
        prediction = cast(Array, state.apply_fn({"params": params}, x))
        return (prediction - y) ** 2

    losses, jac = jaxjd.value_and_jac(loss, in_axes=(None, 0, 0))(state.params, x, y)
    return state.apply_gradients(grads=jac), losses
