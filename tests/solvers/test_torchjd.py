"""Are the weights equal to TorchJD's, with TorchJD's regularisation?"""

import functools

import jax
import numpy as np
import pytest

from jaxjd.solvers import project_dual_cone
from tests.solvers import problems

torch = pytest.importorskip("torch")
aggregation = pytest.importorskip("torchjd.aggregation")
linalg = pytest.importorskip("torchjd.linalg")

TORCHJD = {"norm_eps": 1e-4, "reg_eps": 1e-4}

solve = jax.jit(functools.partial(project_dual_cone, **TORCHJD))


def gramians(m):
    for number, family in enumerate((*problems.NOT_STATIONARY, problems.stationary)):
        rng = np.random.default_rng([number, m])
        J = family(rng, m)
        # A trace below norm_eps, and rows of different norms, too.
        yield from (J @ J.T, 1e-4 * J @ J.T)
        J = problems.spread(rng, J, 2)
        yield J @ J.T


@pytest.mark.parametrize("m", [2, 24])
def test_weights_in_float64(x64, m):
    rng = np.random.default_rng(m)
    preference = rng.uniform(0.1, 1, size=m)
    upgrad = aggregation.UPGradWeighting(torch.asarray(preference))
    dualproj = aggregation.DualProjWeighting(torch.asarray(preference))
    for G in gramians(m):
        u = np.concatenate([np.diag(preference), preference[None]])
        result = solve(u, G)
        assert result.certificate.converged.all()
        solutions = np.asarray(result.solution)
        pairs = ((solutions[:-1].sum(0), upgrad), (solutions[-1], dualproj))
        for ours, weighting in pairs:
            theirs = weighting(torch.asarray(G)).numpy()
            error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
            assert error <= 1e-9


def test_weights_in_float32():
    m = 24
    u = np.eye(m + 1, m, dtype=np.float32) / m
    for G in gramians(m):
        G = G.astype(np.float32)
        result = solve(u, G)
        assert result.certificate.converged.all()
        ours = np.asarray(result.solution).sum(0)  # The row of zeros adds nothing.
        weighting = aggregation.UPGradWeighting()
        theirs = weighting(torch.asarray(G.astype(np.float64))).numpy()
        error = ours - theirs
        assert np.linalg.norm(error) <= 1e-4 * np.linalg.norm(theirs)
        H = 1e-4 * np.eye(m) + (G / np.trace(G) if np.trace(G) >= 1e-4 else 0)
        assert error @ H @ error <= (5e-5) ** 2 * (theirs @ H @ theirs)


def test_any_number_of_rows_of_any_sign(x64):
    m = 24
    rng = np.random.default_rng(0)
    u = rng.normal(size=(5, 5, m))
    G = next(gramians(m))
    theirs = linalg.QuadprogProjector()(torch.asarray(u), torch.asarray(G)).numpy()
    np.testing.assert_allclose(solve(u, G).solution, theirs, atol=1e-9)
