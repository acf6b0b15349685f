"""Does UPGrad's update conflict with no gradient, at any scale, in float32?

By default the norms may spread over five decades. Beyond that the shortest gradients
are ignored. With `noise_eps=0` the norms may spread over six decades.

All updates are computed from the returned weights in float64, so only the error of the
weights is seen. Two limits come from a float32 Gramian, not from the solver:

- Rounding G alone moves the squared norm of an update `Jᵀw` by about
  `eps sqrt(m) |d∘w|²`, with d the norms of the gradients. An update whose squared norm
  is below eight times that cannot be told from 0, and its cosines are noise.
  `measurable` decides this from float64 data. The tests name the families where this
  happens, and fail if it happens elsewhere.
- The exact projection of the rounded Gramian differs from that of J itself. Where a
  distance is compared, this floor is computed by an independent method in float64, and
  added to the bound.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxjd.solvers import project_dual_cone
from jaxjd.weighting._projection import NOISE_EPS
from tests.solvers import problems
from tests.xla import NORMAL

EPS = np.finfo(np.float32).eps
SCALES = (1e-8, 1.0, 1e8)


BATCH = 72  # Gramians at once, so that each m is compiled once.


@functools.partial(jax.jit, compiler_options=NORMAL)  # It takes long to run.
@functools.partial(jax.vmap, in_axes=(0, None))
def upgrad_batch(G, noise_eps):
    m = len(G)
    u = jnp.eye(m, dtype=G.dtype) / m
    result = project_dual_cone(u, G, noise_eps=noise_eps)
    return result.solution.sum(0), result.certificate.iterations


def upgrad(gramians, noise_eps=0.0):
    """The weights for up to 72 Gramians. No search may end at its cap."""
    batch = np.resize(np.stack(gramians), (BATCH, *gramians[0].shape))
    weights, iterations = upgrad_batch(batch, noise_eps)
    assert iterations.max() < 8_000
    assert np.isfinite(weights).all()
    return np.asarray(weights, float)[: len(gramians)]


def opposed_pairs(rng, m):
    """Rows, their exact opposites, and others. The projections of the pairs are 0."""
    J = rng.normal(size=(m, 2 * m))
    pairs = m // 4
    J[pairs : 2 * pairs] = -J[:pairs]
    return J


def measurable(J, w):
    update = np.square(w @ J).sum()
    size = np.square(w * np.linalg.norm(J, axis=1)).sum()
    return update > 8 * EPS * len(J) ** 0.5 * size


def worst_cosine(J, w):
    update = w @ J
    return (J @ update / np.linalg.norm(J, axis=1)).min() / np.linalg.norm(update)


@pytest.mark.parametrize(
    "m",
    [
        2,
        pytest.param(8, marks=pytest.mark.slow),
        32,
        pytest.param(128, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(("noise_eps", "most"), [(NOISE_EPS, 5), (0.0, 6)])
def test_worst_cosine(m, noise_eps, most):
    families = [*problems.NOT_STATIONARY, opposed_pairs]
    cases = []
    for number, family in enumerate(families):
        for decades in (0, 3, most):
            rng = np.random.default_rng([m, number, decades])
            J = problems.spread(rng, family(rng, m), decades)
            cases += [(family, scale * J) for scale in SCALES]
    jacobians, gramians = zip(*(problems.gramian32(J) for _, J in cases), strict=True)
    assert len(gramians) == BATCH
    lost = {family: 0 for family in families}
    for (family, _), J, w in zip(
        cases, jacobians, upgrad(gramians, noise_eps), strict=True
    ):
        if measurable(J, w):
            assert worst_cosine(J, w) >= -1e-3
        else:
            lost[family] += 1
    # A huge gradient and its opposite leave an update a million times smaller.
    lost.pop(opposed_pairs)
    assert not any(lost.values())


@pytest.mark.parametrize("decades", [0, 6])
def test_distance_to_the_exact_projection(decades):
    m = 32
    jacobians, gramians = [], []
    for number, family in enumerate(problems.NOT_STATIONARY):
        rng = np.random.default_rng([number, decades])
        J, G = problems.gramian32(problems.spread(rng, family(rng, m), decades))
        jacobians.append(J)
        gramians.append(G)
    rows = np.eye(m) / m
    for J, G, w in zip(jacobians, gramians, upgrad(gramians), strict=True):
        exact = problems.exact_projections(J, rows).sum(0)
        rounded = problems.factor(G.astype(float))
        floor = problems.exact_projections(rounded, rows).sum(0)
        scale = np.square(exact @ J).sum()
        distance = np.square((w - exact) @ J).sum() / scale
        floor_distance = np.square((floor - exact) @ J).sum() / scale
        assert distance <= 1e-6
        # Where the floor allows more than six digits, they are required.
        assert distance <= 1e-9 + 10 * floor_distance


def random_gramians(rng, m, count):
    """Every family in turn, its rows spread over up to 12 decades."""
    families = [*problems.NOT_STATIONARY, problems.stationary, opposed_pairs]
    for index in range(count):
        J = families[index % len(families)](rng, m)
        decades = (0, 6, 12)[index % 3]
        yield problems.gramian32(1e-6 * problems.spread(rng, J, decades))[1]


def check_no_conflict(m, batches):
    rng = np.random.default_rng(m)
    for _ in range(batches):
        gramians = list(random_gramians(rng, m, BATCH))
        for G, w in zip(gramians, upgrad(gramians), strict=True):
            assert (G.astype(float) @ w).min() >= -1e-6 * np.trace(G)


@pytest.mark.parametrize("m", [2, 8, 32])
def test_no_conflict_on_200_random_gramians(m):
    check_no_conflict(m, batches=1)


@pytest.mark.slow
@pytest.mark.parametrize("m", [2, 3, 8, 24, 64])
def test_no_conflict_on_10000_random_gramians(m):
    check_no_conflict(m, batches=28)


def test_the_hardest_faces_are_found():
    # With rank m / 2 half of all random Jacobians are stationary and the others nearly
    # so; an exchange of indices without proximal steps cycles on one in ten.
    m = 32
    rng = np.random.default_rng(0)
    J = [rng.normal(size=(m, m // 2)) for _ in range(BATCH)]
    upgrad([problems.gramian32(rows)[1] for rows in J])
