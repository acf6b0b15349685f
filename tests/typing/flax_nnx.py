# pyright: strict
# optax has no stubs, and some of jax's own functions are partly unknown.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
"""A user's program with a flax.nnx model, for type checkers only."""

from typing import assert_type

import optax
from flax import nnx
from jax import Array

import jaxjd


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(3, 16, rngs=rngs)
        self.last = nnx.Linear(16, 1, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.last(nnx.relu(self.first(x)))[..., 0]


def loss(model: Net, x: Array, y: Array, *, scale: float) -> Array:
    return scale * (model(x) - y) ** 2


def optimizer(model: Net) -> nnx.Optimizer[Net]:
    tx = optax.chain(jaxjd.upgrad(), optax.adam(1e-2))
    return nnx.Optimizer(model, tx, wrt=nnx.Param)


@nnx.jit
def step(model: Net, optimizer: nnx.Optimizer[Net], x: Array, y: Array) -> Array:
    losses, jac = jaxjd.nnx.value_and_jac(loss, in_axes=(None, 0, 0))(
        model, x, y, scale=2.0
    )
    assert_type(losses, Array)
    assert_type(jac, jaxjd.nnx.Jacobian)
    optimizer.update(model, jac)
    explanation = jaxjd.nnx.explain(loss, in_axes=(None, 0, 0))(model, x, y, scale=2.0)
    assert_type(explanation, jaxjd.Explanation)
    return losses
