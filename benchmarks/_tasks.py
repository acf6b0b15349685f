"""Functions with a few losses, in JAX. `_torch_tasks.py` has them in torch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from benchmarks._models import Block, convolutions

IMAGE = (32, 32, 3)
VOCABULARY, LENGTH, WIDTH = 256, 64, 128
STATE_AND_ACTION = 16
# What the losses call the output of a trunk.
FEATURES = "features"


class Shared(NamedTuple):
    """A trunk that all tasks share, and a head for each of them.

    - `trunk(params["trunk"], x)` returns the features.
    - `head(params["heads"][i], features, labels[i])` returns the loss of task i.
    - `vectorised`: whether the heads are stacked, and all tasks are one `jax.vmap`.
    """

    trunk: Callable[[Any, Array], Array]
    head: Callable[[Any, Array, Array], Float[Array, ""]]
    vectorised: bool


class Tasks(NamedTuple):
    """m losses: `losses(params, *data)` returns all of them, in a pytree.

    If there is a `shared` trunk, params are a dict with "trunk" and "heads", and data
    are the inputs and the labels [m, ...].
    """

    name: str
    m: int
    params: Any
    losses: Callable[..., Any]
    data: tuple[Array, ...]
    shared: Shared | None = None


def dense_layers(key: Array, sizes: tuple[int, ...]) -> list[dict[str, Array]]:
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        {"w": jax.random.normal(key, (a, b)) / np.sqrt(a), "b": jnp.zeros(b)}
        for key, a, b in zip(keys, sizes, sizes[1:], strict=False)
    ]


def dense(layer: dict[str, Array], x: Array) -> Array:
    return x @ layer["w"] + layer["b"]


def physics() -> Tasks:
    """Burgers' equation: the residual, the initial and the boundary condition."""
    keys = jax.random.split(jax.random.key(0), 4)
    params = dense_layers(keys[0], (2, 64, 64, 64, 64, 1))
    inside, start, edge = (
        jax.random.uniform(key, (number, 2), minval=-1.0)
        for key, number in zip(keys[1:], (2000, 256, 256), strict=True)
    )

    def u(params, point):
        for layer in params[:-1]:
            point = jnp.tanh(dense(layer, point))
        return dense(params[-1], point)[0]

    def residual(params, point):
        def slope(point):
            return jax.grad(u, 1)(params, point)

        (u_x, u_t), (u_xx, _) = jax.jvp(slope, (point,), (jnp.array([1.0, 0.0]),))
        return u_t + u(params, point) * u_x - 0.01 / jnp.pi * u_xx

    def losses(params, inside, start, edge):
        def along(function, points):
            return jax.vmap(function, (None, 0))(params, points)

        wanted = -jnp.sin(jnp.pi * start[:, 0])
        return {
            "residual": jnp.mean(along(residual, inside) ** 2),
            "initial": jnp.mean((along(u, start) - wanted) ** 2),
            "boundary": jnp.mean(along(u, edge) ** 2),
        }

    return Tasks("PINN", 3, params, losses, (inside, start, edge))


def agent(m: int) -> Tasks:
    """The critic of a multi-task agent: one network, and a minibatch for each task."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = dense_layers(keys[0], (STATE_AND_ACTION + m, 256, 256, 1))
    inputs = jax.random.normal(keys[1], (m, 256, STATE_AND_ACTION))
    returns = jax.random.normal(keys[2], (m, 256))

    def losses(params, inputs, returns):
        def loss(task):
            which = jnp.broadcast_to(jnp.eye(m)[task], (256, m))
            x = jnp.concatenate([inputs[task], which], axis=1)
            for layer in params[:-1]:
                x = nn.relu(dense(layer, x))
            return jnp.mean((dense(params[-1], x)[:, 0] - returns[task]) ** 2)

        return [loss(task) for task in range(m)]

    return Tasks("RL", m, params, losses, (inputs, returns))


def trunk_and_heads(
    name: str, params: Any, shared: Shared, x: Array, labels: Array
) -> Tasks:
    m = len(labels)

    def losses(params, x, labels):
        heads = params["heads"]
        features = checkpoint_name(shared.trunk(params["trunk"], x), FEATURES)
        if shared.vectorised:
            return jax.vmap(shared.head, (0, None, 0))(heads, features, labels)
        return {
            f"task {i:02}": shared.head(heads[i], features, labels[i]) for i in range(m)
        }

    return Tasks(name, m, params, losses, (x, labels), shared)


def classify(head: dict[str, Array], features: Array, labels: Array) -> Array:
    """The mean loss of a linear classifier, over examples and positions."""
    logits = dense(head, features)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def regress(head: dict[str, Array], features: Array, targets: Array) -> Array:
    return jnp.mean((dense(head, features)[:, 0] - targets) ** 2)


def heads(m: int, width: int, outputs: int) -> list[dict[str, Array]]:
    keys = jax.random.split(jax.random.key(1), m)
    return [dense_layers(key, (width, outputs))[0] for key in keys]


def mlp(params: Any, x: Array) -> Array:
    for layer in params:
        x = nn.relu(dense(layer, x))
    return x


def mlp_trunk(m: int) -> Tasks:
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "trunk": dense_layers(keys[0], (784, 512, 512, 512)),
        "heads": heads(m, 512, 10),
    }
    x = jax.random.normal(keys[1], (256, 784))
    labels = jax.random.randint(keys[2], (m, 256), 0, 10)
    shared = Shared(mlp, classify, False)
    return trunk_and_heads("MLP trunk", params, shared, x, labels)


def vectorised(m: int) -> Tasks:
    """Many tasks that are one computation: their heads are stacked."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "trunk": dense_layers(keys[0], (64, 256, 256)),
        "heads": jax.tree.map(lambda *x: jnp.stack(x), *heads(m, 256, 1)),
    }
    x = jax.random.normal(keys[1], (512, 64))
    targets = jax.random.normal(keys[2], (m, 512))
    shared = Shared(mlp, regress, True)
    return trunk_and_heads("one vmap", params, shared, x, targets)


class Convolutions(nn.Module):
    """The convolutional layers of `_models.Cnn`."""

    @nn.compact
    def __call__(self, x):
        return convolutions(x).reshape(len(x), -1)


def cnn_trunk(m: int) -> Tasks:
    keys = jax.random.split(jax.random.key(0), 3)
    module = Convolutions()
    x = jax.random.normal(keys[0], (64, *IMAGE))
    labels = jax.random.randint(keys[1], (m, 64), 0, 10)
    params = {"trunk": module.init(keys[2], x), "heads": heads(m, 1024, 10)}
    shared = Shared(module.apply, classify, False)  # type: ignore[arg-type]
    return trunk_and_heads("CNN trunk", params, shared, x, labels)


class Transformer(nn.Module):
    """The layers of `_models.Decoder`, without the last one."""

    @nn.compact
    def __call__(self, tokens):
        place = self.param("place", nn.initializers.normal(0.02), (LENGTH, WIDTH))
        x = nn.Embed(VOCABULARY, WIDTH)(tokens) + place
        mask = nn.make_causal_mask(tokens)
        for _ in range(2):
            x = Block(WIDTH)(x, mask)
        return nn.LayerNorm()(x)


def transformer_trunk(m: int) -> Tasks:
    """Each head labels every position with one of 32 classes."""
    keys = jax.random.split(jax.random.key(0), 3)
    module = Transformer()
    tokens = jax.random.randint(keys[0], (32, LENGTH), 0, VOCABULARY)
    labels = jax.random.randint(keys[1], (m, 32, LENGTH), 0, 32)
    params = {"trunk": module.init(keys[2], tokens), "heads": heads(m, WIDTH, 32)}
    shared = Shared(module.apply, classify, False)  # type: ignore[arg-type]
    return trunk_and_heads("transformer trunk", params, shared, tokens, labels)


# The rows of the table, without those that only show how cost grows with m.
ROWS: list[tuple[Callable[..., Tasks], tuple[int, ...]]] = [
    (physics, ()),
    (agent, (10,)),
    (mlp_trunk, (2,)),
    (mlp_trunk, (8,)),
    (mlp_trunk, (16,)),
    (mlp_trunk, (32,)),
    (cnn_trunk, (2,)),
    (cnn_trunk, (8,)),
    (transformer_trunk, (4,)),
    (vectorised, (64,)),
]
