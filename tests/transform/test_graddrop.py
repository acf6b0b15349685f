"""GradDrop chooses the signs that its authors choose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import jaxjd
from jaxjd.transform._as_jacobian import as_jacobian
from jaxjd.transform._graddrop import drop_signs
from tests import models

pytestmark = pytest.mark.usefixtures("x64")
LEAK = (0.0, 0.3, 1.0, 0.8)


@pytest.fixture
def params():
    return models.parameters()


def update(tx, updates, params, **extra):
    return tx.update(updates, tx.init(params), params, **extra)[0]


def rows(m=4, n=40, key=0):
    return jax.random.normal(jax.random.key(key), (m, n), jnp.float64)


def dropped(rows, uniforms, leak=None, **how):
    jacobian = as_jacobian(rows, jnp.zeros(rows.shape[1:], rows.dtype))
    return drop_signs(jacobian, uniforms, leak, **how)


def test_a_function_of_the_purity():
    """A function of the purities, 3/4 and 1/4, decides which signs are kept."""
    one = jnp.array([[3.0, -3.0], [-1.0, 1.0]])
    half = jnp.full(2, 0.5)
    assert_array_equal(dropped(one, half), [3.0, -3.0])
    assert_array_equal(
        dropped(one, half, keep_probability=lambda p: 1 - p), [-1.0, 1.0]
    )
    assert_array_equal(
        dropped(one, half, keep_probability=lambda p: p**3), [-1.0, -3.0]
    )


def test_a_coordinate_without_gradient_stays_where_it_is():
    one = rows().at[:, 3].set(0)
    assert jnp.isfinite(dropped(one, jnp.zeros(40))).all()
    assert dropped(one, jnp.zeros(40))[3] == 0
    assert not dropped(jnp.zeros((3, 5)), jnp.zeros(5), jnp.ones(3)).any()


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_what_is_not_finite_gives_nan_where_it_is(bad):
    for leak in (None, jnp.asarray(LEAK)):
        actual = dropped(rows().at[1, 3].set(bad), jnp.full(40, 0.5), leak)
        assert_array_equal(jnp.isnan(actual), jnp.arange(40) == 3)


def test_signs_that_agree_are_kept():
    """Nothing is dropped with a single loss, or if all losses agree in sign."""
    tx = jaxjd.graddrop()
    one = rows(1)
    assert_allclose(update(tx, one, one[0]), one[0], rtol=1e-12)
    agree = jnp.abs(rows()) * jnp.sign(one)
    assert_allclose(update(tx, agree, one[0]), agree.sum(0), rtol=1e-12)


def test_drops_as_often_as_the_purity_says():
    """With purity 0.75, three quarters of 40,000 coordinates are positive."""
    one = jnp.repeat(jnp.array([[3.0], [-1.0]]), 40_000, axis=1)
    actual = update(jaxjd.graddrop(key=3), one, one[0])
    assert set(np.unique(actual)) == {-1.0, 3.0}
    # The tolerance is five standard deviations of the mean.
    assert_allclose((actual > 0).mean(), 0.75, atol=5 * (0.75 * 0.25 / 40_000) ** 0.5)


def test_the_same_from_every_engine(params):
    """The update does not depend on the blocks in which the rows come."""
    x, y = models.examples(4)
    mask = jnp.array([True, True, False, True])
    how = [
        {"method": "dense"},
        {"method": "structured"},
        {"method": "chunked", "chunk_size": 5},
    ]
    tx = jaxjd.graddrop([*LEAK, *LEAK, *LEAK])
    losses = models.task_losses  # Their order differs from the engine's.

    @jax.jit
    def together(x, y, mask):
        return [
            update(
                tx,
                jaxjd.jac(losses, in_axes=(None, 0, 0), **one)(params, x, y),
                params,
                mask=mask,
            )
            for one in how
        ]

    first, *others = together(x, y, jnp.tile(mask, 3))
    assert jnp.abs(models.ravel(first)).min() > 0
    for other in others:
        assert_allclose(models.ravel(other), models.ravel(first), rtol=1e-10)


def test_missing_losses():
    """Masked losses do not count, even with NaN gradients."""
    one = rows()
    bad = one.at[2].set(jnp.nan)
    leak = jnp.asarray(LEAK)
    kept = jnp.array([0, 1, 3])
    tx, sub = jaxjd.graddrop(leak, key=1), jaxjd.graddrop(leak[kept], key=1)
    actual = update(tx, bad, one[0], mask=jnp.array([True, True, False, True]))
    assert_allclose(actual, update(sub, one[kept], one[0]), rtol=1e-12)
    assert not update(tx, one, one[0], mask=jnp.zeros(4, bool)).any()


def test_the_state_carries_the_key():
    one = rows()
    tx = jaxjd.graddrop(key=5)
    traces = []

    @jax.jit
    def step(state, _):
        traces.append(state)
        result, state = tx.update(one, state, one[0], value=1.0)
        return state, result

    state, first = step(tx.init(one[0]), None)
    _, second = step(state, None)
    assert len(traces) == 1
    assert (first != second).any()
    _, scanned = jax.lax.scan(step, tx.init(one[0]), None, length=2)
    assert_allclose(scanned, jnp.stack([first, second]), rtol=1e-12)


def test_seeds_and_keys():
    def data(key):
        return jax.random.key_data(jaxjd.graddrop(key=key).init(None).key)

    for key in (5, np.int64(5), jax.random.key(5), jax.random.PRNGKey(5)):
        assert_array_equal(data(key), jax.random.key_data(jax.random.key(5)))
    assert (data(6) != data(5)).any()


def test_vmap():
    tx = jaxjd.graddrop(LEAK)
    several = jnp.stack([rows(key=1), rows(key=2)])
    together = jax.vmap(lambda one: update(tx, one, several[0, 0]))(several)
    alone = jnp.stack([update(tx, one, one[0]) for one in several])
    assert_allclose(together, alone, rtol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtypes(dtype):
    one = rows().astype(dtype)
    tx = jaxjd.graddrop(np.float32(LEAK))
    actual = jax.jit(lambda one: update(tx, one, one[0]))(one)
    assert actual.dtype == dtype
    assert jnp.isfinite(actual).all()


def test_partition(params):
    """One group of parameters uses GradDrop, the other the sum."""
    groups = {"a": jaxjd.graddrop(), "b": jaxjd.sum()}
    tx = jaxjd.partition(groups, {"hidden": "a", "scale": "b"})

    @jax.jit
    def updates(x, y):
        jac = jaxjd.jac(models.loss, in_axes=(None, 0, 0))(params, x, y)
        only = jac.restrict({"hidden": True, "scale": False})
        alone = update(jaxjd.graddrop(), only, params)
        return update(tx, jac, params), alone, update(jaxjd.sum(), jac, params)

    both, alone, total = updates(*models.examples(4))
    assert_allclose(both["scale"], total["scale"], rtol=1e-12)
    assert_allclose(
        models.ravel(both["hidden"]), models.ravel(alone["hidden"]), rtol=1e-12
    )
    assert (models.ravel(both["hidden"]) != models.ravel(total["hidden"])).any()


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"leak": [0.5, 1.5]}, ValueError, r"`leak` must be in \[0, 1\]. Got .*1.5"),
        ({"leak": [-0.5]}, ValueError, "`leak` must not be negative"),
        ({"leak": 0.5}, ValueError, r"`leak` must be a vector, \[m\]"),
        ({"key": 0.5}, TypeError, "`key` must be an integer .*random. Got 0.5"),
        ({"key": np.zeros(2)}, TypeError, "`key` must be an integer seed"),
    ],
)
def test_bad_arguments(how, error, message):
    with pytest.raises(error, match=message):
        jaxjd.graddrop(**how)


def test_bad_updates():
    with pytest.raises(ValueError, match="`leak` must have one entry .* 4 .*Got 2"):
        update(jaxjd.graddrop([0.5, 0.5]), rows(), rows()[0])
    with pytest.raises(ValueError, match="an ordinary gradient"):
        update(jaxjd.graddrop(), rows(), rows())
    with pytest.raises(ValueError, match="`mask` must have one entry .* the 4"):
        update(jaxjd.graddrop(), rows(), rows()[0], mask=jnp.ones(3, bool))
