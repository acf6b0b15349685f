"""Are the layers of Flax covered, by rules, and exactly?"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.engine.structured.conftest import NUM_EXAMPLES as m
from tests.engine.structured.conftest import normal

nn = pytest.importorskip("flax.linen")
nnx = pytest.importorskip("flax.nnx")


def filled(shapes):
    """Normal numbers in the shapes of variables, which is faster than to initialise."""
    return jax.tree.map(
        lambda x: normal(*x.shape) / np.sqrt(max(x.shape, default=1)), shapes
    )


def covered(agrees, fun, params, *examples):
    """Only vectors, and tables that are added, may be perturbed themselves."""
    names = agrees(fun, params, *examples, direct=None)
    allowed = re.compile(r"bias|scale|cls|place|lora_b_bias")
    assert all(allowed.search(name) for name in names), names


class Tied(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(7, 4)
        return embed.attend(nn.LayerNorm()(embed(tokens)))


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        mask = nn.make_causal_mask(jnp.ones(x.shape[0]))
        attend = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=4)
        return attend(nn.LayerNorm()(x), mask=mask)


class Step(nn.Module):
    """A layer in the form that `nn.scan` repeats."""

    @nn.compact
    def __call__(self, x, _):
        return jnp.tanh(nn.Dense(4)(x)), None


class Stacked(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            nn.remat(Step),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        return layers()(x, None)[0]


class SharedLayers(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            Step, variable_broadcast="params", split_rngs={"params": False}, length=3
        )
        return layers()(x, None)[0]


class ClassToken(nn.Module):
    @nn.compact
    def __call__(self, x):
        token = self.param("cls", nn.initializers.normal(), (1, 4))
        place = self.param("place", nn.initializers.normal(), (6, 4))
        return nn.Dense(3)(jnp.concatenate([token, x]) + place)


class Experts(nn.Module):
    """All tokens go to the expert that their gate prefers, by its gathered weights."""

    @nn.compact
    def __call__(self, x):
        gates = nn.softmax(nn.Dense(3)(x))
        weights = self.param("w", nn.initializers.normal(), (3, 4, 5))
        best = jnp.argmax(gates, axis=-1)
        y = jnp.einsum("td,tdh->th", x, weights[best])
        return y * jnp.take_along_axis(gates, best[:, None], axis=-1)


LINEN = {
    "Dense": (nn.Dense(5), (4,)),
    "DenseGeneral": (nn.DenseGeneral((2, 3), axis=(-2, -1)), (5, 3, 4)),
    "DenseGeneral_batched": (nn.DenseGeneral(3, axis=-1, batch_dims=0), (5, 2, 4)),
    "Conv": (nn.Conv(4, (3, 3), strides=(2, 1)), (6, 5, 2)),
    "Conv_grouped": (nn.Conv(4, (3,), feature_group_count=2), (6, 4)),
    "Conv_circular": (nn.Conv(4, (3,), padding="CIRCULAR"), (6, 2)),
    "ConvTranspose": (nn.ConvTranspose(4, (3, 3), strides=(2, 2)), (4, 3, 2)),
    "ConvTranspose_kernel": (nn.ConvTranspose(4, (3,), transpose_kernel=True), (4, 2)),
    "Embed": (nn.Embed(7, 3), None),
    "Tied": (Tied(), None),
    "RMSNorm": (nn.Sequential([nn.Dense(6), nn.RMSNorm()]), (5, 4)),
    "GroupNorm": (nn.Sequential([nn.Dense(6), nn.GroupNorm(num_groups=2)]), (5, 4)),
    "Attention": (Attention(), (5, 4)),
    "WeightNorm": (nn.WeightNorm(nn.Dense(5)), (6, 4)),
    "SimpleCell": (nn.RNN(nn.SimpleCell(4, param_dtype=np.float64)), (5, 3)),
    "LSTM": (nn.RNN(nn.LSTMCell(4, param_dtype=np.float64)), (5, 3)),
    "OptimizedLSTM": (nn.RNN(nn.OptimizedLSTMCell(4, param_dtype=np.float64)), (5, 3)),
    "GRU": (nn.RNN(nn.GRUCell(4, param_dtype=np.float64), reverse=True), (5, 3)),
    "Stacked": (Stacked(), (4,)),
    "SharedLayers": (SharedLayers(), (5, 4)),
    "ClassToken": (ClassToken(), (5, 4)),
    "Experts": (Experts(), (5, 4)),
}
TOKENS = np.array([[0, 3, 3, 6], [6, 1, 3, 2], [2, 5, 0, 0]])


@pytest.mark.parametrize("name", LINEN)
def test_linen(name, agrees):
    module, shape = LINEN[name]
    x = TOKENS if shape is None else normal(m, *shape)
    variables = filled(jax.eval_shape(module.init, jax.random.key(0), x[0]))
    covered(
        agrees, lambda v, x: jnp.sum(jnp.tanh(module.apply(v, x)) ** 2), variables, x
    )


def test_batch_norm_in_inference(agrees):
    module = nn.Sequential([nn.Dense(6), nn.BatchNorm(use_running_average=True)])
    x = normal(m, 5, 4)
    variables = filled(jax.eval_shape(module.init, jax.random.key(0), x[0]))
    statistics = jax.tree.map(np.square, variables["batch_stats"])

    def fun(params, x):
        y = module.apply({"params": params, "batch_stats": statistics}, x)
        return jnp.sum(jnp.tanh(y) ** 2)

    covered(agrees, fun, variables["params"], x)


def test_dropout_with_a_key_per_example(agrees):
    module = nn.Sequential(
        [nn.Dense(6), nn.Dropout(0.5, deterministic=False), nn.Dense(2)]
    )
    x, keys = normal(m, 5, 4), jax.random.split(jax.random.key(1), m)
    init = {"params": keys[0], "dropout": keys[1]}
    variables = filled(jax.eval_shape(module.init, init, x[0]))

    def fun(variables, x, key):
        return jnp.sum(module.apply(variables, x, rngs={"dropout": key}) ** 2)

    covered(agrees, fun, variables, x, keys)


class LoraMlp(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.LoRA(
            4, 2, 6, base_module=nnx.Linear(4, 6, rngs=rngs), rngs=rngs
        )
        self.norm = nnx.LayerNorm(6, rngs=rngs)
        self.last = nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x):
        return self.last(jnp.tanh(self.norm(self.first(x))))


class AttendingBlock(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
        self.norm = nnx.RMSNorm(4, rngs=rngs)
        self.embed = nnx.Embed(7, 4, dtype=np.float64, rngs=rngs)

    def __call__(self, tokens):
        return self.embed.attend(self.norm(self.attention(self.embed(tokens))))


class Convolutions(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Conv(2, 4, (3, 3), rngs=rngs)
        self.norm = nnx.GroupNorm(4, num_groups=2, rngs=rngs)
        self.last = nnx.ConvTranspose(4, 2, (2, 2), strides=(2, 2), rngs=rngs)

    def __call__(self, x):
        return self.last(jnp.tanh(self.norm(self.first(x))))


NNX = {
    LoraMlp: (5, 4),
    AttendingBlock: None,
    Convolutions: (4, 3, 2),
    lambda rngs: nnx.RNN(nnx.GRUCell(3, 4, param_dtype=np.float64, rngs=rngs)): (5, 3),
}


@pytest.mark.parametrize(
    "module", NNX, ids=["lora", "attention", "convolutions", "gru"]
)
def test_nnx(module, agrees):
    shape = NNX[module]
    x = TOKENS if shape is None else normal(m, *shape)
    graph, params, rest = nnx.split(module(nnx.Rngs(0)), nnx.Param, ...)
    params = filled(params)

    def fun(params, x):
        # Copied: what layers count, such as random keys, they count in this trace.
        model = nnx.merge(graph, params, jax.tree.map(jnp.asarray, rest))
        return jnp.sum(jnp.tanh(model(x)) ** 2)

    covered(agrees, fun, params, x)
