"""A small GPT reads scikit-learn's descriptions of data sets: one loss per sequence.

The text is what scikit-learn installs as `sklearn/datasets/descr/*.rst`, byte by byte.
Parameters are float32, the computation is bfloat16, and each block is rematerialised in
the backward pass.
"""

import functools
import importlib.resources

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from benchmarks.quality._problem import Measure, Params, Problem
from benchmarks.quality.instance_wise import METHODS

LENGTH, BATCH = 32, 8
WIDTH, HEADS, BLOCKS = 32, 2, 2


@functools.cache
def text() -> tuple[np.ndarray, int]:
    """The numbers of the characters, and how many characters there are."""
    folder = importlib.resources.files("sklearn.datasets") / "descr"
    files = sorted(f.name for f in folder.iterdir() if f.name.endswith(".rst"))
    raw = b"".join((folder / name).read_bytes() for name in files)
    found, numbers = np.unique(np.frombuffer(raw, np.uint8), return_inverse=True)
    return numbers.astype(np.int32), len(found)


def init(key: Array, characters: int) -> Params:
    keys = iter(jax.random.split(key, 3 + 4 * BLOCKS))

    def normal(*shape: int, scale: float = 0.02) -> Array:
        return scale * jax.random.normal(next(keys), shape)

    return {
        "characters": normal(characters, WIDTH),
        "positions": normal(LENGTH, WIDTH),
        "blocks": [
            {
                "qkv": normal(3, HEADS, WIDTH, WIDTH // HEADS, scale=WIDTH**-0.5),
                "out": normal(HEADS, WIDTH // HEADS, WIDTH),
                "up": normal(WIDTH, 4 * WIDTH, scale=WIDTH**-0.5),
                "down": normal(4 * WIDTH, WIDTH),
                "scales": jnp.ones((2, WIDTH)),
            }
            for _ in range(BLOCKS)
        ],
        "scale": jnp.ones(WIDTH),
        "logits": normal(WIDTH, characters),
    }


def normalised(x: Float[Array, "t d"], scale: Float[Array, " d"]) -> Array:
    wide = x.astype(jnp.float32)
    mean2 = jnp.mean(wide**2, axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean2 + 1e-6)).astype(x.dtype) * scale


@jax.checkpoint
def block(params: Params, x: Float[Array, "t d"]) -> Float[Array, "t d"]:
    y = normalised(x, params["scales"][0])
    q, k, v = jnp.einsum("td,chde->chte", y, params["qkv"])
    scores = jnp.einsum("hte,hse->hts", q, k).astype(jnp.float32)
    scores = scores / np.sqrt(WIDTH // HEADS)
    causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    attention = jax.nn.softmax(jnp.where(causal, scores, -1e9)).astype(x.dtype)
    mixed = jnp.einsum("hts,hse->hte", attention, v)
    x = x + jnp.einsum("hte,hed->td", mixed, params["out"])
    y = normalised(x, params["scales"][1])
    return x + jax.nn.gelu(y @ params["up"]) @ params["down"]


def loss(params: Params, sequence: Int[Array | np.ndarray, " t+1"]) -> Float[Array, ""]:
    """The mean cross-entropy of one sequence, in nats per byte."""
    cast = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    x = cast["characters"][sequence[:-1]] + cast["positions"]
    for of_block in cast["blocks"]:
        x = block(of_block, x)
    logits = normalised(x, cast["scale"]) @ cast["logits"]
    each = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), sequence[1:]
    )
    return each.mean()


def problem() -> Problem:
    numbers, characters = text()
    train, held_out = np.split(numbers, [int(0.8 * len(numbers))])
    sequences = held_out[: len(held_out) // 128 * 128].reshape(128, -1)
    sequences = sequences[:, : LENGTH + 1]

    def batch(key):
        first = jax.random.randint(key, (BATCH, 1), 0, len(train) - LENGTH)
        return (jnp.asarray(train)[first + jnp.arange(LENGTH + 1)],)

    def measure(params):
        each = jax.vmap(loss, (None, 0))(params, sequences)
        return {"validation": each[::2].mean(), "loss": each[1::2].mean()}

    return Problem(
        title="A small GPT, one loss per sequence",
        num_losses=BATCH,
        steps=400,
        rates=(1e-3, 3e-3, 1e-2, 3e-2),
        init=lambda key: init(key, characters),
        batch=batch,
        losses=loss,
        in_axes=(None, 0),
        measure=measure,
        measures={"loss": Measure("test loss, nats per byte")},
        methods=METHODS,
        memoryless=True,
    )
