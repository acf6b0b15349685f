"""The page is right about gradients that are NaN, zero, opposed and so on.

`WORDS` has a check for each word of the registry. It must hold for a few random
Jacobians of each kind, in float32, in a first step.
"""

import functools
import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from tests.weighting import registry, test_weightings
from tests.weighting.registry import AGGREGATORS, KINDS, OF_ROWS, WEIGHTINGS
from tests.weighting.test_weightings import M, gramian, weigh

N = 12
SEEDS = range(8)
PAGE = pathlib.Path(__file__).parents[2] / "docs" / "aggregators.md"
NOT_FINITE = KINDS[0]


def section():
    return PAGE.read_text().split("\n## Unusual gradients\n")[1].split("\n## ")[0]


def words_of(row):
    """The words for each kind of gradients, without footnotes."""
    cells = [cell.strip(" \u2076\u2077").split(", ") for cell in row.unusual.split("|")]
    return dict(zip(KINDS, cells, strict=True))


TABLE = {name: words_of(row) for name, row in AGGREGATORS.items()}
every = pytest.mark.parametrize("name", TABLE)


def jacobian(kind, seed):
    """Six gradients of this kind in 12 dimensions."""
    J = np.random.default_rng(seed).normal(size=(M, N))
    if kind == "one is zero":
        J[2] = 0
    elif kind == "all are zero":
        J[:] = 0
    elif kind == "two are equal":
        J[2] = J[0]
    elif kind == "all are equal":
        J[:] = J[0]
    elif kind == "two are opposed":
        J[2] = -J[0]
    else:
        assert kind == "norms from 1e-6 to 1e6"
        J *= 10.0 ** np.linspace(-6, 6, M)[:, None]
    return J.astype(np.float32)


class Outcome(NamedTuple):
    """The result of a first step."""

    update: np.ndarray
    """[N]"""
    weights: Any
    """[M] of floats, or None for an aggregator without weights."""
    state: Any


@functools.cache
def compiled(name: str) -> Any:
    tx = registry.transformation(name, M)
    return jax.jit(
        lambda J, mask: tx.update(J, tx.init(jnp.zeros(N)), jnp.zeros(N), mask=mask)
    )


def step(name, J, mask=None):
    mask = np.ones(M, bool) if mask is None else mask
    if name in OF_ROWS:
        update, state = compiled(name)(J, mask)
        weights = None
        if name == "excess_mtl":
            weights = np.exp(np.asarray(state.log_weights, float))
        return Outcome(np.asarray(update, float), weights, state)
    init, update, _ = test_weightings.compiled(name)
    weights, state = update(J @ J.T, init(), mask)
    weights = np.asarray(weights, float)
    return Outcome(weights @ J.astype(float), weights, state)


@functools.cache
def averaged(name: str) -> Any:
    (inner,) = AGGREGATORS[name].arguments(M)
    return jax.jit(inner)


class Case(NamedTuple):
    """The inputs and results that a word describes."""

    name: str
    kind: str
    J: np.ndarray
    """[M, N] of float32."""
    update: np.ndarray
    weights: Any

    @property
    def norms(self):
        return np.linalg.norm(self.J.astype(float), axis=1)

    @property
    def projections(self):
        """The projections of the update onto the nonzero gradients."""
        norms = self.norms
        return (self.J @ self.update)[norms > 0] / norms[norms > 0]

    @property
    def largest(self):
        return np.abs(self.J).max()


def weights_are(*expected):
    return lambda case: assert_allclose(case.weights, expected, rtol=1e-5, atol=1e-6)


def mean(case):
    if case.weights is None:
        expected = case.J.mean(axis=0)
        assert_allclose(case.update, expected, atol=1e-6 * case.largest)
    else:
        weights_are(*[1 / M] * M)(case)


def sum_(case):
    if case.weights is None:
        assert_allclose(case.update, case.J.sum(axis=0), atol=1e-5 * case.largest)
    else:
        weights_are(*[1] * M)(case)


def longer_mean(case):
    """CAGrad moves as far from the mean as its ball allows: half the mean's norm."""
    assert_allclose(case.weights.sum(), 1.5, rtol=1e-5)
    assert_allclose(case.update, 1.5 * case.J.mean(axis=0), atol=1e-5 * case.largest)


def first(case):
    chosen = {"krum": [0.5, 0.5], "pcd": [1]}[case.name]
    weights_are(*chosen, *[0] * (M - len(chosen)))(case)


def convex(case):
    assert_allclose(case.weights.sum(), 1, rtol=1e-5)
    assert (case.weights >= 0).all()


def nonnegative(case):
    assert (case.weights >= 0).all()


def positive(case):
    assert (case.weights > 0).all()


def at_least_one(case):
    assert (case.weights >= 1).all()


def alike(case):
    positive(case)
    assert_allclose(case.weights, case.weights[0], rtol=1e-4)


def zero(case):
    """The update is zero relative to the gradients that it combines."""
    made_of = 0 if case.weights is None else np.abs(case.weights) @ case.norms
    assert np.linalg.norm(case.update) <= 1e-5 * made_of


def no_conflict(case):
    assert np.linalg.norm(case.update) > 0
    # In float32 the entries of G are only known to 1e-7 of the longest gradient.
    assert (case.projections >= -1e-5 * np.linalg.norm(case.update)).all()


def mean_decreases(case):
    assert case.J.mean(axis=0) @ case.update > 0


def equal_projections(case):
    assert np.linalg.norm(case.update) > 0
    others = np.ones(M, bool)[case.norms > 0]
    if case.kind == "two are opposed":
        others[[0, 2]] = False
        largest = np.abs(case.projections).max()
        assert_allclose(case.projections[~others], 0, atol=1e-4 * largest)
    projections = case.projections[others]
    assert_allclose(projections, projections.mean(), rtol=1e-3)


def secondary(case):
    progress = (case.J @ case.update)[1:]
    assert (progress[case.norms[1:] > 0] > 0).all()


def same_direction(case, J):
    """The direction is the same as with the gradients J without the third one."""
    without = step(case.name, J, np.arange(M) != 2).update
    lengths = np.linalg.norm([case.update, without], axis=1)
    assert (lengths > 0).all()
    assert_allclose(case.update / lengths[0], without / lengths[1], atol=1e-4)


def as_without_one(case):
    same_direction(case, case.J)


def as_twice_one(case):
    doubled = case.J.copy()
    doubled[0] *= 2
    same_direction(case, doubled)


def longest(case):
    cosine = case.projections[case.norms.argmax()] / np.linalg.norm(case.update)
    assert cosine > np.cos(np.radians(15))


def short(case):
    assert np.linalg.norm(case.update) <= 1.00001 * case.norms.min()


def one_sign(case):
    positive = np.maximum(case.J, 0).sum(axis=0)
    negative = np.minimum(case.J, 0).sum(axis=0)
    kept = np.where(case.update > 0, positive, negative)
    assert_allclose(case.update, kept, atol=1e-5 * case.largest)


def signs(case):
    """Of the direction, which is divided by its own size in a first step."""
    assert_allclose(np.abs(case.update), 1, atol=1e-2)


def between(case):
    """The largest and the smallest entry are trimmed, since `num_trimmed` is 1."""
    ordered = np.sort(case.J, axis=0)
    slack = 1e-6 * np.abs(ordered).max(axis=0)
    assert (case.update >= ordered[1] - slack).all()
    assert (case.update <= ordered[-2] + slack).all()


def fixed(case):
    assert_array_equal(case.weights, weigh(case.name, gramian()))


def as_the_other(case):
    """The weights are those of the averaged weighting, UPGrad in the registry."""
    expected = averaged(case.name)(jnp.asarray(case.J @ case.J.T))
    assert_allclose(case.weights, expected, rtol=1e-5, atol=1e-6)


WORDS: dict[str, Callable[[Case], None]] = {
    "mean": mean,
    "sum": sum_,
    "(1 + c) mean": longer_mean,
    "none": weights_are(*[0] * M),
    "first": first,
    "fixed": fixed,
    "as the other": as_the_other,
    "alike": alike,
    "convex": convex,
    "nonnegative": nonnegative,
    "positive": positive,
    "at least 1": at_least_one,
    "zero": zero,
    "no conflict": no_conflict,
    "mean decreases": mean_decreases,
    "equal projections": equal_projections,
    "secondary": secondary,
    "left out": as_without_one,
    "as one": as_without_one,
    "as twice one": as_twice_one,
    "longest": longest,
    "short": short,
    "one sign": one_sign,
    "signs": signs,
    "between": between,
}


def test_every_aggregator_and_every_word():
    """The page has the rows of the registry, and explains their words."""
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", section(), re.M))
    assert rows == {name: row.unusual for name, row in AGGREGATORS.items()}
    used = {word for row in TABLE.values() for words in row.values() for word in words}
    explained = re.findall(r"^- `(.+?)`", section(), re.MULTILINE)
    assert len(explained) == len(set(explained))
    assert set(explained) == used == {*WORDS, "NaN", "there", "trimmed", "blind"}


@every
def test_unusual_gradients(name):
    for kind, words in TABLE[name].items():
        if kind == NOT_FINITE:
            continue
        for seed in SEEDS:
            J = jacobian(kind, seed)
            update, weights, _ = step(name, J)
            assert np.isfinite(update).all(), kind
            if weights is not None:
                slack = 1e-5 * np.abs(J).max()
                assert_allclose(weights @ J, update, atol=slack)
            for word in words:
                WORDS[word](Case(name, kind, J, update, weights))


def same(state, other):
    return jax.tree.all(jax.tree.map(lambda x, y: (x == y).all(), state, other))


def spoilt_gramians():
    """Put a NaN or an infinity on the diagonal, beside it, or in a whole row."""
    one = gramian()
    for value in (np.nan, np.inf):
        for place in [(1, 1), (2, 3), (1, slice(None))]:
            yield one.at[place].set(value).at[place[::-1]].set(value)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_a_gramian_that_is_not_finite(name):
    """The weights are NaN and the state stays as it was, except for blind weights."""
    (word,) = TABLE[name][NOT_FINITE]
    init, update, _ = test_weightings.compiled(name)
    one, mask = gramian(), jnp.ones(M, bool)
    for spoilt in spoilt_gramians():
        weights, state = update(spoilt, init(), mask)
        if word == "blind":
            assert_array_equal(weights, weigh(name, one))
            continue
        assert word == "NaN"
        assert jnp.isnan(weights).all()
        assert same(state, init())
        weights, _ = update(one, state, mask)
        assert_array_equal(weights, weigh(name, one))


@pytest.mark.parametrize("name", OF_ROWS)
def test_rows_that_are_not_finite(name):
    words = TABLE[name][NOT_FINITE]
    J = np.random.default_rng(0).normal(size=(M, N)).astype(np.float32)
    expected = step(name, J).update
    for value in (np.nan, np.inf, -np.inf):
        spoilt = J.copy()
        spoilt[1, 3] = value
        update, _, state = step(name, spoilt)
        if "NaN" in words:
            assert np.isnan(update).all()
            assert same(state, registry.transformation(name, M).init(jnp.zeros(N)))
            continue
        assert "there" in words
        elsewhere = np.arange(N) != 3
        assert_array_equal(update[elsewhere], expected[elsewhere])
        if np.isinf(value) and "trimmed" in words:
            others = np.delete(J[:, 3], 1)
            assert others.min() <= update[3] <= others.max()
        else:
            assert np.isnan(update[3])


def test_the_footnotes():
    """With a zero gradient, CAGrad's weights can be nonzero and PCD's can be zero."""
    J = np.zeros((M, N), np.float32)
    J[1:, 0] = [1, -1, -1, -1, -1]
    # Every step in the ball conflicts with the second gradient. CAGrad takes the best.
    assert_allclose(step("cagrad", J).update, J.mean(axis=0) / 2, rtol=1e-4)
    J = jacobian("one is zero", 0)
    assert_array_equal(step("pcd", J[[2, 0, 1, 3, 4, 5]]).weights, 0)
