"""Compare the Gramians of both libraries for the same model and batch."""

import functools
from collections.abc import Callable
from typing import get_args

import jax
import numpy as np
from jaxtyping import Array, Float
from torchjd.autogram import Engine

import jaxjd
from jaxjd.jacobian import Method

from .bridge import to_torch
from .check import Check
from .models import Twins, cnn, mlp
from .precision import Precision, jax_precision
from .threads import one_thread

BOUNDS: dict[Precision, float] = {"float32": 1e-5, "float64": 1e-9}
NUM_EXAMPLES = 16
# Does not divide the number of examples, so the last chunk is not full.
CHUNK_SIZE = 6


def checks() -> list[Check]:
    """Each model, each method of the engine, per-example and whole-batch functions."""
    rows = []
    for make in (mlp, cnn):
        for method in get_args(Method):
            chunk_size = CHUNK_SIZE if method == "chunked" else None
            for per_example in (True, False):
                difference = functools.partial(
                    gramian_difference,
                    make=make,
                    method=method,
                    chunk_size=chunk_size,
                    per_example=per_example,
                )
                kind = "per example" if per_example else "whole batch"
                name = f"{make.__name__.upper()}, {method}, {kind}"
                quick = per_example and method != "auto"
                rows.append(Check("Gramian", name, difference, BOUNDS, quick))
    return rows


def gramian_difference(
    precision: Precision,
    *,
    make: Callable[[Precision], Twins],
    method: Method,
    chunk_size: int | None = None,
    per_example: bool = True,
) -> float:
    """How far apart the Gramians of one batch are, relative to the norms of the rows.

    Each entry is divided by the norms of its two gradients, which bound it. So small
    entries count as much as large ones.

    **Arguments:**

    - `make`: makes the model in both frameworks.
    - `method`, `chunk_size`: of `jaxjd.value_and_jac`.
    - `per_example`: whether jaxjd gets the loss of one example, with `in_axes`, or a
      function that returns all losses.
    """
    with jax_precision(precision), one_thread():
        twins = make(precision)
        batch = twins.batch(NUM_EXAMPLES, seed=0)
        engine = Engine(twins.torch_model, batch_dim=0)
        expected = engine.compute_gramian(twins.torch_losses(batch)).numpy()
        fun: Callable[..., Array] = twins.loss if per_example else twins.losses
        jac = jaxjd.jac(
            fun,
            in_axes=(None, 0, 0) if per_example else None,
            method=method,
            chunk_size=chunk_size,
        )
        gramian = jax.jit(lambda *args: jac(*args).gramian())(
            twins.variables(), *twins.jax_batch(batch)
        )
        return entrywise_difference(to_torch(gramian).numpy(), expected)


def entrywise_difference(
    gramian: Float[np.ndarray, "m m"], expected: Float[np.ndarray, "m m"]
) -> float:
    norms = np.sqrt(np.diagonal(expected))
    return float(np.max(np.abs(gramian - expected) / np.outer(norms, norms)))
