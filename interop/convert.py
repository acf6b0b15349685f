"""How do the weights of a torch model become those of the same model in Flax?

A `state_dict` says neither which layer a tensor belongs to nor how the layer is used,
so the Flax model says it: its parameters are gone through one by one, and each is made
from the tensor of the layer of the same name.

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

What no parameter holds must be set by hand, because the defaults differ:

- torch's images are NCHW, Flax's NHWC; strides, padding (Flax: "SAME") and groups
  (`feature_group_count`) are arguments of the Flax layer;
- `epsilon` is 1e-6 in Flax's `LayerNorm` and `GroupNorm` and 1e-5 in torch's;
- `momentum` of `BatchNorm` is what is kept in Flax and what is replaced in torch: 0.9
  there is 0.1 here;
- torch's `ConvTranspose` with padding p and kernel size k pads by k - 1 - p in Flax;
- after convolutions, `Flatten` runs through channels first in torch and last in Flax,
  so that the next `Linear` has its inputs in another order: see `flattened`.
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

# For each parameter of Flax, by its name, the tensor of the torch layer.
_TENSORS = {
    "kernel": "weight",
    "embedding": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
# Counts the batches that BatchNorm has seen, which Flax does not.
_IGNORED = "num_batches_tracked"


def to_linen(
    state_dict: State,
    variables: PyTree[Float[Array, "..."]],
    *,
    names: Mapping[str, str] | None = None,
    flattened: Mapping[str, Sequence[int]] | None = None,
    transposed: Collection[str] = (),
) -> dict[str, Any]:
    """The variables of a linen model, with the weights of a torch model.

    The result shares no memory with the tensors.

    **Arguments:**

    - `state_dict`: of the torch model.
    - `variables`: the variables of the Flax model, `{"params": ...}` and perhaps
      `{"batch_stats": ...}`: what `model.init` returns, or `jax.eval_shape` of it. Only
      their names, shapes and dtypes matter.
    - `names`: for each torch layer the path of the Flax layer, `{"features.0":
      "trunk/Conv_0"}`. Layers that are not named must have the same path in both, with
      "." in torch where Flax has "/".
    - `flattened`: for each torch `Linear` that follows a flattened image, the shape of
      this image without the batch, as torch has it: `{"classifier.0": (64, 7, 7)}`.
      Its inputs are put in the order of Flax, channels last. (Or leave it out, and have
      the Flax model transpose the image to channels first before it flattens it.)
    - `transposed`: the torch layers that are transposed convolutions, with Flax's
      `transpose_kernel=False`, the default. With `transpose_kernel=True` the layout is
      that of a convolution: leave them out here.

    **Returns:** nested dicts like `variables`, with their shapes and dtypes.

    **Raises:** `ValueError` if a layer or tensor is missing or left over, has another
    shape than Flax expects, or is of a kind that is not in the table of this module.
    """
    leaves = traverse_util.flatten_dict(variables)
    strays = {path[0] for path in leaves} - {"params", "batch_stats"}
    if strays:
        raise ValueError(
            "`variables` must hold the collections 'params' and 'batch_stats' and "
            f"nothing else. Got {sorted(map(str, strays))} too."
        )
    # The statistics are in a tree of their own: under the same path as the parameters.
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
    """The state of an nnx model, with the weights of a torch model.

    `nnx.update(model, to_nnx(state_dict, model))` loads it.

    **Arguments:**

    - `model`: the Flax model, or `nnx.eval_shape` of it. It is not changed.
    - `state_dict`, `names`, `flattened`, `transposed`: as in `to_linen`. The items of a
      list have their position for a name, `layers/0`.

    **Returns:** the parameters and the batch statistics.

    **Raises:** as `to_linen`.
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
        # float64 holds every narrower float exactly, bfloat16 included, which NumPy
        # lacks. The dtype of the parameter is given at the end.
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
            f"`state_dict` has tensors that the Flax model has no use for: {left}. Use "
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
    """Flax's layout of the weight of a `Linear` or a convolution.

    **Raises:** `ValueError` if `image` is not the input of a `Linear`, or what is to be
    mirrored is no convolution.
    """
    if mirror and weight.ndim < 3:
        raise ValueError(
            f"For {where}, `transposed` must name a transposed convolution. Got a "
            f"weight of shape {weight.shape}."
        )
    if image is not None:
        if weight.ndim != 2 or weight.shape[1] != math.prod(image):
            raise ValueError(
                f"For {where}, `flattened` must be the shape of an image of as many "
                f"numbers as the layer has inputs. Got {tuple(image)}, and a weight of "
                f"shape {weight.shape}."
            )
        channels_first = weight.reshape(-1, *image)
        weight = np.moveaxis(channels_first, 1, -1).reshape(weight.shape)
    if weight.ndim < 2:  # No kernel: the shape will be refused.
        return weight
    if not mirror:
        return np.moveaxis(weight, (0, 1), (-1, -2))
    # torch's transposed convolution is the derivative of a convolution, so it applies
    # the kernel mirrored. Flax's applies it as it is.
    mirrored = np.flip(weight, tuple(range(2, weight.ndim)))
    return np.moveaxis(mirrored, (0, 1), (-2, -1))
