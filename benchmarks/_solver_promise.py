"""Measure how much UPGrad's update conflicts with a gradient in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
import torch
from torchjd.aggregation import UPGradWeighting

from jaxjd.solvers import project_dual_cone

EPS = float(np.finfo(np.float32).eps)


def _conflicting(rng, m):
    signs = rng.choice([-1.0, 1.0], size=(m, 1))
    return signs * rng.normal(size=(1, 2 * m)) + 0.5 * rng.normal(size=(m, 2 * m))


def _opposed(rng, m, noise):
    direction = rng.normal(size=(1, 2 * m))
    signs = rng.choice([-1.0, 1.0], size=(m, 1))
    signs[0], signs[-1] = 1, -1
    direction = signs * direction / np.linalg.norm(direction)
    return direction + noise * rng.normal(size=(m, 2 * m)) / (2 * m) ** 0.5


def _near_duplicate(rng, m):
    copies = np.tile(rng.normal(size=(m // 4, 2 * m)), (4, 1))
    return copies + 1e-3 * rng.normal(size=(m, 2 * m))


def _rank_half(rng, m):
    J = rng.normal(size=(m, m // 2))
    J[:, 0] = np.abs(J[:, 0]) + 0.5
    return J


def _rank_two(rng, m):
    angle = rng.uniform(0, 0.95 * np.pi, size=m)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _stationary(rng, m):
    J = rng.normal(size=(m, 2 * m))
    return J - J.mean(axis=0)


FAMILIES = {
    "conflicting": _conflicting,
    "opposed, cosine -0.99": functools.partial(_opposed, noise=0.1),
    "opposed, cosine -1 + 1e-6": functools.partial(_opposed, noise=1e-3),
    "near-duplicate": _near_duplicate,
    "rank m/2": _rank_half,
    "rank 2": _rank_two,
    "Pareto-stationary": _stationary,
}
SCALES = (1e-8, 1.0, 1e8)


@jax.jit
@jax.vmap
def _upgrad(G):
    m = G.shape[0]
    result = project_dual_cone(jnp.eye(m, dtype=G.dtype) / m, G)
    return result.solution.sum(0), result.certificate.converged.all()


def _exact(J):
    """UPGrad's exact weights, by NNLS on J in float64."""
    norms = np.linalg.norm(J, axis=1)
    A = (J / norms[:, None]).T
    if A.shape[0] > A.shape[1]:
        A = np.asarray(np.linalg.qr(A, mode="r"))
    unit = np.eye(len(J))
    x = [scipy.optimize.nnls(A, -A @ row, maxiter=200 * len(J))[0] for row in unit]
    return (norms / len(J)) @ (unit + np.stack(x)) / norms


def _factor(G):
    norms = np.sqrt(np.diagonal(G))
    values, vectors = np.linalg.eigh(G / norms[:, None] / norms)
    return norms[:, None] * vectors * np.sqrt(np.maximum(values, 0))


def _cosine(J, w):
    update = J.T @ w
    return float((J @ update / np.linalg.norm(J, axis=1)).min() / _norm(update))


def _norm(vector):
    return max(float(np.linalg.norm(vector)), 1e-300)


def _distance(J, w, exact):
    return float((_norm(J.T @ (w - exact)) / _norm(J.T @ exact)) ** 2)


def promise_table(sizes):
    """Tabulate worst cosines and distances to the exact projection, with the floor.

    The floor is the exact projection for the Gramian rounded to float32, which a solver
    without any error of its own would return.
    """
    rows = []
    for m in sizes:
        for number, (family, make) in enumerate(FAMILIES.items()):
            for decades in (0, 2, 6):
                rng = np.random.default_rng([number, m, decades])
                J = make(rng, m) * 10 ** rng.uniform(0, decades, size=(m, 1))
                rows.append(_promise_row(family, m, decades, J))
    head = (
        "| rows | m | norms | worst cosine, jaxjd | TorchJD | floor "
        "| distance, jaxjd | TorchJD | floor | not converged |"
    )
    lines = [head, "|" + "---|" * 10]
    for row in rows:
        lines.append(
            f"| {row['family']} | {row['m']} | 1..1e{row['decades']} "
            f"| {row['cosine']:.1e} | {row['cosine_torchjd']:.1e} "
            f"| {row['cosine_floor']:.1e} | {row['distance']:.0e} "
            f"| {row['distance_torchjd']:.0e} | {row['distance_floor']:.0e} "
            f"| {row['failures']} |"
        )
    notes = (
        "The worst cosine between the update and a gradient, and the squared relative "
        "distance to the exact projection, both computed in float64 from the weights. "
        "jaxjd: in float32, the worst over the global scales 1e-8, 1 and 1e8. TorchJD: "
        "with its defaults, at scale 1. Floor: the exact projection in float64 for the "
        "Gramian rounded to float32, which an exact solver would return. "
        "If the rows are Pareto-stationary, the exact update is 0, and neither the "
        "cosine nor the distance means anything."
    )
    return notes + "\n\n" + "\n".join(lines), rows


def _promise_row(family, m, decades, J):
    scaled = [(scale * J).astype(np.float32) for scale in SCALES]
    gramians = np.stack([S @ S.T for S in scaled])
    weights, converged = _upgrad(gramians)
    weights = np.asarray(weights, np.float64)
    jacobians = [S.astype(np.float64) for S in scaled]
    exact = [_exact(S) for S in jacobians]
    base = jacobians[1]
    theirs = UPGradWeighting()(torch.from_numpy(gramians[1])).double().numpy()
    floor = _exact(_factor(gramians[1].astype(np.float64)))
    triples = list(zip(jacobians, weights, exact, strict=True))
    return {
        "family": family,
        "m": m,
        "decades": decades,
        "cosine": min(_cosine(S, w) for S, w, _ in triples),
        "cosine_torchjd": _cosine(base, theirs),
        "cosine_floor": _cosine(base, floor),
        "distance": max(_distance(*triple) for triple in triples),
        "distance_torchjd": _distance(base, theirs, exact[1]),
        "distance_floor": _distance(base, floor, exact[1]),
        "failures": int(np.sum(~np.asarray(converged))),
    }
