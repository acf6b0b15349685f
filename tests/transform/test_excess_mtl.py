"""ExcessMTL weighs the losses as its authors do, and keeps its state clean."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import jaxjd
from tests import models

pytestmark = pytest.mark.usefixtures("x64")
STEPS, M, N = 20, 4, 30
TX = jaxjd.excess_mtl(num_losses=M)  # Shared, so that it is compiled once.


def batches(m=M, key=0):
    """Shrinking gradients of losses that differ in scale."""
    rows = jax.random.normal(jax.random.key(key), (STEPS, m, N), jnp.float64)
    decay = jnp.exp(-jnp.linspace(0.0, 2.0, STEPS))[:, None, None]
    return rows * decay * jnp.linspace(0.5, 2.0, m)[None, :, None]


def run(tx, several, masks=None):
    """Run all steps. Returns the final state and all updates."""
    if masks is None:
        masks = jnp.ones(several.shape[:2], bool)
    return compiled_run(tx, several, masks)


@functools.partial(jax.jit, static_argnums=0)
def compiled_run(tx, several, masks):
    params = several[0, 0]

    def step(state, batch):
        rows, mask = batch
        result, state = tx.update(rows, state, params, mask=mask, value=1.0)
        return state, result

    return jax.lax.scan(step, tx.init(params), (several, masks))


def test_warm_up():
    """The update is the mean during the warm-up only."""
    several = batches()
    tx = jaxjd.excess_mtl(num_losses=M, warmup_steps=4)
    state, actual = run(tx, several)
    assert_allclose(actual[:4], several[:4].mean(1), rtol=1e-12)
    assert not np.allclose(actual[4], several[4].mean(0), rtol=1e-2)
    assert state.steps == STEPS


def test_missing_losses():
    """A masked loss does not count, and its own state does not change."""
    several = batches()
    kept = jnp.array([0, 1, 3])
    masks = jnp.tile(jnp.arange(M) != 2, (STEPS, 1))
    tx = jaxjd.excess_mtl(num_losses=M, warmup_steps=2)
    state, actual = run(tx, several, masks)
    alone, expected = run(
        jaxjd.excess_mtl(num_losses=3, warmup_steps=2), several[:, kept]
    )
    assert_allclose(actual, expected, rtol=1e-11, atol=1e-13)
    assert_allclose(state.squares[kept], alone.squares, rtol=1e-12)
    weights = jnp.exp(state.log_weights)
    assert_allclose(weights[kept], 0.75 * jnp.exp(alone.log_weights), rtol=1e-11)
    assert_allclose(weights[2], 0.25, rtol=1e-12)
    assert not state.squares[2].any()
    assert state.risk_counts[2] == 0


def test_a_loss_that_comes_and_goes():
    """The state collects only the steps with the loss, and all stays finite."""
    several = batches()
    come = jnp.arange(STEPS) >= 5
    masks = jnp.ones((STEPS, M), bool).at[:, 1].set(come).at[12].set(False)
    state, actual = run(TX, several, masks)
    assert jnp.isfinite(actual).all()
    assert not actual[12].any()  # All losses are missing.
    assert_allclose(jnp.exp(state.log_weights).sum(), 1, rtol=1e-12)
    present = masks[:, :, None]
    squares = (jnp.where(present, several, 0) ** 2).sum(0)
    assert_allclose(state.squares, squares, rtol=1e-12)
    first = jnp.abs(several[5, 1]) ** 2 / jnp.sqrt(several[5, 1] ** 2 + 1e-7)
    assert_allclose(state.risk_sums[1], first.sum(), rtol=1e-12)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, 1e200])
def test_a_batch_that_is_not_finite_is_forgotten(bad):
    several = batches()
    state, actual = run(TX, several.at[7, 2, 5].set(bad))
    assert jnp.isnan(actual[7]).all()
    assert state.steps == STEPS - 1
    masks = jnp.ones((STEPS, M), bool).at[7].set(False)
    without, expected = run(TX, several, masks)
    rest = jnp.arange(STEPS) != 7
    assert_allclose(actual[rest], expected[rest], rtol=1e-12)
    for one, other in zip(state[1:], without[1:], strict=True):
        assert_allclose(one, other, rtol=1e-12)


def test_weights_that_vanish_return():
    """In float32 exp(-200) is 0, and a weight of 0 would stay 0."""
    large = jnp.full((STEPS, 2, 1), 0.1, jnp.float32).at[0, 0].set(200)
    large = large.at[1:, 1].set(
        jnp.exp(jnp.arange(1.0, STEPS, dtype=jnp.float32))[:, None]
    )
    _, updates = run(jaxjd.excess_mtl(num_losses=2), large)
    assert_allclose(updates[0], 200, rtol=1e-6)
    assert_allclose(updates[-1], large[-1, 1], rtol=1e-6)


def test_one_loss_and_no_gradient():
    several = batches(1)
    tx = jaxjd.excess_mtl(num_losses=1)
    assert_allclose(run(tx, several)[1], several[:, 0], rtol=1e-12)
    zeros = jnp.zeros((STEPS, M, N))
    state, updates = run(TX, zeros)
    assert not updates.any()
    assert_allclose(jnp.exp(state.log_weights), 0.25, rtol=1e-12)


def test_vmap():
    several = jnp.stack([batches(key=1), batches(key=2)])
    together = jax.vmap(lambda one: run(TX, one)[1])(several)
    assert_allclose(together[1], run(TX, several[1])[1], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtypes(dtype):
    several = batches().astype(dtype)
    state, updates = run(TX, several)
    assert updates.dtype == dtype
    assert state.squares.dtype == state.log_weights.dtype == jnp.float32
    assert jnp.isfinite(updates).all()


def test_the_same_from_every_engine():
    """Every method gives the same update, and a partition uses the group's rows."""
    params = models.parameters()
    tx = jaxjd.excess_mtl(num_losses=12)
    labels = {"hidden": "a", "scale": "b"}
    split = jaxjd.partition({"a": tx, "b": jaxjd.sum(), "c": tx}, labels)

    @jax.jit
    def every(x, y):
        def two_steps(tx, kept=None, **how):
            state = tx.init(params)
            for scale in (1.0, 2.0):
                jac = jaxjd.jac(models.task_losses, in_axes=(None, 0, 0), **how)
                jac = jac(params, scale * x, y)
                if kept is not None:
                    jac = jac.restrict(kept)
                updates, state = tx.update(jac, state, params)
            return updates

        results = [
            two_steps(tx, **how)
            for how in (
                {"method": "dense"},
                {"method": "structured"},
                {"method": "chunked", "chunk_size": 2},
            )
        ]
        return results, two_steps(split, method="dense")

    (dense, *others), parted = every(*models.examples(4))
    for other in others:
        # Entries near zero come from cancellation.
        assert_allclose(models.ravel(other), models.ravel(dense), rtol=1e-9, atol=1e-13)
    assert jnp.isfinite(models.ravel(parted)).all()
    # The weights differ, because they come from the group's own gradients.
    hidden = models.ravel(parted["hidden"]), models.ravel(dense["hidden"])
    assert not np.allclose(*hidden)


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"num_losses": 0}, ValueError, "`num_losses` must be at least 1. Got 0"),
        ({"num_losses": 2.0}, TypeError, "`num_losses` must be an integer"),
        (
            {"step_size": 0},
            ValueError,
            r"`step_size` must be in \(0, inf",
        ),
        ({"warmup_steps": -1}, ValueError, "`warmup_steps` must be at least 0"),
    ],
)
def test_bad_arguments(how, error, message):
    with pytest.raises(error, match=message):
        jaxjd.excess_mtl(**({"num_losses": 2} | how))


def test_bad_updates():
    tx = jaxjd.excess_mtl(num_losses=3)
    rows = jnp.ones((4, 5))
    with pytest.raises(ValueError, match="of num_losses=3 losses, .*Got 4"):
        tx.update(rows, tx.init(rows[0]), rows[0])
    with pytest.raises(ValueError, match=r"that `init` was given, \[\(7,\)\]. Got"):
        tx.update(rows[:3], tx.init(jnp.ones(7)), rows[0])
    with pytest.raises(ValueError, match="an ordinary gradient"):
        tx.update(rows, tx.init(rows), rows)


def test_state_of_the_right_size():
    params = models.parameters()
    state = jaxjd.excess_mtl(num_losses=3).init(params)
    shapes = jax.tree.map(lambda p: (3, *p.shape), params)
    assert jax.tree.map(lambda x: x.shape, state.squares) == shapes
    assert_array_equal(state.log_weights, jnp.full(3, -jnp.log(3.0)))
