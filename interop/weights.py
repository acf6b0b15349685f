"""Compare the weights and updates of `upgrad`, `dualproj`, `mean`, `sum`, `constant`.

Both libraries regularise by TorchJD's rule, so w is unique even if the Gramian is
singular. But w is only determined up to rounding times the condition number of the
regularised Gramian, up to 3.7e3 here. That is 2e-4 in float32, the bound for the two
kinds of Gramians that need it. (For these, TorchJD's own weights in float32 and float64
are up to 2e-5 apart.) The update is well conditioned, so its bound is the normal one.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torchjd.aggregation as reference
from jaxtyping import Float
from torchjd.linalg import QuadprogProjector

import jaxjd

from .bridge import to_jax, to_torch
from .check import Check
from .jacobians import comparable, gramian
from .precision import Precision, jax_precision

BOUNDS: dict[Precision, float] = {"float32": 1e-5, "float64": 1e-9}
SINGULAR_BOUNDS: dict[Precision, float] = {"float32": 2e-4, "float64": 1e-9}
SINGULAR = ("random of rank 6", "near-duplicate rows")
# Kinds whose update is more than rounding: only there can updates be compared.
UPDATED = ("random", "rank-deficient", "near-duplicate rows")
# TorchJD's rule of regularisation, used on both sides.
EPS = {"norm_eps": 1e-4, "reg_eps": 1e-4}
PROJECTING = ("upgrad", "dualproj")
PLAIN = ("mean", "sum", "constant")
PREFERRED = ("random", "conflicting", "rank-deficient")


def checks() -> list[Check]:
    """Weights by kind of Gramian, with and without a preference; then updates."""
    rows = []

    def add(method: str, kind: str, preferred: bool = False) -> None:
        difference = functools.partial(
            weights_difference, method=method, kind=kind, preferred=preferred
        )
        name = f"{method}, {kind}{', preference' if preferred else ''}"
        bounds = SINGULAR_BOUNDS if kind in SINGULAR else BOUNDS
        rows.append(Check("weights", name, difference, bounds))

    for method in PROJECTING:
        for kind in comparable():
            add(method, kind)
        for kind in PREFERRED:
            add(method, kind, preferred=True)
    for method in PLAIN:
        add(method, "random")
    for method in (*PROJECTING, *PLAIN):
        for kind in UPDATED if method in PROJECTING else ("random",):
            difference = functools.partial(update_difference, method=method, kind=kind)
            rows.append(Check("update", f"{method}, {kind}", difference, BOUNDS))
    return rows


def weights_difference(
    precision: Precision, *, method: str, kind: str, preferred: bool = False
) -> float:
    """The largest relative difference between the weights of both libraries.

    **Arguments:**

    - `method`: a weighting of jaxjd.
    - `kind`: the kind of Gramians, a key of `jacobians.comparable()`.
    - `preferred`: whether to give a preference vector.
    """
    worst = 0.0
    for jacobian in comparable()[kind]:
        vector = given_vector(method, len(jacobian), preferred)
        with jax_precision(precision):
            # In aligned memory of its own, which both libraries then share.
            shared = torch.from_numpy(gramian(jacobian, precision)).clone()
            expected = reference_weighting(method, vector, shared.dtype)(shared)
            eps = tuple(options(method).items())
            weights = jaxjd_weights(method, to_jax(shared), vector, eps=eps)
            worst = max(worst, relative_difference(to_torch(weights), expected))
    return worst


def update_difference(precision: Precision, *, method: str, kind: str) -> float:
    """The relative distance between the updates of both libraries, in the 2-norm.

    **Arguments:**

    - `method`: an aggregator of jaxjd.
    - `kind`: the kind of Jacobians, a key of `jacobians.comparable()`.
    """
    worst = 0.0
    for jacobian in comparable()[kind]:
        vector = given_vector(method, len(jacobian), preferred=False)
        with jax_precision(precision):
            rows = torch.from_numpy(jacobian.astype(precision)).clone()
            expected = reference_aggregator(method, vector, rows.dtype)(rows).double()
            eps = tuple(options(method).items())
            update = jaxjd_update(method, to_jax(rows), vector, eps=eps)
            difference = to_torch(update).double() - expected
            worst = max(worst, float(difference.norm() / expected.norm()))
    return worst


@functools.partial(jax.jit, static_argnames=("method", "eps"))
def jaxjd_weights(
    method: str,
    gramian: Float[jax.Array, "m m"],
    vector: Float[np.ndarray, " m"] | None = None,
    *,
    eps: tuple[tuple[str, float], ...] = (),
) -> Float[jax.Array, " m"]:
    """The weights that jaxjd chooses.

    **Arguments:**

    - `vector`: the preference, or the weights of `constant`.
    - `eps`: further arguments of the weighting, as pairs. Its defaults if empty.
    """
    weighting = getattr(jaxjd.weighting, method)(*optional(vector), **dict(eps))
    return weighting(gramian)


@functools.partial(jax.jit, static_argnames=("method", "eps"))
def jaxjd_update(
    method: str,
    rows: Float[jax.Array, "m n"],
    vector: Float[np.ndarray, " m"] | None = None,
    *,
    eps: tuple[tuple[str, float], ...] = (),
) -> Float[jax.Array, " n"]:
    """The update that jaxjd's transformation makes of a Jacobian.

    **Arguments:** as in `jaxjd_weights`.
    """
    tx = getattr(jaxjd, method)(*optional(vector), **dict(eps))
    params = jnp.zeros_like(rows[0])
    update, _ = tx.update(rows, tx.init(params), params)
    return update


def given_vector(
    method: str, m: int, preferred: bool
) -> Float[np.ndarray, " m"] | None:
    """The weights of `constant`, or a preference vector whose first entry is 0."""
    if method == "constant":
        return np.linspace(-1, 2, m)
    return np.arange(m) / m if preferred else None


def options(method: str) -> dict[str, float]:
    return EPS if method in PROJECTING else {}


def optional(vector: Any) -> Sequence[Any]:
    return [] if vector is None else [vector]


def reference_weighting(
    method: str, vector: Float[np.ndarray, " m"] | None, dtype: torch.dtype
) -> reference.Weighting:
    return _reference(method, vector, dtype, "Weighting")


def reference_aggregator(
    method: str, vector: Float[np.ndarray, " m"] | None, dtype: torch.dtype
) -> reference.Aggregator:
    return _reference(method, vector, dtype, "")


def _reference(
    method: str,
    vector: Float[np.ndarray, " m"] | None,
    dtype: torch.dtype,
    suffix: str,
) -> Any:
    name = {"upgrad": "UPGrad", "dualproj": "DualProj"}.get(method, method.title())
    kwargs = {"projector": QuadprogProjector(**EPS)} if method in PROJECTING else {}
    given = [torch.tensor(x, dtype=dtype) for x in optional(vector)]
    return getattr(reference, name + suffix)(*given, **kwargs)


def relative_difference(
    values: Float[torch.Tensor, "..."], expected: Float[torch.Tensor, "..."]
) -> float:
    """The largest difference, relative to the largest expected value."""
    scale = expected.abs().max()
    difference = (values.double() - expected.double()).abs().max()
    return float(difference / scale) if scale > 0 else float(difference)
