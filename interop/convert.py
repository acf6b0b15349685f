"""Convert the weights of a torch model to the same model in Flax.

A `state_dict` does not say what kind of layer a tensor belongs to, or how the layer is
used. The Flax model does: each of its parameters is made from the tensor of the torch
layer of the same name.

| layer                  | torch               | Flax                                 |
|------------------------|---------------------|--------------------------------------|
| `Linear`               | weight [out, in]    | `Dense`: kernel [in, out]            |
| `Conv1d`, `2d`, `3d`   | weight [out, in, *] | `Conv`: kernel [*, in, out]          |
| `ConvTranspose`        | weight [in, out, *] | `ConvTranspose`: kernel [*, in, out] |
|                        |                     | mirrored along the axes *            |
| `BatchNorm`            | weight, bias        | scale, bias                          |
|                        | running_mean, _var  | mean, var, in `batch_stats`          |
| `LayerNorm`, `GroupNorm` | weight, bias      | scale, bias                          |
| `Embedding`            | weight [num, dim]   | `Embed`: embedding [num, dim]        |

Settings that are not parameters must be set by hand, because the defaults differ:

- torch's images are NCHW, Flax's NHWC; strides, padding (Flax: "SAME") and groups
  (`feature_group_count`) are arguments of the Flax layer;
- `epsilon` is 1e-6 in Flax's `LayerNorm` and `GroupNorm`, and 1e-5 in torch's;
- `momentum` of `BatchNorm` is the weight of the old value in Flax and of the new value
  in torch: Flax's 0.9 is torch's 0.1;
- torch's padding p of a `ConvTranspose` of kernel size k is k - 1 - p in Flax;
- after convolutions, `Flatten` puts channels first in torch and last in Flax, so the
  next `Linear` gets its inputs in another order: see `flattened`.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx, traverse_util
from jaxtyping import Array, Float, PyTree

State = Mapping[str, torch.Tensor]

# The name of each Flax parameter, and of the tensor of the torch layer.
_TENSORS = {
    "kernel": "weight",
    "embedding": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
# torch counts the batches that BatchNorm has seen. Flax does not.
_IGNORED = "num_batches_tracked"


def to_linen(
    state_dict: State,
    variables: PyTree[Float[Array, "..."]],
    *,
    names: Mapping[str, str] | None = None,
    flattened: Mapping[str, Sequence[int]] | None = None,
    transposed: Collection[str] = (),
) -> dict[str, Any]:
    """Make the variables of a linen model from the weights of a torch model.

    The result shares no memory with the tensors.

    **Arguments:**

    - `state_dict`: of the torch model.
    - `variables`: the variables of the Flax model, `{"params": ...}` and perhaps
      `{"batch_stats": ...}`, as `model.init` or `jax.eval_shape` of it returns them.
      Only their names, shapes and dtypes matter.
    - `names`: maps torch layers to the paths of the Flax layers, `{"features.0":
      "trunk/Conv_0"}`. A layer that is not listed must have the same path in both, with
      "." in torch where Flax has "/".
    - `flattened`: maps each torch `Linear` that follows a flattened image to the shape
      of this image in torch, without the batch: `{"classifier.0": (64, 7, 7)}`. Its
      inputs are reordered to Flax's order, channels last. (Or leave it out, and let the
      Flax model move the channels first before it flattens.)
    - `transposed`: the torch layers that are transposed convolutions, if the Flax layer
      has `transpose_kernel=False`, the default. With `transpose_kernel=True` the layout
      is that of a convolution, so don't list the layer here.

    **Returns:** nested dicts like `variables`, with their shapes and dtypes.

    **Raises:** `ValueError` if a layer or tensor is missing or left over, has a shape
    that Flax does not expect, or is of a kind that is not in this module's table.

    **Example:**

    >>> import flax, interop, torch
    >>> layers = torch.nn.ModuleDict({"head": torch.nn.Linear(2, 1)})
    >>> class Model(flax.linen.Module):
    ...     @flax.linen.compact
    ...     def __call__(self, x):
    ...         return flax.linen.Dense(1, name="head")(x)
    >>> like = jax.eval_shape(Model().init, jax.random.key(0), jnp.ones((1, 2)))
    >>> interop.to_linen(layers.state_dict(), like)["params"]["head"]["kernel"].shape
    (2, 1)
    """
    leaves = traverse_util.flatten_dict(variables)
    strays = {path[0] for path in leaves} - {"params", "batch_stats"}
    if strays:
        raise ValueError(
            "`variables` must hold the collections 'params' and 'batch_stats' and "
            f"nothing else. Got {sorted(map(str, strays))} too."
        )
    # The statistics are in a separate tree, under the same paths as the parameters.
    collections = {path[1:]: path[0] for path in leaves}
    converted = _convert(
        state_dict,
        {path[1:]: leaf for path, leaf in leaves.items()},
        names=names or {},
        flattened=flattened or {},
        transposed=transposed,
    )
    return traverse_util.unflatten_dict(
        {(collections[path], *path): leaf for path, leaf in converted.items()}
    )


def to_nnx(
    state_dict: State,
    model: nnx.Module,
    *,
    names: Mapping[str, str] | None = None,
    flattened: Mapping[str, Sequence[int]] | None = None,
    transposed: Collection[str] = (),
) -> nnx.State:
    """Make the state of an nnx model from the weights of a torch model.

    Load it with `nnx.update(model, to_nnx(state_dict, model))`.

    **Arguments:**

    - `model`: the Flax model, or `nnx.eval_shape` of it. It is not changed.
    - `state_dict`, `names`, `flattened`, `transposed`: as in `to_linen`. An item of a
      list is named by its position, `layers/0`.

    **Returns:** the parameters and the batch statistics.

    **Raises:** the errors of `to_linen`.

    **Example:**

    >>> from flax import nnx
    >>> import interop, torch
    >>> class Model(nnx.Module):
    ...     def __init__(self, rngs):
    ...         self.head = nnx.Linear(2, 1, rngs=rngs)
    >>> layers = torch.nn.ModuleDict({"head": torch.nn.Linear(2, 1)})
    >>> model = Model(nnx.Rngs(0))
    >>> nnx.update(model, interop.to_nnx(layers.state_dict(), model))
    >>> model.head.kernel.shape
    (2, 1)
    """
    state = nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))
    leaves = dict(nnx.to_flat_state(state))
    converted = _convert(
        state_dict,
        {path: leaf.get_value() for path, leaf in leaves.items()},
        names=names or {},
        flattened=flattened or {},
        transposed=transposed,
    )
    replaced = {path: leaf.replace(converted[path]) for path, leaf in leaves.items()}
    return nnx.from_flat_state(replaced)


def _convert(
    state_dict: State,
    leaves: Mapping[tuple, Any],
    *,
    names: Mapping[str, str],
    flattened: Mapping[str, Sequence[int]],
    transposed: Collection[str],
) -> dict[tuple, Array]:
    layers = {name.rpartition(".")[0] for name in state_dict}
    for argument, given in (
        ("names", names),
        ("flattened", flattened),
        ("transposed", transposed),
    ):
        unknown = sorted(set(given) - layers)
        if unknown:
            raise ValueError(
                f"`{argument}` must name layers of `state_dict`, {sorted(layers)}. Got "
                f"{unknown}."
            )
    torch_names = {flax_name: name for name, flax_name in names.items()}
    if len(torch_names) < len(names):
        raise ValueError(f"`names` must name each Flax layer once. Got {dict(names)}.")

    converted, used = {}, set()
    for path, leaf in leaves.items():
        *parents, kind = map(str, path)
        flax_layer = "/".join(parents)
        layer = torch_names.get(flax_layer, ".".join(parents))
        where = f"layer {layer!r} (in Flax {flax_layer!r})"
        if kind not in _TENSORS:
            raise ValueError(
                f"For {where}, parameters must be of the kinds {sorted(_TENSORS)}. Got "
                f"{kind!r}."
            )
        tensor = f"{layer}.{_TENSORS[kind]}".lstrip(".")
        if tensor not in state_dict:
            raise ValueError(
                f"For {where}, `state_dict` must have {tensor!r} for Flax's {kind!r}. "
                f"Got {sorted(state_dict)}. Use `names` if the layer is named "
                "differently."
            )
        # Go through float64: it holds every narrower float exactly, and NumPy has no
        # bfloat16. The last step casts to the dtype of the parameter.
        weight = state_dict[tensor].detach().cpu().double().numpy()
        array = weight
        if kind == "kernel":
            array = _kernel(
                weight, where, image=flattened.get(layer), mirror=layer in transposed
            )
        if array.shape != leaf.shape or (kind == "scale" and array.ndim != 1):
            raise ValueError(
                f"For {where}, Flax expects {kind!r} of shape {tuple(leaf.shape)}. Got "
                f"{tensor!r} of shape {weight.shape}, in Flax's layout {array.shape}."
            )
        converted[path] = jnp.array(array, leaf.dtype)
        used.add(tensor)
    left = sorted(
        name for name in state_dict if name not in used and not name.endswith(_IGNORED)
    )
    if left:
        raise ValueError(
            f"`state_dict` has tensors that the Flax model does not use: {left}. Use "
            "`names` if their layers are named differently, or leave them out."
        )
    return converted


def _kernel(
    weight: Float[np.ndarray, "..."],
    where: str,
    *,
    image: Sequence[int] | None,
    mirror: bool,
) -> Float[np.ndarray, "..."]:
    """Convert the weight of a `Linear` or a convolution to Flax's layout.

    **Raises:** `ValueError` if `image` does not fit the inputs of a `Linear`, or if
    `mirror` is set for a layer that is not a convolution.
    """
    if mirror and weight.ndim < 3:
        raise ValueError(
            f"For {where}, `transposed` must name a transposed convolution. Got a "
            f"weight of shape {weight.shape}."
        )
    if image is not None:
        if weight.ndim != 2 or weight.shape[1] != math.prod(image):
            raise ValueError(
                f"For {where}, `flattened` must be the shape of an image with as many "
                f"numbers as the layer has inputs. Got {tuple(image)}, and a weight of "
                f"shape {weight.shape}."
            )
        channels_first = weight.reshape(-1, *image)
        weight = np.moveaxis(channels_first, 1, -1).reshape(weight.shape)
    if weight.ndim < 2:  # Not a kernel: the caller refuses its shape.
        return weight
    if not mirror:
        return np.moveaxis(weight, (0, 1), (-1, -2))
    # torch's transposed convolution is the transpose of a convolution, so it applies
    # the kernel mirrored. Flax applies the kernel as it is.
    mirrored = np.flip(weight, tuple(range(2, weight.ndim)))
    return np.moveaxis(mirrored, (0, 1), (-2, -1))
