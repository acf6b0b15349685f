"""The Jacobians on which the weightings are compared.

Each kind has the property that it is named after, by construction. All are float64 and
the same on every call. The Gramian is computed in float64 and then rounded, so both
libraries and both precisions see the same problem.
"""

import numpy as np
from jaxtyping import Float

from .precision import Precision

Jacobian = Float[np.ndarray, "m n"]


def comparable() -> dict[str, list[Jacobian]]:
    """Jacobians by kind, for comparing weights under TorchJD's rule."""
    return {
        "random": [normal(12, 24)],
        "random, 32 losses": [normal(32, 64)],
        "conflicting": [conflicting(12)],
        "rank-deficient": [rank_deficient(12, seed) for seed in range(5)],
        "random of rank 6": [normal(12, 6, seed) for seed in range(5)],
        "duplicate rows": [np.repeat(normal(6, 12), 2, axis=0)],
        "near-duplicate rows": [near_duplicates(12)],
        "opposed rows": [opposed(12)],
        "row norms 1..1000": [spread(normal(12, 24), 1e3)],
        "one zero row": [normal(12, 24) * (np.arange(12) > 0)[:, None]],
        "zero": [np.zeros((12, 12))],
        "trace below norm_eps": [1e-3 * unit(normal(12, 24))],
        "m = 1": [normal(1, 5)],
    }


def sequence(num_steps: int, m: int, n: int) -> list[tuple[Jacobian, Jacobian]]:
    """Two independent batches for each step: a shrinking Jacobian plus noise."""
    expected = normal(m, n)
    batches = []
    for step in range(num_steps):
        size = np.exp(-step / num_steps)
        first, second = (
            size * (expected + normal(m, n, seed=1 + 2 * step + batch))
            for batch in range(2)
        )
        batches.append((first, second))
    return batches


def gramian(jacobian: Jacobian, precision: Precision) -> Float[np.ndarray, "m m"]:
    return (jacobian @ jacobian.T).astype(precision)


def normal(m: int, n: int, seed: int = 0) -> Jacobian:
    return np.random.default_rng([m, n, seed]).standard_normal((m, n))


def conflicting(m: int) -> Jacobian:
    """Rows of which every two conflict.

    With orthonormal $e_i$ and their sum $s$, the rows are $e_i - 0.9 s / m$, so two
    different rows have the product $(0.9^2 - 2 \\cdot 0.9) / m < 0$. They are rescaled
    afterwards.
    """
    orthonormal = np.linalg.qr(normal(2 * m, m))[0].T
    return spread(orthonormal - 0.9 * orthonormal.mean(axis=0), 3)


def rank_deficient(m: int, seed: int = 0) -> Jacobian:
    """Rows of rank m/2 that share a descent direction: the projection is not 0."""
    basis = np.linalg.qr(normal(2 * m, m // 2))[0].T
    # In this basis all rows have the same positive first coordinate.
    coordinates = normal(m, m // 2, seed)
    coordinates[:, 0] = 0.3
    return coordinates @ basis


def near_duplicates(m: int) -> Jacobian:
    """Rows of which the second half is the first half plus noise of size 1e-3."""
    rows = normal(m // 2, 2 * m)
    return np.concatenate([rows, rows + 1e-3 * normal(m // 2, 2 * m, seed=1)])


def opposed(m: int) -> Jacobian:
    """Rows and their opposites: no direction is good for all, the projection is 0."""
    rows = normal(m // 2, m)
    return np.concatenate([rows, -rows])


def unit(jacobian: Jacobian) -> Jacobian:
    return jacobian / np.linalg.norm(jacobian)


def spread(jacobian: Jacobian, ratio: float) -> Jacobian:
    """Rescale the rows to norms from 1 to `ratio`, in geometric progression."""
    norms = np.linalg.norm(jacobian, axis=1, keepdims=True)
    return jacobian / norms * np.geomspace(1, ratio, len(jacobian))[:, None]
