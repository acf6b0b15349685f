"""Are models covered that are plain functions of pytrees, as of Haiku or Equinox?"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jaxjd
from tests.engine.structured.conftest import NUM_EXAMPLES as m
from tests.engine.structured.conftest import normal, quickly, relative


def apply_haiku(params, x):
    """Parameters by module, as Haiku's `init` returns them."""
    for name in ("mlp/~/linear_0", "mlp/~/linear_1"):
        x = jnp.tanh(x @ params[name]["w"] + params[name]["b"])
    return x


HAIKU = {
    "mlp/~/linear_0": {"b": normal(5), "w": normal(4, 5)},
    "mlp/~/linear_1": {"b": normal(2), "w": normal(5, 2)},
}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["weight", "bias"],
    meta_fields=["activation", "use_bias"],
)
@dataclasses.dataclass(frozen=True)
class Linear:
    """As a layer of Equinox, [out, in], with fields that are no parameters."""

    weight: jax.Array
    bias: jax.Array | None
    activation: Callable = jnp.tanh
    use_bias: bool = True

    def __call__(self, x):
        y = self.weight @ x
        return self.activation(y + self.bias if self.use_bias else y)


class Sequential(NamedTuple):
    """A pytree of modules, one of them without a bias."""

    layers: tuple[Linear, ...]
    scale: jax.Array

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.scale * x


def apply_equinox(model, x):
    return model(x)


EQUINOX = Sequential(
    (Linear(normal(5, 4), normal(5)), Linear(normal(2, 5), None, jnp.sin, False)),
    normal(2),
)


@pytest.mark.parametrize(
    ("apply", "params"), [(apply_haiku, HAIKU), (apply_equinox, EQUINOX)]
)
def test_pytree(apply, params):
    def loss(params, x):
        return jnp.sum(apply(params, x) ** 2)

    x, weights = normal(m, 4), jnp.asarray(normal(m))
    jacobian_of = jaxjd.jac(loss, in_axes=(None, 0), method="structured")

    def everything(params):
        jacobian = jacobian_of(params, x)
        rows = jax.jacrev(lambda p: jax.vmap(loss, (None, 0))(p, x))(params)
        return jacobian.gramian(), jacobian.vjp(weights), rows

    gramian, combined, rows = quickly(everything, params)
    assert jax.tree.structure(combined) == jax.tree.structure(params)
    flat = [row.reshape(m, -1) for row in jax.tree.leaves(rows)]
    assert relative(gramian, sum(row @ row.T for row in flat)) < 1e-9
    leaves = jax.tree.leaves(combined), jax.tree.leaves(rows)
    for actual, row in zip(*leaves, strict=True):
        assert relative(actual, jnp.tensordot(weights, row, 1)) < 1e-9
    explanation = jaxjd.explain(loss, in_axes=(None, 0))(params, x)
    assert "no rule" not in str(explanation)


def test_sharded_by_xla():
    """Examples over two devices, of a mesh whose axis XLA partitions itself."""

    def loss(params, x):
        def step(h, x):
            return jnp.tanh(h @ params["w"] + x), None

        return jnp.sum(jax.lax.scan(step, x[0] @ params["w"], x)[0] ** 2)

    params, x = {"w": jnp.asarray(normal(4, 4))}, jnp.asarray(normal(4, 3, 4))
    mesh = Mesh(jax.devices()[:2], ("batch",), axis_types=(AxisType.Auto,))
    jacobian_of = jaxjd.jac(loss, in_axes=(None, 0), method="structured")

    @jax.jit
    def products(params, x):
        jacobian = jacobian_of(params, x)
        gramian = jacobian.gramian()
        return gramian, jacobian.vjp(gramian[0])["w"]

    expected = products(params, x)
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("batch")))
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    actual = products(params, sharded)
    for one, other in zip(actual, expected, strict=True):
        assert len(one.sharding.device_set) == 2
        assert relative(one, jax.device_put(other, one.sharding)) < 1e-12
