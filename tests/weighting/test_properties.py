"""Which aggregators are non-conflicting, linear under scaling, and weighted?

This checks Table 1 of Quinton & Rey (2024), arXiv:2406.16232, and the same properties
of the aggregators that are not in it. A claimed property holds on hundreds of random
Jacobians. A denied property has a counterexample.
"""

import functools
import itertools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

import jaxjd
from tests.weighting import registry
from tests.weighting.registry import AGGREGATORS

pytestmark = pytest.mark.usefixtures("x64")

# A mask makes fewer losses of these, and zero coordinates make fewer dimensions. So
# each aggregator is compiled once, for a batch of Jacobians.
BATCH, M, N = 100, 5, 8
DRAWS = 500
PAGE = pathlib.Path(__file__).parents[2] / "docs" / "aggregators.md"
every = pytest.mark.parametrize("name", AGGREGATORS)


def those_that(claim):
    return [name for name, row in AGGREGATORS.items() if claim(row)]


@functools.cache
def compiled(name):
    """The compiled update of a batch of Jacobians, and a batch of initial states."""
    tx = registry.exact(name, M)

    def step(J, mask, state, losses):
        gramian = jnp.matmul(J, J.T, precision="highest")
        extra_args = registry.extra_args(name, gramian, losses)
        return tx.update(J, state, jnp.zeros(N), mask=mask, **extra_args)

    state = jax.tree.map(
        lambda x: jnp.broadcast_to(x, (BATCH, *x.shape)), tx.init(jnp.zeros(N))
    )
    return jax.jit(jax.vmap(step)), state


def in_batches(name, J, mask, state, losses=None):
    step = compiled(name)[0]
    losses = same_losses() if losses is None else losses
    batches = [slice(start, start + BATCH) for start in range(0, len(J), BATCH)]
    updates = [
        step(jnp.asarray(J[batch]), jnp.asarray(mask[batch]), state, losses)[0]
        for batch in batches
    ]
    return np.concatenate(updates)


def same_losses():
    """The same losses for every Jacobian of a batch [BATCH, M]."""
    return jnp.broadcast_to(registry.some_losses(M), (BATCH, M))


def first(name, J, mask, losses=None):
    """The updates of first steps [b, N]."""
    return in_batches(name, J, mask, compiled(name)[1], losses)


def later(name, J, mask):
    """The updates of second steps, after one with other Jacobians [b, N]."""
    return in_batches(name, J, mask, later_state(name))


@functools.cache
def later_state(name):
    step, state = compiled(name)
    if not jax.tree.leaves(state):
        return state
    before = np.random.default_rng(1).normal(size=(BATCH, M, N))
    every = jnp.ones((BATCH, M), bool)
    return step(jnp.asarray(before), every, state, same_losses())[1]


@functools.cache
def drawn(name):
    """The updates of second steps on the random Jacobians."""
    return later(name, *jacobians())


@functools.cache
def jacobians():
    """2, 3 or 5 gradients in 2, 4 or 8 dimensions [b, M, N], and masks [b, M].

    They take turns: normal; rank-deficient, of rank 1 to 4; with norms from 1e-3 to
    1e3; with a direction in which all losses decrease.
    """
    rng = np.random.default_rng(0)
    J = np.zeros((DRAWS, M, N))
    shapes = itertools.product(range(4), (2, 4, 8), (2, 3, 5))
    for rows, (kind, n, m) in zip(J, itertools.cycle(shapes), strict=False):
        rows[:m, :n] = rng.normal(size=(m, n))
        if kind == 1:
            rank = max(min(m, n) - 1, 1)
            rows[:m, :n] = rng.normal(size=(m, rank)) @ rng.normal(size=(rank, n))
        elif kind == 2:
            rows *= 10 ** rng.uniform(-3, 3, size=(M, 1))
        elif kind == 3:
            rows[:, 0] = np.abs(rows[:, 0])
    return J, np.linalg.norm(J, axis=2) > 0


def lengths(J):
    """The norms of the gradients [..., m], or 1 for zero gradients."""
    norms = np.linalg.norm(J, axis=-1)
    return np.where(norms > 0, norms, 1)


@functools.cache
def stationarity():
    """How far each point is from Pareto-stationary, in terms of unit gradients [b]."""
    J, mask = jacobians()
    units = J / lengths(J)[..., None]
    return np.array([distance_of_hull(u[m]) for u, m in zip(units, mask, strict=True)])


def distance_of_hull(rows):
    """The distance of the convex hull of some rows from 0, by brute force.

    It is the smallest distance of any face's affine hull whose point closest to 0 lies
    within the face.
    """
    distance = np.inf
    indices = range(len(rows))
    subsets = (itertools.combinations(indices, k + 1) for k in indices)
    for face in map(list, itertools.chain.from_iterable(subsets)):
        ones = np.ones((len(face), 1))
        kkt = np.block([[rows[face] @ rows[face].T, ones], [ones.T, np.zeros((1, 1))]])
        w = np.linalg.lstsq(kkt, np.eye(len(kkt))[-1], rcond=1e-12)[0][:-1]
        if abs(w.sum() - 1) < 1e-9 and (w >= -1e-12).all():
            distance = min(distance, np.linalg.norm(w @ rows[face]))
    return distance


def well_posed(name):
    """The Jacobians that have a solution which rounding does not hide [b]."""
    bargaining = AGGREGATORS[name].bargaining
    return stationarity() > 0.01 if bargaining else np.full(DRAWS, True)


def test_the_jacobians():
    """They include stationary and other points, and full and deficient ranks."""
    J, mask = jacobians()
    assert 50 < (stationarity() > 0.01).sum() < DRAWS - 50
    ranks = np.linalg.matrix_rank(J)
    assert 50 < (ranks < mask.sum(axis=1)).sum() < DRAWS - 50


@pytest.mark.parametrize("name", those_that(lambda row: not row.conflicts))
def test_non_conflicting(name):
    J, _ = jacobians()
    progress = np.einsum("bmn,bn->bm", J, drawn(name))
    # The solvers stop at 1e-12, which is also float64 rounding here.
    trace = (J**2).sum(axis=(1, 2))
    assert (progress.min(axis=1) >= -1e-12 * trace)[well_posed(name)].all()


@pytest.mark.parametrize("name", those_that(lambda row: not row.conflicts))
def test_non_conflicting_with_short_gradients(name):
    """The update does not conflict with short gradients either.

    The cosine is only meaningful if the update is more than rounding.
    """
    (J, _), update = jacobians(), drawn(name)
    cosines = np.einsum("bmn,bn->bm", J / lengths(J)[..., None], update)
    cosines /= lengths(update)[:, None]
    assert cosines[stationarity() > 0.01].min() >= -1e-6


def test_conflict_free_of_independent_gradients():
    J, mask = jacobians()
    independent = np.linalg.matrix_rank(J) == mask.sum(axis=1)
    progress = np.einsum("bmn,bn->bm", J, drawn("conflict_free"))
    assert (progress[independent] > 0)[mask[independent]].all()


@pytest.mark.parametrize("name", those_that(lambda row: not row.not_linear))
def test_linear_under_scaling(name):
    J, mask = jacobians()
    c, d = np.random.default_rng(2).uniform(0.1, 3, size=(2, DRAWS, M, 1))
    together = later(name, (c + d) * J, mask)
    apart = later(name, c * J, mask) + later(name, d * J, mask)
    size = np.linalg.norm((c + d) * J, axis=(1, 2))
    error = np.linalg.norm(together - apart, axis=1) / size
    # GradVac's `eps` of 1e-8 is not scaled.
    assert error.max() <= (1e-7 if name == "gradvac" else 1e-11)


@pytest.mark.parametrize("name", those_that(lambda row: not row.not_weighted))
def test_weighted(name):
    J, _ = jacobians()
    assert outside_of_span(J, drawn(name))[well_posed(name)].max() <= 1e-12


def outside_of_span(J, update):
    """The part of an update outside the span of the rows, relative to J or the update.

    The larger norm counts: FairGrad's update gets longer as the gradients get shorter.
    """
    units = J / lengths(J)[..., None]  # The same span, better conditioned.
    inside = np.linalg.pinv(units, rcond=1e-10) @ units
    rest = update - np.einsum("bij,bj->bi", inside, update)
    size = np.maximum(np.linalg.norm(J, axis=(1, 2)), np.linalg.norm(update, axis=1))
    return np.linalg.norm(rest, axis=1) / np.where(size > 0, size, 1)


def update_of(name, rows, before=None):
    """The update for these rows, perhaps after a step with the rows `before`."""
    m, n = np.shape(rows)
    mask = jnp.asarray(np.tile(np.arange(M) < m, (BATCH, 1)))

    def batch(rows):
        # A new array each time: on a CPU, JAX may read it in place, and later.
        J = np.zeros((BATCH, M, N))
        J[:, :m, :n] = rows
        return jnp.asarray(J)

    step, state = compiled(name)
    if before is not None:
        state = step(batch(before), mask, state, same_losses())[1]
    return np.asarray(step(batch(rows), mask, state, same_losses())[0])[0, :n]


@pytest.mark.parametrize("name", those_that(lambda row: row.conflicts))
def test_conflicts(name):
    rows, value, before = AGGREGATORS[name].conflicts
    units = np.asarray(rows) / lengths(np.asarray(rows))[:, None]
    assert distance_of_hull(units) > 0.01
    update = update_of(name, rows, before)
    cosine = (units @ update).min() / np.linalg.norm(update)
    assert_allclose(cosine, value, atol=1e-4)
    assert cosine < -0.1


@pytest.mark.parametrize("name", those_that(lambda row: row.not_linear))
def test_not_linear_under_scaling(name):
    rows, value, before = AGGREGATORS[name].not_linear
    scales = np.array([3, 1, 1, 1, 1])[: len(rows), None]
    together = update_of(name, (1 + scales) * rows, before)
    apart = update_of(name, rows, before) + update_of(name, scales * rows, before)
    error = np.linalg.norm(together - apart) / np.linalg.norm(together)
    assert_allclose(error, value, atol=1e-4)
    assert error > 0.05


@pytest.mark.parametrize("name", those_that(lambda row: row.not_weighted))
def test_not_weighted(name):
    rows, value, _ = AGGREGATORS[name].not_weighted
    update = update_of(name, rows)
    w = np.linalg.lstsq(np.asarray(rows, float).T, update, rcond=1e-10)[0]
    rest = np.linalg.norm(update - w @ rows) / np.linalg.norm(update)
    assert_allclose(rest, value, atol=1e-4)
    assert rest > 0.1


@pytest.mark.parametrize("name", those_that(lambda row: row.not_rotated))
def test_the_coordinates_matter(name):
    rows, value, _ = AGGREGATORS[name].not_rotated
    rotation = np.array([[1, -1], [1, 1]]) / np.sqrt(2)
    update = update_of(name, rows)
    turned = update_of(name, rows @ rotation)
    error = np.linalg.norm(turned - update @ rotation) / np.linalg.norm(update)
    assert_allclose(error, value, atol=1e-4)
    assert error > 0.1


@pytest.mark.parametrize("name", those_that(lambda row: not row.not_rotated))
def test_the_coordinates_do_not_matter(name):
    """Rotating the parameters rotates the update if it depends on the Gramian only."""
    J, mask = (arrays[:BATCH] for arrays in jacobians())
    rotation = np.linalg.qr(np.random.default_rng(3).normal(size=(N, N)))[0]
    error = first(name, J @ rotation, mask) - first(name, J, mask) @ rotation
    error = np.linalg.norm(error, axis=1) / np.linalg.norm(J, axis=(1, 2))
    # Where the exact value is zero, GradVac and PCD divide by its rounding plus 1e-8.
    assert error[well_posed(name)[:BATCH]].max() <= 1e-7


@pytest.mark.parametrize("name", those_that(lambda row: not row.ordered))
def test_the_order_of_the_losses_does_not_matter(name):
    """The update of a first step is the same in any order."""
    J, mask = (arrays[:BATCH] for arrays in jacobians())
    order = np.random.default_rng(4).permuted(np.tile(np.arange(M), (BATCH, 1)), axis=1)
    permuted = np.take_along_axis(J, order[..., None], 1)
    losses = jnp.take_along_axis(same_losses(), jnp.asarray(order), 1)
    error = first(name, permuted, np.take_along_axis(mask, order, 1), losses)
    error = np.linalg.norm(error - first(name, J, mask), axis=1)
    error /= np.linalg.norm(J, axis=(1, 2))
    comparable = well_posed(name)[:BATCH]
    if name == "krum":
        # With fewer gradients each has one neighbour, so the nearest two tie.
        comparable = mask.all(axis=1)
    assert error[comparable].max() <= 1e-7


@functools.cache
def stationary_jacobians(strongly):
    """Five gradients [b, M, N] at a stationary point.

    If `strongly`, 0 = J^T w for some w > 0. Otherwise this holds for the first three
    gradients only. The other two have positive products with a direction that is
    orthogonal to the three. Along it two losses decrease and no loss increases, which
    is impossible if 0 = J^T w with w > 0.
    """
    rng = np.random.default_rng(5)
    J = rng.normal(size=(BATCH, M, N))
    stationary = M if strongly else 3
    w = rng.uniform(0.5, 2, size=(BATCH, stationary, 1))
    rows = J[:, :stationary]
    rows -= w * (w * rows).sum(axis=1, keepdims=True) / (w**2).sum(axis=1)[:, None]
    if not strongly:
        J[:, :3, 0] = 0
        J[:, 3:, 0] = 1
    return J, np.ones((BATCH, M), bool)


def zero_updates(name, strongly):
    J, mask = stationary_jacobians(strongly)
    return np.linalg.norm(later(name, J, mask), axis=1) < 1e-6


@pytest.mark.parametrize("name", those_that(lambda row: not row.bargaining))
def test_strongly_stationary(name):
    """No loss can decrease unless another increases."""
    zero = zero_updates(name, strongly=True)
    if AGGREGATORS[name].zero_at in ("stationary", "strongly"):
        assert zero.all()
    else:
        assert not zero.any()


@every
def test_weakly_stationary(name):
    """The losses cannot all decrease, but some can without any increase."""
    zero = zero_updates(name, strongly=False)
    if AGGREGATORS[name].zero_at == "stationary":
        assert zero.all()
    elif name == "cagrad":
        # It is zero if a step in its ball conflicts with no loss: none does better.
        assert 0 < zero.sum() < len(zero)
    else:
        assert not zero.any()


def rows_of_page():
    """The cells of each row by the name of the aggregator."""
    section = PAGE.read_text().split("\n## ")[0]
    lines = re.findall(r"^\| `(\w+)` \|(.*)\|$", section, re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in lines}


@every
def test_the_page_has_the_references(name):
    reference = rows_of_page()[name][-1]
    documentation = getattr(jaxjd, name).__doc__
    assert ("**Reference:**" in documentation) == bool(reference)
    for number in re.findall(r"arxiv.org/abs/([\d.]+)", reference):
        assert f"arXiv:{number}" in documentation
    for author, year in re.findall(r"\[(\S+).*?\((\d+)\)\]", reference):
        assert re.search(rf"{author}[^(]*\({year}\)", documentation)
