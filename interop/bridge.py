"""Pass arrays between torch and JAX by DLPack, without a copy.

Both sides then use the same memory. Nothing is silently copied or cast: an array that
cannot cross as it is raises an error.
"""

import jax
import jax.core
import jax.numpy as jnp
import torch
from jaxtyping import Shaped


def to_jax(tensor: Shaped[torch.Tensor, "..."]) -> Shaped[jax.Array, "..."]:
    """View a torch tensor as a JAX array: same memory, same device.

    JAX assumes that its arrays never change, so do not write to the tensor in place
    afterwards. A torch optimizer does that to parameters. Gradients do not cross.

    **Arguments:**

    - `tensor`: any shape, of a dtype that JAX has enabled. It may be a transposed view,
      such as NCHW seen as NHWC, but its strides must leave no gaps.

    **Returns:** an array of the same shape and dtype.

    **Raises:** `TypeError` if `tensor` is not a tensor. `ValueError` for a dtype that
    JAX would narrow (float64 and int64 unless `jax.enable_x64`), for strides with gaps,
    and for a view that does not start on a boundary of 64 bytes.

    **Example:**

    >>> import interop, torch
    >>> interop.to_jax(torch.arange(3.0))
    Array([0., 1., 2.], dtype=float32)
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(
            f"`tensor` must be a torch.Tensor. Got {type(tensor).__name__}."
        )
    name = str(tensor.dtype).removeprefix("torch.")
    if name in ("float64", "int64", "complex128") and not jax.config.read(
        "jax_enable_x64"
    ):
        raise ValueError(
            f"`tensor` must have a dtype that JAX has enabled. Got {name}, which JAX "
            "would narrow. Convert it with `tensor.to`, or use `jax.enable_x64`."
        )
    try:
        return jnp.from_dlpack(tensor.detach(), copy=False)
    except (ValueError, RuntimeError) as error:  # jaxlib raises the RuntimeError.
        raise ValueError(
            "`tensor` must be compact and start on a boundary of 64 bytes to cross "
            f"without a copy. Got shape {tuple(tensor.shape)}, strides "
            f"{tensor.stride()}, offset {tensor.storage_offset()}. Use "
            "`tensor.clone(memory_format=torch.contiguous_format)`."
        ) from error


def to_torch(array: Shaped[jax.Array, "..."]) -> Shaped[torch.Tensor, "..."]:
    """View a JAX array as a torch tensor: same memory, same device.

    JAX assumes that its arrays never change, so do not write to the tensor in place.

    **Arguments:**

    - `array`: any shape, on one device, outside of `jit`.

    **Returns:** a tensor of the same shape and dtype, without a gradient.

    **Raises:** `TypeError` if `array` is not a concrete JAX array, for example a NumPy
    array or a tracer.

    **Example:**

    >>> import interop
    >>> interop.to_torch(jnp.arange(3.0))
    tensor([0., 1., 2.])
    """
    if not isinstance(array, jax.Array) or isinstance(array, jax.core.Tracer):
        raise TypeError(
            "`array` must be a concrete jax.Array, outside of `jit`. Got "
            f"{type(array).__name__}."
        )
    return torch.from_dlpack(array)
