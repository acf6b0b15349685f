"""Measure how far each library, with default settings, is from the exact projection.

The exact weights are $w = \\operatorname{argmin}_{v \\succeq u} \\|J^\\top v\\|^2$.
With $v = u + z$ this is a nonnegative least-squares problem in J itself, which an
active-set method solves in finitely many steps. The rows of J are scaled to norm 1
first: z can be rescaled to match, and J is much better conditioned than its Gramian. So
the reference shares nothing with the two libraries: no Gramian, no regularisation, no
float32.
"""

import dataclasses

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import nnls
from torchjd.aggregation import UPGradWeighting

from .bridge import to_jax, to_torch
from .check import Measurement
from .jacobians import (
    Jacobian,
    conflicting,
    gramian,
    near_duplicates,
    normal,
    rank_deficient,
    spread,
)
from .precision import Precision, jax_precision
from .weights import jaxjd_weights

# jaxjd promises that no loss increases, to first order, up to this cosine.
WORST_COSINE = -1e-3


@dataclasses.dataclass(frozen=True)
class Quality:
    """How good some weights are.

    `distance`: $\\|J^\\top(w - w^*)\\| / \\|J^\\top w^*\\|$, the root of
    $(w - w^*)^\\top G (w - w^*) / {w^*}^\\top G w^*$. `cosine`: the smallest cosine
    between the update and a gradient, negative if the update increases a loss.
    """

    distance: float
    cosine: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Both libraries' UPGrad, with default settings, on one Jacobian."""

    name: str
    precision: Precision
    jaxjd: Quality
    torchjd: Quality

    @property
    def cosine(self) -> Measurement:
        """jaxjd's worst cosine, negated so that the bound is an upper one."""
        return Measurement(-self.jaxjd.cosine, -WORST_COSINE)


def cases() -> dict[str, Jacobian]:
    """Jacobians with a nonzero exact update, since distances are relative to it."""
    dense = normal(16, 32)
    outlier = dense / np.linalg.norm(dense, axis=1, keepdims=True)
    outlier[0] *= 100
    tiny = conflicting(16)
    return {
        "paper's example": np.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]),
        "random": dense,
        "every two conflict": conflicting(16),
        "near-duplicate rows": near_duplicates(16),
        "rank-deficient": rank_deficient(16),
        "one row 100 times larger": outlier,
        "row norms 1..100": spread(dense, 1e2),
        "row norms 1..1e4": spread(dense, 1e4),
        "row norms 1..1e6": spread(dense, 1e6),
        "64 losses, norms 1..1e6": spread(normal(64, 128), 1e6),
        "every two conflict, norms 1..1e6": spread(conflicting(16), 1e6),
        "trace 1e-3": tiny * np.sqrt(1e-3) / np.linalg.norm(tiny),
        "trace 1e-5": tiny * np.sqrt(1e-5) / np.linalg.norm(tiny),
        "trace 1e-12": tiny * np.sqrt(1e-12) / np.linalg.norm(tiny),
    }


QUICK = ("paper's example", "random", "row norms 1..1e6", "trace 1e-5")


def compare(name: str, precision: Precision) -> Comparison:
    """Run both libraries on the Jacobian `cases()[name]`.

    **Raises:** `KeyError` if `name` is not among `cases()`.
    """
    jacobian = cases()[name]
    exact = exact_upgrad(jacobian)
    with jax_precision(precision):
        shared = torch.from_numpy(gramian(jacobian, precision)).clone()
        ours = to_torch(jaxjd_weights("upgrad", to_jax(shared))).numpy()
        theirs = UPGradWeighting()(shared).numpy()
    return Comparison(
        name,
        precision,
        quality(ours, exact, jacobian),
        quality(theirs, exact, jacobian),
    )


def quality(
    weights: Float[np.ndarray, " m"],
    exact: Float[np.ndarray, " m"],
    jacobian: Jacobian,
) -> Quality:
    update = weights.astype(np.float64) @ jacobian
    target = exact @ jacobian
    norms = np.linalg.norm(jacobian, axis=1)
    cosines = jacobian @ update / (norms * np.linalg.norm(update))
    distance = np.linalg.norm(update - target) / np.linalg.norm(target)
    return Quality(float(distance), float(cosines.min()))


def exact_upgrad(jacobian: Jacobian) -> Float[np.ndarray, " m"]:
    """The weights of UPGrad without any regularisation.

    **Arguments:**

    - `jacobian`: [m, n], without zero rows.
    """
    u = np.eye(len(jacobian)) / len(jacobian)
    return sum(exact_projection(row, jacobian) for row in u)  # pyright: ignore


def exact_projection(
    u: Float[np.ndarray, " m"], jacobian: Jacobian
) -> Float[np.ndarray, " m"]:
    """The v that minimises $\\|J^\\top v\\|$ subject to $v \\succeq u$.

    **Arguments:**

    - `u`: [m], any sign.
    - `jacobian`: [m, n], without zero rows.
    """
    norms = np.linalg.norm(jacobian, axis=1)
    directions = jacobian / norms[:, None]
    scale = np.linalg.norm(u @ jacobian)
    z, _ = nnls(directions.T, -(u @ jacobian) / scale, maxiter=30 * len(u))
    return u + z * scale / norms
