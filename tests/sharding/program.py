"""Compare steps on a mesh of 8 devices with the same steps on one device.

    python -m tests.sharding.program Explicit MLP,CNN data,FSDP structured float32

`Explicit+context` also enters the mesh. A step is compiled once, and returns the
losses, the Gramian, the weights and the update. Prints, as JSON, the largest relative
difference of each, or the error raised.
"""

import contextlib
import json
import os
import sys

from tests.xla import FLAGS

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = FLAGS.replace("device_count=4", "device_count=8")

import jax
import numpy as np
from jax.sharding import AxisType

import jaxjd
from tests.sharding.models import MODELS, Layout, Model, layouts

ONE_DEVICE = Layout(None, None, None, None)


def step(model: Model, layout: Layout, method: str):
    """A whole step. `method` may end in the number of rows of a chunk: "chunked 4"."""
    name, *size = method.split()
    tx = jaxjd.upgrad()

    @jax.jit
    def compiled(params, examples):
        losses, jac = jaxjd.value_and_jac(
            lambda *args: model.loss(layout, *args),
            in_axes=model.in_axes,
            method=name,
            chunk_size=int(size[0]) if size else None,
        )(params, *examples)
        gramian = jac.gramian()
        weights = jaxjd.weighting.upgrad()(gramian)
        update, _ = tx.update(jac, tx.init(params), params)
        return losses, gramian, weights, update

    return compiled


def in_mesh(layout: Layout):
    """The mesh as context, for all JAX that the tests support."""
    if hasattr(jax, "set_mesh"):
        return jax.set_mesh(layout.mesh)
    return jax.sharding.use_mesh(layout.mesh)


def difference(actual, expected) -> float:
    """The largest difference, relative to the largest entry of the same array."""

    def of_leaf(x, y):
        x, y = np.asarray(x), np.asarray(y)
        assert x.shape == y.shape, (x.shape, y.shape)
        return float(np.abs(x - y).max() / np.abs(y).max())

    return max(jax.tree.leaves(jax.tree.map(of_leaf, actual, expected)))


def main(kind: str, models: str, chosen: str, methods: str, dtype: str) -> None:
    kind, *context = kind.split("+")
    jax.config.update("jax_enable_x64", dtype == "float64")
    found = {}
    for model_name in models.split(","):
        model = MODELS[model_name]()
        params, examples = jax.tree.map(
            lambda x: x.astype(dtype) if x.dtype == np.float64 else x,
            (model.params, model.examples),
        )
        for method in methods.split(","):
            expected = step(model, ONE_DEVICE, method)(params, examples)
            expected = jax.tree.map(np.asarray, expected)
            for name in chosen.split(","):
                layout = layouts(getattr(AxisType, kind))[name]
                placed = layout.place(params, examples)
                key = f"{model_name} {method} {name}"
                try:
                    with in_mesh(layout) if context else contextlib.nullcontext():
                        actual = step(model, layout, method)(*placed)
                except Exception as error:
                    found[key] = f"{type(error).__name__}: {error}"[:600]
                    if os.environ.get("RAISE"):
                        raise
                    continue
                parts = zip(
                    ("losses", "gramian", "weights", "update"),
                    actual,
                    expected,
                    strict=True,
                )
                found[key] = {part: difference(x, y) for part, x, y in parts}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
