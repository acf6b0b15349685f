"""Small dense networks."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

Layers = list[dict[str, Array]]


def dense_layers(key: Key[Array, ""], sizes: Sequence[int]) -> Layers:
    """Weights with Glorot's variance, and biases of zero."""
    initialise = jax.nn.initializers.glorot_normal()
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        {"w": initialise(key, (a, b)), "b": jnp.zeros(b)}
        for key, a, b in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def tanh_network(
    layers: Layers, x: Float[Array | np.ndarray, "*b i"]
) -> Float[Array, "*b o"]:
    """The last layer is linear."""
    y = jnp.asarray(x)
    for layer in layers[:-1]:
        y = jnp.tanh(y @ layer["w"] + layer["b"])
    return y @ layers[-1]["w"] + layers[-1]["b"]


def relu_network(
    layers: Layers, x: Float[Array | np.ndarray, "*b i"]
) -> Float[Array, "*b o"]:
    """Every layer is rectified."""
    y = jnp.asarray(x)
    for layer in layers:
        y = jax.nn.relu(y @ layer["w"] + layer["b"])
    return y
