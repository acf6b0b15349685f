"""Run the same computation in float32 and in float64, in both libraries."""

import contextlib
from typing import Literal

import jax
import torch

Precision = Literal["float32", "float64"]


def jax_precision(
    precision: Precision,
) -> contextlib.AbstractContextManager[None]:
    """A context in which JAX computes in this precision."""
    return jax.enable_x64(precision == "float64")


def torch_dtype(precision: Precision) -> torch.dtype:
    return {"float32": torch.float32, "float64": torch.float64}[precision]
