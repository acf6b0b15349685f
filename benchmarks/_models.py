"""The models that are measured, in Flax. `_torch_models.py` has them in torch."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True)
class Model:
    """A model: `loss(params, *example)` takes one example, `batch(m)` makes m."""

    name: str
    params: Any
    loss: Callable[..., Any]
    batch: Callable[[int], tuple[Any, ...]]
    sizes: tuple[int, ...]

    @property
    def in_axes(self) -> tuple[int | None, ...]:
        return (None, *[0] * len(self.batch(1)))


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in (512, 512):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


def convolutions(x):
    """Three convolutions with group normalisation, each halving the image.

    To be called inside the module that gets their parameters.
    """
    for width in (32, 64, 64):
        x = nn.Conv(width, (3, 3))(x)
        x = nn.relu(nn.GroupNorm(num_groups=8)(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
    return x


class Cnn(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(128)(convolutions(x).reshape(-1)))
        return nn.Dense(10)(x)


class Block(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, mask):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=4)(y, mask=mask)
        y = nn.LayerNorm()(x)
        return x + nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(y)))


class Decoder(nn.Module):
    """Predicts the next character, 64 times. The embedding is also the last layer."""

    depth: int = 2
    vocabulary: int = 256
    length: int = 64
    width: int = 128

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(self.vocabulary, self.width)
        place = self.param(
            "place", nn.initializers.normal(0.02), (self.length, self.width)
        )
        x = embed(tokens) + place
        mask = nn.make_causal_mask(tokens)
        for _ in range(self.depth):
            x = Block(self.width)(x, mask)
        return embed.attend(nn.LayerNorm()(x))


class Gru(nn.Module):
    """Reads an image row by row."""

    @nn.compact
    def __call__(self, x):
        states = nn.RNN(nn.GRUCell(64))(x)
        return nn.Dense(10)(states[-1])


def classifier(name: str, module: nn.Module, shape: tuple[int, ...], sizes) -> Model:
    def loss(params, x, label):
        logits: Any = module.apply(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, label)

    def batch(m):
        x, label = jax.random.split(jax.random.key(m))
        return jax.random.normal(x, (m, *shape)), jax.random.randint(label, (m,), 0, 10)

    params = module.init(jax.random.key(0), jnp.zeros(shape))
    return Model(name, params, loss, batch, sizes)


def decoder(depth: int = 2) -> Model:
    module = Decoder(depth)

    def loss(params, tokens):
        logits: Any = module.apply(params, tokens[:-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[1:])
        return losses.mean()

    def batch(m):
        shape = (m, module.length + 1)
        return (jax.random.randint(jax.random.key(m), shape, 0, module.vocabulary),)

    params = module.init(jax.random.key(0), jnp.zeros(module.length, int))
    return Model("transformer", params, loss, batch, (16, 32))


def models() -> list[Model]:
    return [
        classifier("MLP", Mlp(), (784,), (64, 128, 256)),
        classifier("CNN", Cnn(), (32, 32, 3), (32, 64, 128)),
        decoder(),
        classifier("GRU", Gru(), (28, 28), (64, 128)),
    ]
