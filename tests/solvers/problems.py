"""The Jacobians on which the solvers are tested, and their exact solutions."""

import numpy as np
import scipy.optimize


def normal(rng, m):
    """Twice as many parameters as losses: full rank, well-conditioned."""
    return rng.normal(size=(m, 2 * m))


def conflicting(rng, m):
    """A shared direction with random signs, and noise."""
    signs = rng.choice([-1.0, 1.0], size=(m, 1))
    return signs * rng.normal(size=(1, 2 * m)) + 0.5 * rng.normal(size=(m, 2 * m))


def opposed(rng, m):
    """Cosines of about 1 and -1: the rows are ± one direction and a tenth of noise."""
    direction = rng.normal(size=(1, 2 * m))
    signs = rng.choice([-1.0, 1.0], size=(m, 1))
    signs[0], signs[-1] = 1, -1
    noise = rng.normal(size=(m, 2 * m))
    return signs * direction / np.linalg.norm(direction) + 0.1 * noise / (2 * m) ** 0.5


def near_duplicate(rng, m):
    """Copies of m / 4 rows, a thousandth apart."""
    distinct = max(1, m // 4)
    copies = np.tile(rng.normal(size=(distinct, 2 * m)), (-(-m // distinct), 1))[:m]
    return copies + 1e-3 * rng.normal(size=(m, 2 * m))


def rank_half(rng, m):
    """Rank m / 2. All rows have a positive first entry, so no point is stationary."""
    J = rng.normal(size=(m, max(2, m // 2)))
    J[:, 0] = np.abs(J[:, 0]) + 0.5
    return J


def rank_two(rng, m):
    """Rank 2, all rows within 170 degrees, so no point is stationary."""
    angle = rng.uniform(0, 0.95 * np.pi, size=m)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def nearly_stationary(rng, m):
    """The mean of the rows is 2% of what it is for random ones: a thin dual cone."""
    J = rng.normal(size=(m, 2 * m))
    return J - 0.98 * J.mean(axis=0)


def stationary(rng, m):
    """The rows sum to 0, so every projection is 0."""
    J = rng.normal(size=(m, 2 * m))
    return J - J.mean(axis=0)


NOT_STATIONARY = (
    normal,
    conflicting,
    opposed,
    near_duplicate,
    rank_half,
    rank_two,
    nearly_stationary,
)


def spread(rng, J, decades):
    """The norms of the rows multiplied by numbers from 1 to `10**decades`."""
    return J * 10 ** rng.uniform(0, decades, size=(len(J), 1))


def exact_projections(J, u):
    """The exact weights for each row of u, by Lawson and Hanson's NNLS on J itself.

    In float64, on the Jacobian and not its Gramian, by a method that shares nothing
    with those under test: argmin_x |J^T (u + x)| for x >= 0, the rows scaled to norm 1.
    """
    norms = np.linalg.norm(J, axis=1)
    A = (J / norms[:, None]).T
    if A.shape[0] > A.shape[1]:
        A = np.linalg.qr(A, mode="r")
    b = u * norms
    size = np.abs(b).max(axis=1, keepdims=True)
    b = b / size
    x = [scipy.optimize.nnls(A, -A @ row, maxiter=200 * len(J))[0] for row in b]
    return (b + np.stack(x)) * size / norms


def factor(gramian):
    """A Jacobian with this Gramian, without the negative eigenvalues of rounding."""
    norms = np.sqrt(np.diagonal(gramian))
    values, vectors = np.linalg.eigh(gramian / norms[:, None] / norms)
    return norms[:, None] * vectors * np.sqrt(np.maximum(values, 0))


def gramian32(J):
    """J rounded to float32, and its Gramian, computed there."""
    J32 = J.astype(np.float32)
    return J32.astype(np.float64), J32 @ J32.T
