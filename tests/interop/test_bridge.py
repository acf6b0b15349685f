"""Arrays cross between torch and JAX in the same memory, or an error says why not."""

import pytest

pytest.importorskip("torch")

import jax
import jax.numpy as jnp
import numpy as np
import torch

from interop import to_jax, to_torch
from interop.precision import jax_precision

DTYPES = ["float32", "float16", "bfloat16", "int32", "bool"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_to_jax_shares_memory(dtype):
    tensor = torch.arange(12).reshape(3, 4).to(getattr(torch, dtype))
    array = to_jax(tensor)
    assert array.unsafe_buffer_pointer() == tensor.data_ptr()
    assert array.dtype == jnp.dtype(dtype)
    np.testing.assert_array_equal(
        np.asarray(array, np.float32), tensor.to(torch.float32).numpy()
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_jax_to_torch_shares_memory(dtype):
    array = jnp.arange(12).reshape(3, 4).astype(dtype)
    tensor = to_torch(array)
    assert tensor.data_ptr() == array.unsafe_buffer_pointer()
    assert tensor.dtype == getattr(torch, dtype)
    np.testing.assert_array_equal(
        tensor.to(torch.float32).numpy(), np.asarray(array, np.float32)
    )


def test_double_precision_crosses_where_jax_has_it():
    tensor = torch.arange(3.0, dtype=torch.float64)
    with jax_precision("float64"):
        array = to_jax(tensor)
        assert array.unsafe_buffer_pointer() == tensor.data_ptr()
        assert to_torch(array).dtype == torch.float64


def test_images_cross_with_channels_last():
    images = torch.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
    array = to_jax(images.permute(0, 2, 3, 1))
    assert array.unsafe_buffer_pointer() == images.data_ptr()
    np.testing.assert_array_equal(jnp.moveaxis(array, -1, 1), images.numpy())


def test_parameters_cross_without_their_gradient():
    parameter = torch.nn.Parameter(torch.ones(3))
    assert to_jax(parameter).unsafe_buffer_pointer() == parameter.data_ptr()


@pytest.mark.parametrize("dtype", ["float64", "int64", "complex128"])
def test_a_dtype_that_jax_would_narrow_raises(dtype):
    with jax_precision("float32"), pytest.raises(ValueError, match=f"Got {dtype}"):
        to_jax(torch.ones(3).to(getattr(torch, dtype)))


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda x: x[:, ::2], id="gaps"),
        pytest.param(lambda x: x.flatten()[1:], id="not aligned"),
        pytest.param(lambda x: x[:1, :1].expand(3, 3), id="broadcast"),
    ],
)
def test_what_cannot_be_shared_raises_instead_of_being_copied(view):
    with pytest.raises(ValueError, match="compact and start on a boundary"):
        to_jax(view(torch.ones(4, 4)))


def test_other_types_raise():
    with pytest.raises(TypeError, match=r"must be a torch\.Tensor. Got ndarray"):
        to_jax(np.ones(3))
    with pytest.raises(TypeError, match=r"must be a concrete jax\.Array.*Got ndarray"):
        to_torch(np.ones(3))
    with pytest.raises(TypeError, match=r"outside of `jit`"):
        jax.jit(to_torch)(jnp.ones(3))
