"""A small GPT with one loss per sequence: bfloat16, float32 parameters, remat.

The text is what scikit-learn installs to describe its data sets, byte by byte. The
parameters are cast to bfloat16 to compute with, and each block is computed again in the
backward pass (`jax.checkpoint`). The Gramian is float32.

    python examples/language_model.py
    python examples/language_model.py --steps 5000 --width 128

It prints the loss on held-out text, beside that of a model trained on the mean loss,
and draws the losses into `out/language_model.png`. Install what it needs with
`pip install '.[examples]'`.
"""

import argparse
import functools
import importlib.resources
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich
from jaxtyping import Array, Float, Int, Key, PyTree
from matplotlib.figure import Figure
from rich.progress import track
from rich.table import Table

import jaxjd

LENGTH, BATCH, BLOCKS = 64, 16, 2
# UPGrad by its authors' rule, which is for many losses of one kind.
UPGRAD = jaxjd.upgrad(norm_eps=1e-4, reg_eps=1e-4)
AGGREGATORS = {"mean": jaxjd.mean(), "upgrad": UPGRAD}


def init(key: Key[Array, ""], width: int, vocabulary: int) -> PyTree:
    keys = iter(jax.random.split(key, 6))

    def normal(*shape: int, scale: float) -> Array:
        return scale * jax.random.normal(next(keys), shape)

    return {
        "embedding": normal(vocabulary, width, scale=0.02),  # Of logits too.
        "positions": normal(LENGTH, width, scale=0.02),
        "blocks": {  # Stacked, for `lax.scan`.
            "qkv": normal(BLOCKS, width, 3 * width, scale=width**-0.5),
            "out": normal(BLOCKS, width, width, scale=0.02),
            "up": normal(BLOCKS, width, 4 * width, scale=width**-0.5),
            "down": normal(BLOCKS, 4 * width, width, scale=0.02),
        },
    }


def norm(x: Float[Array, "t d"]) -> Float[Array, "t d"]:
    square = jnp.mean(x.astype(jnp.float32) ** 2, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(square + 1e-6).astype(x.dtype)


@jax.checkpoint
def block(x: Float[Array, "t d"], weights: PyTree) -> tuple[Float[Array, "t d"], None]:
    length, width = x.shape
    qkv = (norm(x) @ weights["qkv"]).reshape(length, 3, 2, width // 2)  # 2 heads.
    mixed = jax.nn.dot_product_attention(*jnp.moveaxis(qkv, 1, 0), is_causal=True)
    x = x + mixed.reshape(length, width) @ weights["out"]
    return x + jax.nn.gelu(norm(x) @ weights["up"]) @ weights["down"], None


def loss(params: PyTree, tokens: Int[Array, " t+1"]) -> Float[Array, ""]:
    """The mean cross-entropy of one sequence, in nats per byte."""
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    x = low["embedding"][tokens[:-1]] + low["positions"]
    x, _ = jax.lax.scan(block, x, low["blocks"])
    logits = (norm(x) @ low["embedding"].T).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[1:]).mean()


@functools.partial(jax.jit, static_argnames="tx")
def step(params, state, tokens, *, tx):
    losses, jac = jaxjd.value_and_jac(loss, in_axes=(None, 0))(params, tokens)
    updates, state = tx.update(jac, state, params)
    return optax.apply_updates(params, updates), state, losses.mean()


def text() -> np.ndarray:
    folder = importlib.resources.files("sklearn.datasets") / "descr"
    files = sorted(folder.iterdir(), key=lambda file: file.name)
    texts = [file.read_bytes() for file in files if file.name.endswith(".rst")]
    return np.frombuffer(b"".join(texts), np.uint8)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Returns the loss on held-out text, by aggregator."""
    options = parse_options(argv)
    alphabet, tokens = np.unique(text(), return_inverse=True)
    train, test = np.split(tokens.astype(np.int32), [int(0.9 * len(tokens))])
    test = test[: len(test) // (LENGTH + 1) * (LENGTH + 1)].reshape(-1, LENGTH + 1)
    table = Table("", "train loss", "test loss", title="Nats per byte")
    curves, results, of_all = {}, {}, jax.jit(jax.vmap(loss, (None, 0)))
    for name, aggregator in AGGREGATORS.items():
        rate = optax.warmup_cosine_decay_schedule(0, 3e-3, 20, max(options.steps, 21))
        tx = optax.chain(aggregator, optax.clip_by_global_norm(1.0), optax.adamw(rate))
        params = init(jax.random.key(0), options.width, len(alphabet))
        state, rng, seen = tx.init(params), np.random.default_rng(0), []
        for _ in track(range(options.steps), f"{name:>7}"):
            first = rng.integers(len(train) - LENGTH, size=(BATCH, 1))
            batch = train[first + np.arange(LENGTH + 1)]
            params, state, value = step(params, state, batch, tx=tx)
            seen.append(float(value))
        curves[name], results[name] = seen, float(of_all(params, test).mean())
        table.add_row(name, f"{np.mean(seen[-50:]):.2f}", f"{results[name]:.2f}")
    rich.print(table)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "language_model.png"
    draw(curves).savefig(path, dpi=100)
    print(f"The losses are in {path}")
    return results


def draw(curves: dict[str, list[float]]) -> Figure:
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, values in curves.items():
        width = max(1, len(values) // 20)
        axes.plot(np.convolve(values, np.full(width, 1 / width), "valid"), label=name)
    axes.set(xlabel="step", ylabel="nats per byte", title="train loss, moving average")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=int, default=600, help="steps of 16 sequences of 64 bytes")
    add("--width", type=int, default=48, help="of the residual stream, an even number")
    add("--output", type=Path, default=Path("out"), help="folder for the figure")
    options = parser.parse_args(argv)
    if min(options.steps, options.width) < 1:
        parser.error("arguments --steps and --width: expected at least 1")
    return options


if __name__ == "__main__":
    main()
