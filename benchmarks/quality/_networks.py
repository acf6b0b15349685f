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
    for layer in layers[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return x @ layers[-1]["w"] + layers[-1]["b"]


def relu_network(
    layers: Layers, x: Float[Array | np.ndarray, "*b i"]
) -> Float[Array, "*b o"]:
    """Every layer is rectified."""
    for layer in layers:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x
