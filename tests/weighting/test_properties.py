"""Which aggregators conflict with no loss, are linear under scaling, are weighted?

Table 1 of Quinton & Rey (2024), arXiv:2406.16232, and the same of the aggregators that
are not in it. What is claimed holds on hundreds of random Jacobians; what is denied has
a counterexample.
"""

import functools
import inspect
import itertools
import pathlib
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

import jaxjd

pytestmark = pytest.mark.usefixtures("x64")

# Fewer losses are made of these by a mask, and fewer dimensions by coordinates that are
# zero: so each aggregator is compiled once, for a batch of Jacobians.
BATCH, M, N = 100, 5, 8
DRAWS = 500
PAGE = pathlib.Path(__file__).parents[2] / "docs" / "aggregators.md"


class Properties(NamedTuple):
    """Of an aggregator A, definitions 1, 2 and 3 of the paper.

    Where there is a state or a key, for each state, which is held fixed.
    """

    non_conflicting: bool
    """Each component of J A(J) is nonnegative."""
    linear: bool
    """Under scaling: c -> A(diag(c) J) is linear in the scales c > 0 of the rows."""
    weighted: bool
    """A(J) is a combination of the rows of J."""


PROPERTIES = {
    "aligned_mtl": Properties(False, False, True),
    "cagrad": Properties(False, False, True),  # With c < 1.
    # Non-conflicting where the gradients are independent. With the length "projection".
    "conflict_free": Properties(False, True, True),
    "constant": Properties(False, True, True),
    # The second as its inner weighting, here UPGrad. The first weights are UPGrad's.
    "cr_mogm": Properties(False, True, True),
    "dualproj": Properties(True, False, True),
    "excess_mtl": Properties(False, False, True),
    "fairgrad": Properties(True, False, True),
    "graddrop": Properties(False, False, False),
    "gradvac": Properties(False, True, True),
    "imtl_g": Properties(False, False, True),
    "krum": Properties(False, False, True),
    "mean": Properties(False, True, True),
    "mgda": Properties(True, False, True),
    "modo": Properties(False, False, True),
    "nash_mtl": Properties(True, False, True),
    "pcd": Properties(False, False, True),
    "pcgrad": Properties(False, True, True),
    "random": Properties(False, True, True),
    "sdmgrad": Properties(False, False, True),
    "sum": Properties(False, True, True),
    "trimmed_mean": Properties(False, False, False),
    "upgrad": Properties(True, True, True),
}
# They have no solution where the point is Pareto-stationary.
BARGAINING = {"fairgrad", "nash_mtl"}
# To them the losses are not alike: they are ordered or drawn.
ORDERED = {"constant", "gradvac", "pcd", "pcgrad", "random"}
# They look at the coordinates of the parameters, which the others do not know.
OF_COORDINATES = {"excess_mtl", "graddrop", "trimmed_mean"}
# Where the update is zero: where the point is Pareto-stationary, 0 = J^T w with w >= 0
# that is not zero, or only where it is strongly so, w > 0.
ZERO_AT_STATIONARY = {"mgda"}
ZERO_AT_STRONGLY_STATIONARY = {"dualproj", "upgrad"}

# By default gradients below rounding are let go, for which `test_noise` is responsible.
EXACT_UPGRAD = jaxjd.weighting.upgrad(noise_eps=0)
MAKE = {name: getattr(jaxjd, name) for name in PROPERTIES} | {
    "constant": lambda: jaxjd.constant([0.1, 0.2, 0.3, 0.4, 0.5]),
    "cr_mogm": lambda: jaxjd.cr_mogm(EXACT_UPGRAD, num_losses=M),
    "dualproj": lambda: jaxjd.dualproj(noise_eps=0),
    "krum": lambda: jaxjd.krum(1),
    "trimmed_mean": lambda: jaxjd.trimmed_mean(1),
    "upgrad": lambda: jaxjd.upgrad(noise_eps=0),
    **{
        name: functools.partial(getattr(jaxjd, name), num_losses=M)
        for name in ("excess_mtl", "gradvac", "modo", "nash_mtl", "pcd", "sdmgrad")
    },
}


def those_that(claim):
    return [name for name in PROPERTIES if claim(PROPERTIES[name])]


@functools.cache
def compiled(name):
    """The updates of a batch of Jacobians, and the states of as many first steps."""
    tx = MAKE[name]()

    def step(J, mask, state):
        # One batch in the place of two.
        extra_args = {}
        if name in ("modo", "sdmgrad"):
            extra_args["cross_gramian"] = jnp.matmul(J, J.T, precision="highest")
        return tx.update(J, state, jnp.zeros(N), mask=mask, **extra_args)

    state = jax.tree.map(
        lambda x: jnp.broadcast_to(x, (BATCH, *x.shape)), tx.init(jnp.zeros(N))
    )
    return jax.jit(jax.vmap(step)), state


def in_batches(name, J, mask, state):
    step = compiled(name)[0]
    batches = [slice(start, start + BATCH) for start in range(0, len(J), BATCH)]
    updates = [
        step(jnp.asarray(J[batch]), jnp.asarray(mask[batch]), state)[0]
        for batch in batches
    ]
    return np.concatenate(updates)


def first(name, J, mask):
    """The updates of first steps [b, N]."""
    return in_batches(name, J, mask, compiled(name)[1])


def later(name, J, mask):
    """The updates of steps that come after one with other Jacobians [b, N]."""
    return in_batches(name, J, mask, later_state(name))


@functools.cache
def later_state(name):
    step, state = compiled(name)
    if not jax.tree.leaves(state):
        return state
    before = np.random.default_rng(1).normal(size=(BATCH, M, N))
    return step(jnp.asarray(before), jnp.ones((BATCH, M), bool), state)[1]


@functools.cache
def drawn(name):
    """The updates of the random Jacobians."""
    return later(name, *jacobians())


@functools.cache
def jacobians():
    """2, 3 or 5 gradients in 2, 4 or 8 dimensions [b, M, N], and masks [b, M].

    By turns: normal; of rank 1 to 4 and singular; with norms from 1e-3 to 1e3; with a
    direction in which all losses decrease.
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
    """Of the gradients [..., m], and 1 where they are zero."""
    norms = np.linalg.norm(J, axis=-1)
    return np.where(norms > 0, norms, 1)


@functools.cache
def stationarity():
    """How far from Pareto-stationary the points are, for unit gradients [b]."""
    J, mask = jacobians()
    units = J / lengths(J)[..., None]
    return np.array([distance_of_hull(u[m]) for u, m in zip(units, mask, strict=True)])


def distance_of_hull(rows):
    """Of the convex hull of some rows from 0, by brute force.

    It is the least of the distances of the affine hulls of its faces, of those that are
    closest to 0 within the face.
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
    """[b]: those for which there is a solution, and rounding does not hide it."""
    return stationarity() > 0.01 if name in BARGAINING else np.full(DRAWS, True)


def test_the_jacobians():
    """Both kinds of points are among them, and both kinds of ranks."""
    J, mask = jacobians()
    assert 50 < (stationarity() > 0.01).sum() < DRAWS - 50
    ranks = np.linalg.matrix_rank(J)
    assert 50 < (ranks < mask.sum(axis=1)).sum() < DRAWS - 50


def test_a_row_for_every_aggregator():
    """Those with a weighting, and those that have none."""
    exported = {
        name
        for name in vars(jaxjd)
        if hasattr(getattr(jaxjd, name), "__wrapped__")
        or name in ("excess_mtl", "graddrop", "trimmed_mean")
    }
    assert set(PROPERTIES) == exported


@pytest.mark.parametrize("name", those_that(lambda row: row.non_conflicting))
def test_non_conflicting(name):
    J, _ = jacobians()
    progress = np.einsum("bmn,bn->bm", J, drawn(name))
    # 1e-12 is rounding in float64, and what the solvers stop at.
    trace = (J**2).sum(axis=(1, 2))
    assert (progress.min(axis=1) >= -1e-12 * trace)[well_posed(name)].all()


@pytest.mark.parametrize("name", those_that(lambda row: row.non_conflicting))
def test_non_conflicting_with_short_gradients(name):
    """A gradient that is short beside the others is not conflicted with either.

    The cosine can be told from rounding where the update is more than that.
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


@pytest.mark.parametrize("name", those_that(lambda row: row.linear))
def test_linear_under_scaling(name):
    J, mask = jacobians()
    c, d = np.random.default_rng(2).uniform(0.1, 3, size=(2, DRAWS, M, 1))
    together = later(name, (c + d) * J, mask)
    apart = later(name, c * J, mask) + later(name, d * J, mask)
    size = np.linalg.norm((c + d) * J, axis=(1, 2))
    error = np.linalg.norm(together - apart, axis=1) / size
    # GradVac's `eps` of 1e-8 is not scaled.
    assert error.max() <= (1e-7 if name == "gradvac" else 1e-11)


@pytest.mark.parametrize("name", those_that(lambda row: row.weighted))
def test_weighted(name):
    J, _ = jacobians()
    assert outside_of_span(J, drawn(name))[well_posed(name)].max() <= 1e-12


def outside_of_span(J, update):
    """How much of an update is no combination of rows, beside the larger of both [b].

    FairGrad's update is the longer, the shorter the gradients are.
    """
    units = J / lengths(J)[..., None]  # Of the same span, and better conditioned.
    inside = np.linalg.pinv(units, rcond=1e-10) @ units
    rest = update - np.einsum("bij,bj->bi", inside, update)
    size = np.maximum(np.linalg.norm(J, axis=(1, 2)), np.linalg.norm(update, axis=1))
    return np.linalg.norm(rest, axis=1) / np.where(size > 0, size, 1)


class Counterexample(NamedTuple):
    rows: list[list[float]]
    value: float
    before: list[list[float]] | None = None
    """The Jacobian of the step before, if it is no first step."""


def update_of(name, rows, before=None):
    """The first of a batch of equal ones."""
    rows = np.asarray(rows, float)
    m, n = rows.shape
    J, mask = np.zeros((BATCH, M, N)), np.zeros((BATCH, M), bool)
    mask[:, :m] = True
    step, state = compiled(name)
    if before is not None:
        J[:, :m, :n] = before
        state = step(jnp.asarray(J), jnp.asarray(mask), state)[1]
    J[:, :m, :n] = rows
    return np.asarray(step(jnp.asarray(J), jnp.asarray(mask), state)[0])[0, :n]


# The least cosine of the update with a gradient. No point is Pareto-stationary: there
# is an update that conflicts with nobody.
CONFLICTS = {
    "aligned_mtl": Counterexample([[0, -1], [1, 3]], -0.1961),
    "cagrad": Counterexample([[0, -1], [1, 3]], -0.6615),
    "conflict_free": Counterexample(
        [[-3, 2, -3], [-1, -2, 1], [-3, 3, 2], [2, -2, 1]], -0.1334
    ),
    "constant": Counterexample([[-1, 0], [2, -1]], -0.8321),
    "cr_mogm": Counterexample([[1, 2], [0, -1]], -0.6459, [[-2, 0], [-2, -1]]),
    "excess_mtl": Counterexample([[1, 2], [0, -1]], -0.8813),
    "graddrop": Counterexample([[1, 1], [0, -1]], -0.7071),
    "gradvac": Counterexample([[-1, 0, 1], [1, -2, -3], [1, 1, -1]], -0.5941),
    "imtl_g": Counterexample([[-2, -6], [1, -4], [-1, 1]], -0.224),
    "krum": Counterexample([[0, -1], [1, -1], [2, 3], [0, -1]], -0.8321),
    "mean": Counterexample([[1, 2], [0, -1]], -0.7071),
    "modo": Counterexample([[1, 2], [0, -1]], -0.4472),
    "pcd": Counterexample([[1, 0], [-40, 1]], -0.6051),
    "pcgrad": Counterexample([[-1, 0, -9], [-7, -1, 3], [5, 3, 2]], -0.224),
    "random": Counterexample([[0, 1], [1, -1]], -0.6854),
    "sdmgrad": Counterexample([[-1, -1], [1, 0]], -0.6562),
    "sum": Counterexample([[1, 2], [0, -1]], -0.7071),
    "trimmed_mean": Counterexample([[0, 1], [-1, -2], [0, 1]], -0.8944),
}
# The norm of A((I + C) J) - A(J) - A(C J) beside that of A((I + C) J), where C is
# diag(3, 1, ..., 1).
NOT_LINEAR = {
    "aligned_mtl": Counterexample([[0, -1], [2, 0]], 0.25),
    "cagrad": Counterexample([[0, 1], [1, -1]], 0.2339),
    "dualproj": Counterexample([[0, 1], [1, -1]], 0.25),
    "excess_mtl": Counterexample([[0, 1], [1, 0]], 0.1525),
    "fairgrad": Counterexample([[0, 1], [1, 0]], 1.587),
    "graddrop": Counterexample([[-1, 0], [2, -1]], 1.118),
    "imtl_g": Counterexample([[1, 2], [2, 8], [1, 0]], 0.1214),
    "krum": Counterexample([[1, 0], [2, 0], [4, 0], [8, 0], [16, 0]], 0.25),
    "mgda": Counterexample([[0, 1], [1, 0]], 0.1118),
    "modo": Counterexample([[0, 1], [1, 0]], 0.4031),
    "nash_mtl": Counterexample([[0, 1], [1, 0]], 1.0),
    "pcd": Counterexample([[1, 0], [-40, 1]], 0.0635, [[1, 0], [-40, 1]]),
    "sdmgrad": Counterexample([[2, -3], [-1, 1]], 4.138),
    "trimmed_mean": Counterexample([[0, 1], [0, 2], [-2, 0]], 0.25),
}
# The part of the update outside of the span of the rows.
NOT_WEIGHTED = {
    "graddrop": Counterexample([[-3, -1, -1], [0, 2, -1], [2, 2, 0]], 0.2274),
    "trimmed_mean": Counterexample([[2, 3, 0], [-2, 2, -2], [-3, -2, -1]], 0.2704),
}
# The norm of A(J Q) - A(J) Q beside that of A(J), where Q turns by 45 degrees.
NOT_ROTATED = {
    "excess_mtl": Counterexample([[-1, 2], [0, -3]], 2.1953),
    "graddrop": Counterexample([[-1, -2], [0, 1]], 1.5811),
    "trimmed_mean": Counterexample([[0, 1], [0, 2], [-2, 0]], 0.7071),
}


def test_whatever_is_denied_has_a_counterexample():
    assert set(CONFLICTS) == set(those_that(lambda row: not row.non_conflicting))
    assert set(NOT_LINEAR) == set(those_that(lambda row: not row.linear))
    assert set(NOT_WEIGHTED) == set(those_that(lambda row: not row.weighted))
    assert set(NOT_ROTATED) == OF_COORDINATES


@pytest.mark.parametrize("name", CONFLICTS)
def test_conflicts(name):
    rows, value, before = CONFLICTS[name]
    units = np.asarray(rows) / lengths(np.asarray(rows))[:, None]
    assert distance_of_hull(units) > 0.01
    update = update_of(name, rows, before)
    cosine = (units @ update).min() / np.linalg.norm(update)
    assert_allclose(cosine, value, atol=1e-4)
    assert cosine < -0.1


@pytest.mark.parametrize("name", NOT_LINEAR)
def test_not_linear_under_scaling(name):
    rows, value, before = NOT_LINEAR[name]
    scales = np.array([3, 1, 1, 1, 1])[: len(rows), None]
    together = update_of(name, (1 + scales) * rows, before)
    apart = update_of(name, rows, before) + update_of(name, scales * rows, before)
    error = np.linalg.norm(together - apart) / np.linalg.norm(together)
    assert_allclose(error, value, atol=1e-4)
    assert error > 0.05


@pytest.mark.parametrize("name", NOT_WEIGHTED)
def test_not_weighted(name):
    rows, value, _ = NOT_WEIGHTED[name]
    update = update_of(name, rows)
    w = np.linalg.lstsq(np.asarray(rows, float).T, update, rcond=1e-10)[0]
    rest = np.linalg.norm(update - w @ rows) / np.linalg.norm(update)
    assert_allclose(rest, value, atol=1e-4)
    assert rest > 0.1


@pytest.mark.parametrize("name", NOT_ROTATED)
def test_the_coordinates_matter(name):
    rows, value, _ = NOT_ROTATED[name]
    rotation = np.array([[1, -1], [1, 1]]) / np.sqrt(2)
    update = update_of(name, rows)
    turned = update_of(name, rows @ rotation)
    error = np.linalg.norm(turned - update @ rotation) / np.linalg.norm(update)
    assert_allclose(error, value, atol=1e-4)
    assert error > 0.1


@pytest.mark.parametrize("name", sorted(set(PROPERTIES) - OF_COORDINATES))
def test_the_coordinates_do_not_matter(name):
    """To whatever knows the Gramian only."""
    J, mask = (arrays[:BATCH] for arrays in jacobians())
    rotation = np.linalg.qr(np.random.default_rng(3).normal(size=(N, N)))[0]
    error = first(name, J @ rotation, mask) - first(name, J, mask) @ rotation
    error = np.linalg.norm(error, axis=1) / np.linalg.norm(J, axis=(1, 2))
    # GradVac and PCD divide by what rounding leaves of zero, plus 1e-8.
    assert error[well_posed(name)[:BATCH]].max() <= 1e-7


@pytest.mark.parametrize("name", sorted(set(PROPERTIES) - ORDERED))
def test_the_order_of_the_losses_does_not_matter(name):
    """To the update of a first step."""
    J, mask = (arrays[:BATCH] for arrays in jacobians())
    order = np.random.default_rng(4).permuted(np.tile(np.arange(M), (BATCH, 1)), axis=1)
    permuted = np.take_along_axis(J, order[..., None], 1)
    error = first(name, permuted, np.take_along_axis(mask, order, 1))
    error = np.linalg.norm(error - first(name, J, mask), axis=1)
    error /= np.linalg.norm(J, axis=(1, 2))
    comparable = well_posed(name)[:BATCH]
    if name == "krum":
        # Of fewer gradients each has one neighbour: the two that are nearest tie.
        comparable = mask.all(axis=1)
    assert error[comparable].max() <= 1e-7


@functools.cache
def stationary_jacobians(strongly):
    """Five gradients [b, M, N] with 0 = J^T w for some w > 0, if `strongly`.

    Otherwise of three of them; the other two have positive products with a direction
    that is orthogonal to these: along it two losses decrease and none increases, which
    cannot be where 0 = J^T w with w > 0.
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


@pytest.mark.parametrize("name", sorted(set(PROPERTIES) - BARGAINING))
def test_strongly_stationary(name):
    """No loss can decrease unless another increases."""
    zero = zero_updates(name, strongly=True)
    if name in ZERO_AT_STATIONARY | ZERO_AT_STRONGLY_STATIONARY:
        assert zero.all()
    else:
        assert not zero.any()


@pytest.mark.parametrize("name", PROPERTIES)
def test_weakly_stationary(name):
    """Not all losses can decrease, but some can."""
    zero = zero_updates(name, strongly=False)
    if name in ZERO_AT_STATIONARY:
        assert zero.all()
    elif name == "cagrad":
        # Where its ball has a step that conflicts with nobody: no better one exists.
        assert 0 < zero.sum() < len(zero)
    else:
        assert not zero.any()


def rows_of_page():
    """The cells of each row by the name of the aggregator."""
    section = PAGE.read_text().split("\n## ")[0]
    lines = re.findall(r"^\| `(\w+)` \|(.*)\|$", section, re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in lines}


def test_the_page_has_the_same_properties():
    rows = rows_of_page()
    assert list(rows) == sorted(PROPERTIES)
    marks = {name: [cell[0] for cell in cells[4:7]] for name, cells in rows.items()}
    assert {mark for three in marks.values() for mark in three} == {"✓", "\u2013"}
    assert {
        name: Properties(*(mark == "✓" for mark in three))
        for name, three in marks.items()
    } == PROPERTIES


@pytest.mark.parametrize("name", PROPERTIES)
def test_the_page_has_parameters_and_references(name):
    cells = rows_of_page()[name]
    parameters = []
    for parameter in inspect.signature(getattr(jaxjd, name)).parameters.values():
        default = parameter.default
        if default is parameter.empty:
            parameters.append(f"`{parameter.name}`")
        else:
            default = default.__name__ if callable(default) else repr(default)
            parameters.append(f"`{parameter.name}={default}`")
    assert cells[3] == ", ".join(parameters)
    documentation = getattr(jaxjd, name).__doc__
    assert ("**Reference:**" in documentation) == bool(cells[-1])
    for number in re.findall(r"arxiv.org/abs/([\d.]+)", cells[-1]):
        assert f"arXiv:{number}" in documentation
    for author, year in re.findall(r"\[(\S+).*?\((\d+)\)\]", cells[-1]):
        assert re.search(rf"{author}[^(]*\({year}\)", documentation)
