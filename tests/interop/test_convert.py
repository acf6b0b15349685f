"""Every layer computes the same with converted weights, and mistakes raise."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("flax")

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen, nnx

from interop import to_linen, to_nnx
from interop.precision import jax_precision, torch_dtype

TOLERANCES = {"float32": 1e-6, "float64": 1e-12}
SPATIAL = (7, 6, 5)


def image(channels, dims):
    return torch.Size((2, channels, *SPATIAL[:dims]))


def conv(dims, **kwargs):
    return getattr(torch.nn, f"Conv{dims}d")(4, 6, 3, **kwargs)


def deconv(dims, **kwargs):
    return getattr(torch.nn, f"ConvTranspose{dims}d")(4, 6, 3, **kwargs)


# torch's layer, Flax's layer, the shape of an input in torch, conversion options.
LAYERS = {
    "Linear": (torch.nn.Linear(5, 3), linen.Dense(3), (2, 5), {}),
    "Linear without bias": (
        torch.nn.Linear(5, 3, bias=False),
        linen.Dense(3, use_bias=False),
        (2, 5),
        {},
    ),
    "Embedding": (torch.nn.Embedding(7, 3), linen.Embed(7, 3), (2, 4), {}),
    "LayerNorm": (torch.nn.LayerNorm(8), linen.LayerNorm(epsilon=1e-5), (2, 3, 8), {}),
    "GroupNorm": (
        torch.nn.GroupNorm(2, 4),
        linen.GroupNorm(2, epsilon=1e-5),
        image(4, 2),
        {},
    ),
    "grouped, strided Conv2d": (
        conv(2, groups=2, stride=2, padding=1),
        linen.Conv(6, (3, 3), 2, padding=1, feature_group_count=2),
        image(4, 2),
        {},
    ),
    "strided, padded ConvTranspose2d": (
        deconv(2, stride=2, padding=1),
        linen.ConvTranspose(6, (3, 3), (2, 2), padding=1),
        image(4, 2),
        {"transposed": [""]},
    ),
    "ConvTranspose2d, transpose_kernel": (
        deconv(2),
        linen.ConvTranspose(6, (3, 3), padding="VALID", transpose_kernel=True),
        image(4, 2),
        {},
    ),
}
for _dims in (1, 2, 3):
    LAYERS[f"Conv{_dims}d"] = (
        conv(_dims),
        linen.Conv(6, (3,) * _dims, padding="VALID"),
        image(4, _dims),
        {},
    )
    LAYERS[f"ConvTranspose{_dims}d"] = (
        deconv(_dims),
        linen.ConvTranspose(6, (3,) * _dims, padding="VALID"),
        image(4, _dims),
        {"transposed": [""]},
    )
    LAYERS[f"BatchNorm{_dims}d"] = (
        getattr(torch.nn, f"BatchNorm{_dims}d")(4).eval(),
        linen.BatchNorm(use_running_average=True),
        image(4, _dims),
        {},
    )


def randomised(module, dtype, seed=0):
    """Draw all weights: scales of 1 and biases of 0 would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            tensor.uniform_(-1, 1, generator=generator)
            if name.endswith("running_var"):
                tensor.abs_()
    return module.to(dtype)


def inputs_like(module, shape, dtype):
    generator = torch.Generator().manual_seed(1)
    if isinstance(module, torch.nn.Embedding):
        return torch.randint(module.num_embeddings, shape, generator=generator)
    return torch.randn(shape, generator=generator).to(dtype)


def channels_last(tensor, is_image=True):
    array = tensor.detach().numpy()
    return np.moveaxis(array, 1, -1) if is_image and array.ndim > 2 else array


def shapes(model, inputs):
    """The variables of a linen model, in the precision of its inputs."""
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.asarray(inputs))
    dtype = jnp.result_type(float)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), variables)


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_agree(name, precision):
    layer, model, shape, options = LAYERS[name]
    dtype = torch_dtype(precision)
    layer = randomised(layer, dtype)
    is_image = name not in ("Embedding", "LayerNorm", "Linear")
    given = inputs_like(layer, shape, dtype)
    expected = channels_last(layer(given), is_image)
    with jax_precision(precision):
        array = channels_last(given, is_image)
        variables = to_linen(layer.state_dict(), shapes(model, array), **options)
        output = model.apply(variables, array)
        assert output.dtype == expected.dtype
    tolerance = TOLERANCES[precision] * np.abs(expected).max()
    np.testing.assert_allclose(output, expected, rtol=0, atol=tolerance)


def torch_cnn():
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(8 * 4 * 5, 6),
    )


NAMES = {"0": "conv", "1": "norm", "4": "head"}
FLATTENED = {"4": (8, 4, 5)}


class LinenCNN(linen.Module):
    channels_first: bool = False

    @linen.compact
    def __call__(self, images):
        hidden = linen.Conv(8, (3, 3), name="conv")(images)
        hidden = linen.BatchNorm(use_running_average=True, name="norm")(hidden)
        hidden = linen.relu(hidden)
        if self.channels_first:
            hidden = jnp.moveaxis(hidden, -1, 1)
        return linen.Dense(6, name="head")(hidden.reshape(len(hidden), -1))


class NnxCNN(nnx.Module):
    def __init__(self, rngs, param_dtype=jnp.float32):
        kwargs = {"rngs": rngs, "param_dtype": param_dtype}
        self.conv = nnx.Conv(3, 8, (3, 3), **kwargs)
        self.norm = nnx.BatchNorm(8, use_running_average=True, **kwargs)
        self.head = nnx.Dict(last=nnx.List([nnx.Linear(160, 6, **kwargs)]))

    def __call__(self, images):
        hidden = nnx.relu(self.norm(self.conv(images)))
        return self.head.last[0](hidden.reshape(len(hidden), -1))


@pytest.mark.parametrize("channels_first", [False, True])
def test_a_whole_cnn_agrees_in_linen(channels_first):
    module = randomised(torch_cnn(), torch.float64).eval()
    images = inputs_like(module, (2, 3, 4, 5), torch.float64)
    model = LinenCNN(channels_first)
    flattened = None if channels_first else FLATTENED
    with jax_precision("float64"):
        array = channels_last(images)
        variables = to_linen(
            module.state_dict(), shapes(model, array), names=NAMES, flattened=flattened
        )
        output = model.apply(variables, array)
    np.testing.assert_allclose(output, module(images).detach().numpy(), rtol=1e-12)


def test_a_whole_cnn_agrees_in_nnx():
    module = randomised(torch_cnn(), torch.float64).eval()
    images = inputs_like(module, (2, 3, 4, 5), torch.float64)
    names = NAMES | {"4": "head/last/0"}
    with jax_precision("float64"):
        model = nnx.eval_shape(lambda: NnxCNN(nnx.Rngs(0), jnp.float64))
        state = to_nnx(module.state_dict(), model, names=names, flattened=FLATTENED)
        nnx.update(model, state)
        output = model(channels_last(images))
    np.testing.assert_allclose(output, module(images).detach().numpy(), rtol=1e-12)


def test_the_order_of_flattened_inputs_matters():
    module = randomised(torch_cnn(), torch.float32).eval()
    images = inputs_like(module, (2, 3, 4, 5), torch.float32)
    model, array = LinenCNN(), channels_last(images)
    variables = to_linen(module.state_dict(), shapes(model, array), names=NAMES)
    difference = model.apply(variables, array) - module(images).detach().numpy()
    assert np.abs(difference).max() > 0.1


def test_the_result_keeps_the_dtype_of_flax_and_no_memory_of_torch():
    layer = randomised(torch.nn.Linear(5, 3), torch.bfloat16)
    variables = to_linen(
        layer.state_dict(), shapes(linen.Dense(3), np.ones((2, 5), np.float32))
    )
    expected = layer.bias.detach().to(torch.float32).clone().numpy()
    with torch.no_grad():
        layer.bias.zero_()
    bias = variables["params"]["bias"]
    assert bias.dtype == jnp.float32
    np.testing.assert_array_equal(bias, expected)


def renamed(state_dict, **changes):
    """Change tensors by name, "__" for a dot. None leaves a tensor out."""
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    merged = {**state_dict, **changes}
    return {name: tensor for name, tensor in merged.items() if tensor is not None}


ERRORS = {
    "another name": (
        {},
        {"names": {"0": "conv", "1": "norm"}},
        r"layer 'head' \(in Flax 'head'\).*must have 'head\.\w+'.*Use `names`",
    ),
    "a layer too many": (
        {"aux__weight": torch.ones(3)},
        {},
        r"does not use: \['aux\.weight'\]",
    ),
    "a tensor missing": (
        {"1__running_var": None},
        {},
        r"layer '1' \(in Flax 'norm'\).*must have '1\.running_var' for Flax's 'var'",
    ),
    "another shape": (
        {"0__weight": torch.ones(8, 3, 5, 5)},
        {},
        r"layer '0' .*'kernel' of shape \(3, 3, 3, 8\)\. Got '0\.weight' of shape "
        r"\(8, 3, 5, 5\), in Flax's layout \(5, 5, 3, 8\)",
    ),
    "no kernel": (
        {"4__weight": torch.ones(160)},
        {"flattened": {}},
        r"layer '4' .*'kernel' of shape \(160, 6\)\. Got '4\.weight' of shape \(160,\)",
    ),
    "scale of several axes": (
        {"1__weight": torch.ones(8, 1)},
        {},
        r"layer '1' .*'scale' of shape \(8,\)",
    ),
    "unknown layer": ({}, {"names": {"7": "conv"}}, r"`names` must name.*\['7'\]"),
    "the same layer twice": (
        {},
        {"names": {"0": "conv", "1": "conv"}},
        r"`names` must name each Flax layer once",
    ),
    "image of another size": (
        {},
        {"flattened": {"4": (8, 5, 5)}},
        r"layer '4' .*`flattened`.*Got \(8, 5, 5\).*\(6, 160\)",
    ),
    "image of a convolution": (
        {},
        {"flattened": {"0": (3, 3, 3)}},
        r"layer '0' .*`flattened` must be the shape of an image",
    ),
    "transposed Linear": (
        {},
        {"transposed": ["4"]},
        r"layer '4' .*must name a transposed convolution.*\(6, 160\)",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_mistakes_raise(name):
    changes, options, message = ERRORS[name]
    state_dict = renamed(torch_cnn().state_dict(), **changes)
    variables = shapes(LinenCNN(), np.ones((2, 4, 5, 3), np.float32))
    options = {"names": NAMES, "flattened": FLATTENED} | options
    with pytest.raises(ValueError, match=message):
        to_linen(state_dict, variables, **options)


def test_other_collections_and_kinds_raise():
    state_dict = torch.nn.Linear(5, 3).state_dict()
    with pytest.raises(ValueError, match=r"nothing else\. Got \['cache'\] too"):
        to_linen(state_dict, {"params": {}, "cache": {"kernel": jnp.ones(3)}})
    with pytest.raises(ValueError, match="Got 'alpha'"):
        to_linen(state_dict, {"params": {"alpha": jnp.ones(3)}})
