"""Does the trimmed mean leave out what it should?"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import jaxjd
from jaxjd.transform._trimmed_mean import MAX_PASSES
from tests import models

pytestmark = pytest.mark.usefixtures("x64")


def update(tx, updates, params, **extra):
    return tx.update(updates, tx.init(params), params, **extra)[0]


def trimmed(num_trimmed, rows, **extra):
    return update(jaxjd.trimmed_mean(num_trimmed), rows, rows[0], **extra)


def rows(m=7, n=30, key=0):
    return jax.random.normal(jax.random.key(key), (m, n), jnp.float64)


def test_values():
    one = jnp.array([[1.0], [100.0], [2.0], [-50.0], [6.0]])
    assert_array_equal(trimmed(2, one), [2.0])
    assert_array_equal(trimmed(1, one), [3.0])
    assert_array_equal(trimmed(0, one[:1]), [1.0])
    assert not trimmed(2, jnp.zeros((5, 3))).any()


@pytest.mark.parametrize("num_trimmed", [0, 1, 3, MAX_PASSES + 1])
def test_entries_that_are_equal(num_trimmed):
    """With few distinct values, some infinite, most dropped entries are tied."""
    values = np.array([-np.inf, -1.0, -0.0, 0.0, 2.0, np.inf])
    chances = [0.03, 0.3, 0.1, 0.3, 0.24, 0.03]
    one = jnp.asarray(np.random.default_rng(0).choice(values, (31, 200), p=chances))
    ordered = np.sort(one, axis=0)
    with np.errstate(invalid="ignore"):  # The mean of inf and -inf.
        expected = ordered[num_trimmed : 31 - num_trimmed].mean(0)
    assert np.isfinite(expected).any()
    assert (not np.isfinite(expected).all()) == (num_trimmed <= 3)
    assert_allclose(trimmed(num_trimmed, one), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("num_trimmed", [2, MAX_PASSES + 1])
def test_derivative(num_trimmed):
    """All kept entries of a coordinate have the same derivative, the others zero."""
    one = rows(m=29)
    gradient = jax.grad(lambda one: trimmed(num_trimmed, one).sum())(one)
    ranks = np.argsort(np.argsort(one, axis=0), axis=0)
    kept = (num_trimmed <= ranks) & (ranks < 29 - num_trimmed)
    assert_allclose(gradient, kept / (29 - 2 * num_trimmed), rtol=1e-12)


def test_corrupted_losses_move_nothing_out_of_the_range_of_the_others():
    one = rows()
    bad = one.at[0].set(1e30).at[3].set(-jnp.inf)
    others = bad[jnp.array([1, 2, 4, 5, 6])]
    actual = trimmed(2, bad)
    assert (actual >= others.min(0)).all()
    assert (actual <= others.max(0)).all()


@pytest.mark.parametrize("num_trimmed", [2, MAX_PASSES + 1])
def test_nan_gives_nan_where_it_is(num_trimmed):
    """This includes coordinates in which all entries, or all but one, are NaN."""
    m = 2 * MAX_PASSES + 3
    bad = rows(m).at[1, 3].set(jnp.nan).at[:, 5].set(jnp.nan).at[1:, 7].set(jnp.nan)
    actual = trimmed(num_trimmed, bad)
    assert_array_equal(jnp.isnan(actual), np.isin(np.arange(30), [3, 5, 7]))


def test_missing_losses():
    """Masked losses do not count, even NaN, and one compilation serves every mask."""
    one = rows()
    traces = []

    @jax.jit
    def masked(one, mask):
        traces.append(mask)
        return trimmed(2, one, mask=mask)

    for kept in ([0, 1, 2, 3, 4, 5, 6], [0, 2, 3, 4, 5, 6], [0, 2, 3, 4, 6]):
        mask = jnp.zeros(7, bool).at[jnp.array(kept)].set(True)
        bad = jnp.where(mask[:, None], one, jnp.nan)
        assert_allclose(masked(bad, mask), trimmed(2, one[mask]), rtol=1e-12)
    # With at most 2 * 2 losses, the update is the median. Without losses, it is zero.
    for count in (1, 2, 3, 4):
        median = np.median(one[:count], axis=0)
        assert_allclose(masked(one, jnp.arange(7) < count), median, rtol=1e-12)
    assert_array_equal(masked(one, jnp.zeros(7, bool)), jnp.zeros(30))
    assert len(traces) == 1


def test_the_same_from_every_engine():
    """Every method gives the same update, also for one group of a partition."""
    params = models.parameters()
    tx = jaxjd.trimmed_mean(2)
    labels = {"hidden": "a", "scale": "b"}
    split = jaxjd.partition({"a": tx, "b": jaxjd.sum()}, labels)

    @jax.jit
    def every(x, y, mask):
        def jac(**how):
            losses = models.task_losses  # Their order differs from the engine's.
            return jaxjd.jac(losses, in_axes=(None, 0, 0), **how)(params, x, y)

        dense = jac(method="dense")
        results = [
            update(tx, one, params, mask=mask)
            for one in (dense, jac(), jac(method="chunked", chunk_size=2))
        ]
        return dense.dense(), results, update(split, dense, params, mask=mask)

    mask = jnp.arange(12) != 1
    dense, results, parted = every(*models.examples(4), mask)
    ordered = np.sort(models.ravel_rows(dense)[mask], axis=0)
    for result in results:
        assert_allclose(models.ravel(result), ordered[2:-2].mean(0), rtol=1e-10)
    hidden = models.ravel(results[0]["hidden"])
    assert_allclose(models.ravel(parted["hidden"]), hidden, rtol=1e-12)
    assert_allclose(parted["scale"], dense["scale"][mask].sum(), rtol=1e-12)


def test_vmap_and_scan():
    several = jnp.stack([rows(key=1), rows(key=2)])
    expected = jnp.stack([trimmed(1, one) for one in several])
    together = jax.vmap(lambda one: trimmed(1, one))(several)
    assert_allclose(together, expected, rtol=1e-12)
    tx = jaxjd.trimmed_mean(1)

    def step(state, one):
        result, state = tx.update(one, state, one[0], value=1.0)
        return state, result

    assert_allclose(jax.lax.scan(step, tx.init(0.0), several)[1], expected, rtol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtypes(dtype):
    one = rows().astype(dtype)
    actual = trimmed(2, one)
    assert actual.dtype == dtype
    wide = trimmed(2, one.astype(jnp.float64))
    assert_allclose(
        actual.astype(jnp.float64), wide, rtol=jnp.finfo(dtype).eps, atol=1e-7
    )


@pytest.mark.parametrize(
    ("num_trimmed", "error", "message"),
    [
        (-1, ValueError, "`num_trimmed` must be at least 0. Got -1"),
        (1.0, TypeError, "`num_trimmed` must be an integer. Got 1.0"),
        (True, TypeError, "`num_trimmed` must be an integer"),
    ],
)
def test_bad_arguments(num_trimmed, error, message):
    with pytest.raises(error, match=message):
        jaxjd.trimmed_mean(num_trimmed)


def test_bad_updates():
    with pytest.raises(
        ValueError, match=r"at least one of the 7 losses, so be at most 3. Got 4"
    ):
        trimmed(4, rows())
    with pytest.raises(ValueError, match="an ordinary gradient"):
        update(jaxjd.trimmed_mean(1), rows(), rows())
    with pytest.raises(TypeError, match="`mask` must be of bools"):
        trimmed(1, rows(), mask=jnp.ones(7))
