"""One of two processes that train together, each with half of the devices.

    python -m tests.sharding.two_processes PORT PROCESS

Prints the largest relative difference of the update to that on one device.
"""

import os
import sys

from tests.xla import FLAGS

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = FLAGS

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxjd

NUM_EXAMPLES = 64


def loss(params, x, y):
    h = jnp.tanh(x @ params["w1"] + params["b1"])
    return jnp.sum((h @ params["w2"] - y) ** 2)


def update_of(params, x, y):
    jac = jaxjd.jac(loss, in_axes=(None, 0, 0))(params, x, y)
    return jac.vjp(jaxjd.weighting.upgrad()(jac.gramian()))


def main(port: str, process: int) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, process)
    random = np.random.default_rng(0)
    params = {
        "w1": random.normal(size=(16, 64)) / 4,
        "b1": np.zeros(64),
        "w2": random.normal(size=(64, 8)) / 8,
    }
    x, y = random.normal(size=(NUM_EXAMPLES, 16)), random.normal(size=(NUM_EXAMPLES, 8))
    params, x, y = jax.tree.map(np.float32, (params, x, y))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def place(array, *spec):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.make_array_from_callback(array.shape, sharding, lambda i: array[i])

    placed = jax.tree.map(place, params), place(x, "data"), place(y, "data")
    whole = NamedSharding(mesh, PartitionSpec())
    update = jax.device_get(jax.jit(update_of, out_shardings=whole)(*placed))
    with jax.default_device(jax.local_devices()[0]):
        expected = jax.device_get(jax.jit(update_of)(params, x, y))
    differences = [
        np.abs(update[name] - expected[name]).max() / np.abs(expected[name]).max()
        for name in params
    ]
    print(max(differences))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
