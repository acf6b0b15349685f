"""Are narrow types accumulated in float32, on backends that cannot do it themselves?"""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import lax

import jaxjd
from tests.engine.structured.conftest import (
    brute_force,
    normal,
    quickly,
    relative,
    traced,
)

m = 7


def gramian_of(rows):
    flat = [row.astype(jnp.float64).reshape(len(row), -1) for row in rows]
    return sum(row @ row.T for row in flat)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_low_precision(dtype):
    """Products are accumulated in float32; gradients have the parameters' dtype."""

    def fun(p, x):
        h = jnp.tanh(x.astype(dtype) @ p["w"].astype(dtype) + p["b"])
        return jnp.sum(h.astype(jnp.float32) ** 2)

    params = {
        "b": jnp.asarray(normal(4), dtype),
        "w": jnp.asarray(normal(4, 4), "float32"),
    }
    x = jnp.asarray(normal(m, 5, 4), "float32")
    weights = jnp.asarray(normal(m), "float32")

    def products(params):
        jacobian, _, _ = traced(fun, params, x)
        return jacobian.gramian(), jacobian.vjp(weights)

    gramian, combined = quickly(products, params)
    _, rows = quickly(lambda params: brute_force(fun, params, x), params)
    wanted = gramian_of(rows)
    assert gramian.dtype == jnp.float32
    tolerance = 10 * jnp.finfo(dtype).eps
    assert relative(gramian, wanted) < tolerance
    for actual, row in zip(combined, rows, strict=True):
        assert actual.dtype == row.dtype
        wanted = jnp.tensordot(weights, row.astype("float32"), 1)
        assert relative(actual.astype("float32"), wanted) < tolerance


# Products with batch axes. XLA's matrix product for a CPU is taken from this width on.
WIDTH = 64


def scanned(p, x):
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p)[0]


def per_head(p, x):
    heads = x.reshape(len(x), len(p), -1)
    return jnp.tanh(jnp.einsum("thd,hdk->thk", heads, p))


def grouped(p, x):
    numbers = ("NWC", "WIO", "NWC")
    return lax.conv_general_dilated(
        x[None],
        p,
        (1,),
        "SAME",
        dimension_numbers=numbers,
        feature_group_count=WIDTH // p.shape[1],
    )


def experts(p, x):
    return jnp.tanh(jnp.einsum("td,edh->eth", x, p))


MODELS = {
    scanned: (2, WIDTH, WIDTH),
    per_head: (2, WIDTH // 2, 48),
    grouped: (3, WIDTH // 2, WIDTH),
    experts: (3, WIDTH, WIDTH),
}


@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_products_with_batch_axes(model, stored):
    """Layers under a scan, heads, groups of channels, experts: computed in bfloat16."""

    def losses(p, x):
        y = model(0.2 * p.astype(jnp.bfloat16), x)
        return (y.astype(jnp.float32) ** 2).sum()

    p = jnp.asarray(normal(*MODELS[model]), stored)
    x = jnp.asarray(normal(m, 16, WIDTH), "bfloat16")

    @jax.jit  # At XLA's usual level of optimisation, whose products these are.
    def both(p, x):
        gramians = [
            jaxjd.jac(losses, in_axes=(None, 0), contraction=way)(p, x).gramian()
            for way in ("pairs", "rows")
        ]
        rows = jaxjd.jac(losses, in_axes=(None, 0), method="dense")(p, x)
        return gramians, rows.gramian(), gramian_of([rows.dense()])

    gramians, of_rows, wanted = both(p, x)
    # The rows of the last are rounded to the parameters' dtype, the factors are not.
    for gramian in (*gramians, of_rows):
        assert gramian.dtype == jnp.float32
        assert relative(gramian, wanted) < 10 * jnp.finfo("bfloat16").eps
    # And what is accumulated in float32 is as exact as float32.
    assert relative(of_rows, wanted) < 1e-5


def test_scanned_transformer_trains():
    """Layers under `lax.scan` with bfloat16 compute and float32 parameters."""
    layers, heads, length, width = 2, 2, 16, 32
    block = {
        "qkv": (width, 3, heads, width // heads),
        "out": (heads, width // heads, width),
        "up": (width, 2 * width),
        "down": (2 * width, width),
    }
    params = {
        name: jnp.asarray(0.1 * normal(layers, *shape), "float32")
        for name, shape in block.items()
    }
    params["embedding"] = jnp.asarray(normal(20, width), "float32")
    tokens = jnp.arange(m)[:, None] * 3 + jnp.arange(length + 1)[None]
    tokens = (tokens % 20).astype(jnp.uint8)

    def loss(params, tokens):
        p = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
        mask = jnp.tril(jnp.ones((length, length), bool))

        def layer(h, p):
            q, k, v = jnp.einsum("td,dnhk->nhtk", jax.nn.standardize(h), p["qkv"])
            scores = jnp.einsum("hqk,htk->hqt", q, k) / jnp.bfloat16(width**0.5)
            weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf))
            h = h + jnp.einsum("hqt,htk,hkd->qd", weights, v, p["out"])
            return h + jax.nn.gelu(jax.nn.standardize(h) @ p["up"]) @ p["down"], None

        h = jnp.take(p["embedding"], tokens[:-1].astype(jnp.int32), axis=0)
        h, _ = lax.scan(layer, h, {name: p[name] for name in block})
        logits = (h @ p["embedding"].T).astype(jnp.float32)
        log_probabilities = jax.nn.log_softmax(logits / width)
        labels = tokens[1:, None].astype(jnp.int32)
        return -jnp.take_along_axis(log_probabilities, labels, -1).mean()

    tx = optax.chain(jaxjd.upgrad(), optax.sgd(3.0))

    @jax.jit
    def step(params, _):
        losses, jac = jaxjd.value_and_jac(loss, in_axes=(None, 0))(params, tokens)
        updates, _ = tx.update(jac, tx.init(params), params)
        return optax.apply_updates(params, updates), losses.mean()

    _, losses = lax.scan(step, params, None, length=5)
    assert jnp.isfinite(losses).all()
    assert losses[-1] < 0.9 * losses[0]
