"""Measure how well each library solves the problem that defines a method's weights.

This is for methods whose weights TorchJD finds by an iteration that stops early, or
with a general-purpose solver, so that comparing the weights would say little. Each
method has a residual that is zero for the exact weights only. It is computed in float64
from the Jacobian, not from the rounded Gramian that the libraries get.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import torch
import torchjd.aggregation as reference
from jaxtyping import Float
from scipy.optimize import nnls

import jaxjd

from . import exact
from .bridge import to_jax, to_torch
from .check import Measurement
from .jacobians import Jacobian, gramian, normal
from .precision import Precision, jax_precision, torch_dtype

Weights = Float[np.ndarray, " m"]

# Below this, neither library counts as better: rounding the Gramian to float32 alone
# moves the exact weights of "every two conflict" by 2e-5.
ROUNDING: dict[Precision, float] = {"float32": 5e-5, "float64": 2e-13}


class Problem(NamedTuple):
    """A method with its residual. `theirs` gets the Jacobian, in either precision."""

    ours: Callable[[int], jaxjd.Weighting]
    theirs: Callable[[torch.Tensor], torch.Tensor]
    residual: Callable[[Weights, Jacobian], float]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Both libraries' residuals on one Jacobian."""

    method: str
    case: str
    precision: Precision
    jaxjd: float
    torchjd: float

    @property
    def residual(self) -> Measurement:
        """jaxjd's residual, bounded by TorchJD's or by rounding if that is larger."""
        return Measurement(self.jaxjd, max(self.torchjd, ROUNDING[self.precision]))


def mgda_residual(weights: Weights, jacobian: Jacobian) -> float:
    r"""How much longer $J^\top w$ is than necessary, or how far w is off the simplex.

    The shortest update comes from nonnegative least squares: over all $a \succeq 0$,
    the minimiser of $\|J^\top a\|^2 + (1^\top a - 1)^2$ is a multiple of the exact w.
    """
    scaled = jacobian / np.linalg.norm(jacobian, axis=1).min()
    system = np.concatenate([scaled.T, np.ones((1, len(jacobian)))])
    a, _ = nnls(system, np.eye(len(system))[-1])
    shortest = np.linalg.norm(a @ scaled) / a.sum()
    off = max(abs(weights.sum() - 1), -weights.min())
    return max(np.linalg.norm(weights @ scaled) / shortest - 1, off)


def cagrad_residual(weights: Weights, jacobian: Jacobian, *, c: float) -> float:
    r"""How much progress the worst-off loss misses, or how far the update is too long.

    The first is relative to the dual bound: for every d in the ball and v in the
    simplex, $\min_i g_i^\top d \le v^\top J g_0 + c \|g_0\| \|J^\top v\|$. Here v is
    what the weights add to those of $g_0$, normalised. The second is how far the update
    leaves the ball, relative to its radius.
    """
    m = len(jacobian)
    added = weights - 1 / m
    v = np.maximum(added, 0)
    v = v / v.sum() if v.any() else np.full(m, 1 / m)
    centre = jacobian.mean(axis=0)
    radius = c * np.linalg.norm(centre)
    bound = v @ jacobian @ centre + radius * np.linalg.norm(v @ jacobian)
    progress = (jacobian @ (weights @ jacobian)).min()
    outside = np.linalg.norm(added @ jacobian) / radius - 1
    return max(1 - progress / bound, outside)


def fairgrad_residual(weights: Weights, jacobian: Jacobian, *, alpha: float) -> float:
    r"""$\max_i |(Gw)_i w_i^{1/\alpha} - 1|$."""
    product = jacobian @ (weights @ jacobian) * weights ** (1 / alpha)
    return float(np.abs(product - 1).max())


def cases() -> dict[str, Jacobian]:
    """Jacobians that are not Pareto-stationary, so every problem has a solution."""
    chosen = ("random", "every two conflict", "near-duplicate rows", "rank-deficient")
    chosen += ("row norms 1..1e4", "trace 1e-5")
    every = exact.cases()
    return {"2 losses": normal(2, 4)} | {name: every[name] for name in chosen}


QUICK = ("random",)


def compare(name: str, case: str, precision: Precision) -> Comparison:
    """Solve the problem `PROBLEMS[name]` for `cases()[case]` with both libraries.

    **Raises:** `KeyError` for other names.
    """
    problem = PROBLEMS[name]
    jacobian = cases()[case]
    with jax_precision(precision):
        shared = torch.from_numpy(gramian(jacobian, precision)).clone()
        ours = to_torch(jaxjd_weights(name, to_jax(shared)))
    rows = torch.from_numpy(jacobian).to(torch_dtype(precision))
    with warnings.catch_warnings(action="ignore"):  # CVXPY warns that it is slow.
        theirs = problem.theirs(rows)
    residuals = (
        float(problem.residual(weights.double().numpy(), jacobian))
        for weights in (ours, theirs)
    )
    return Comparison(name, case, precision, *residuals)


@functools.partial(jax.jit, static_argnames="name")
def jaxjd_weights(name: str, gramian: Float[jax.Array, "m m"]) -> jax.Array:
    weighting = PROBLEMS[name].ours(len(gramian))
    return weighting.update(gramian, weighting.init())[0]


PROBLEMS = {
    "mgda": Problem(
        lambda m: jaxjd.weighting.mgda(),
        lambda rows: reference.MGDAWeighting()(rows @ rows.T),
        mgda_residual,
    ),
    "cagrad, c = 0.5": Problem(
        lambda m: jaxjd.weighting.cagrad(0.5),
        lambda rows: reference.CAGradWeighting(0.5)(rows @ rows.T),
        functools.partial(cagrad_residual, c=0.5),
    ),
    **{
        f"fairgrad, alpha = {alpha:g}": Problem(
            lambda m, alpha=alpha: jaxjd.weighting.fairgrad(alpha),
            lambda rows, alpha=alpha: reference.FairGradWeighting(alpha)(rows @ rows.T),
            functools.partial(fairgrad_residual, alpha=alpha),
        )
        for alpha in (0.5, 2.0)
    },
    "nash_mtl": Problem(
        lambda m: jaxjd.weighting.nash_mtl(num_losses=m, max_norm=0.0),
        lambda rows: reference.NashMTL(len(rows), max_norm=0.0).weighting(rows),
        functools.partial(fairgrad_residual, alpha=1.0),  # The same equations.
    ),
}
