"""Does `aggregate` take what it should, and refuse the rest?"""

import inspect
import pickle
import typing

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.flatten_util import ravel_pytree
from numpy.testing import assert_allclose, assert_array_equal
from optax.experimental import aggregating

import jaxjd
from tests import models

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture
def params():
    return models.parameters()


@pytest.fixture
def jac(params):
    return jaxjd.jac(models.loss, in_axes=(None, 0, 0))(params, *models.examples(4))


def update(tx, updates, params, **extra):
    return tx.update(updates, tx.init(params), params, **extra)[0]


def test_a_function_of_the_user(params, jac):
    tx = jaxjd.aggregate(lambda gramian: 1 / jnp.diag(gramian))
    rows = models.ravel_rows(jac.dense())
    expected = rows.T @ (1 / (rows**2).sum(1))
    assert_allclose(models.ravel(update(tx, jac, params)), expected, rtol=1e-12)


def test_a_weighting_with_state(params, jac):
    """The weighting's state is kept in the optimizer's state, and nowhere else."""

    def step(gramian, count, /, **extra_args):
        del extra_args
        weights = jnp.full(len(gramian), count, gramian.dtype)
        return weights, count + 1

    weighting = jaxjd.Weighting(lambda: jnp.array(1), step)
    with pytest.raises(TypeError, match="has a state and cannot simply be called"):
        weighting(jnp.eye(4))
    tx = jaxjd.aggregate(weighting)
    total = models.ravel_rows(jac.dense()).sum(0)
    state = tx.init(params)
    for count in (1, 2, 3):
        result, state = tx.update(jac, state, params)
        assert_allclose(models.ravel(result), count * total, rtol=1e-12)


def test_weights_of_some_parameters_for_all(params, jac):
    """Partial Jacobian descent: some parameters set the weights for all of them."""
    mask = {"hidden": True, "scale": False}
    expected = jac.vjp(jaxjd.weighting.upgrad()(jac.restrict(mask).gramian()))
    for wrt in (
        mask,
        lambda params: {"hidden": params["scale"].ndim == 0, "scale": False},
    ):
        tx = jaxjd.aggregate(jaxjd.weighting.upgrad(), wrt=wrt)
        actual = update(tx, jac, params)
        jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-12), actual, expected)


def test_one_loss_gives_its_gradient(params):
    x, y = models.examples()

    def mean(p):
        return models.batched(models.loss)(p, x, y).mean()

    gradient = models.ravel(jax.grad(mean)(params))
    for name in ("upgrad", "dualproj", "mean", "sum"):
        actual = update(getattr(jaxjd, name)(), jaxjd.jac(mean)(params), params)
        assert_allclose(models.ravel(actual), gradient, rtol=1e-12)


def test_zero_gradients_give_a_zero_update(params):
    zeros = jax.tree.map(lambda p: jnp.zeros((5, *p.shape)), params)
    for name in ("upgrad", "dualproj", "mean", "sum"):
        assert not models.ravel(update(getattr(jaxjd, name)(), zeros, params)).any()


def test_nan_in_a_loss_gives_nan(params):
    x, y = models.examples(4)
    jac = jaxjd.jac(models.loss, in_axes=(None, 0, 0))(
        params, x.at[1, 1].set(jnp.nan), y
    )
    for name in ("upgrad", "dualproj", "mean", "sum"):
        tx = getattr(jaxjd, name)()
        actual = jax.jit(lambda jac, tx=tx: update(tx, jac, params))(jac)
        assert jnp.isnan(models.ravel(actual)).all()


@pytest.mark.parametrize("name", ["upgrad", "dualproj", "mean", "sum", "constant"])
def test_missing_losses(name, params):
    """Masked losses do not count, and one compilation serves every mask."""
    x, y = models.examples(4)
    weights = jnp.array([0.5, 1.5, -1.0, 2.0])
    traces = []

    def make(kept):
        if name == "constant":
            return jaxjd.constant(weights[kept])
        return getattr(jaxjd, name)()

    @jax.jit
    def masked(x, y, mask):
        traces.append(mask)
        jac = jaxjd.jac(models.loss, in_axes=(None, 0, 0))(params, x, y)
        return update(make(jnp.arange(4)), jac, params, mask=mask)

    for kept in ([0, 2, 3], [1], [0, 1, 2, 3]):
        kept = jnp.array(kept)
        jac = jaxjd.jac(models.loss, in_axes=(None, 0, 0))(params, x[kept], y[kept])
        expected = update(make(kept), jac, params)
        mask = jnp.zeros(4, bool).at[kept].set(True)
        actual = masked(x, y, mask)
        # The solver stops at a few times machine epsilon.
        assert_allclose(
            models.ravel(actual), models.ravel(expected), rtol=1e-9, atol=1e-9
        )
    none = masked(x, y, jnp.zeros(4, bool))
    assert not models.ravel(none).any()
    assert len(traces) == 1


class TestErrors:
    def test_an_ordinary_gradient(self, params):
        gradient = jax.tree.map(jnp.ones_like, params)
        with pytest.raises(
            ValueError, match=r"leading axis.*Got \(5, 3\), an ordinary"
        ):
            update(jaxjd.upgrad(), gradient, params)

    def test_an_ordinary_gradient_of_one_matrix(self):
        # Its first axis could be mistaken for an axis of 7 losses.
        with pytest.raises(ValueError, match="an ordinary gradient"):
            update(jaxjd.upgrad(), jnp.ones((7, 3)), jnp.ones((7, 3)))

    def test_no_parameters_to_compare_with(self, params):
        tx = jaxjd.upgrad()
        with pytest.raises(ValueError, match="`params` must be given to `update`"):
            tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params))

    def test_other_numbers_of_losses(self):
        rows = {"a": jnp.ones((4, 2)), "b": jnp.ones((5, 3))}
        with pytest.raises(ValueError, match=r"\(4, 3\) at \['b'\]. Got \(5, 3\)"):
            update(jaxjd.upgrad(), rows, {"a": jnp.ones(2), "b": jnp.ones(3)})

    def test_another_structure(self, params, jac):
        with pytest.raises(
            ValueError, match="`updates` must be structured like the par"
        ):
            update(jaxjd.upgrad(), [jnp.ones((2, 3))], {"a": jnp.ones(3)})
        with pytest.raises(
            ValueError, match="`params` must be structured like the par"
        ):
            update(jaxjd.upgrad(), jac, {"a": jnp.ones(3)})
        with pytest.raises(
            ValueError, match="`params` must have the shapes of the par"
        ):
            update(jaxjd.upgrad(), jac, params | {"scale": jnp.ones(9)})

    def test_nothing(self):
        with pytest.raises(ValueError, match="without an array in it"):
            update(jaxjd.upgrad(), {}, {})

    def test_no_losses(self):
        with pytest.raises(ValueError, match="at least one loss"):
            update(jaxjd.upgrad(), jnp.ones((0, 3)), jnp.ones(3))

    def test_integers(self):
        with pytest.raises(TypeError, match="`updates` must be real floating.*int64"):
            update(jaxjd.upgrad(), jnp.ones((2, 3), int), jnp.ones(3))

    def test_weights_of_another_length(self, params, jac):
        tx = jaxjd.aggregate(lambda gramian: gramian)
        with pytest.raises(ValueError, match=r"one weight for each of the 4.*\(4, 4\)"):
            update(tx, jac, params)

    def test_a_mask_for_a_function(self, params, jac):
        tx = jaxjd.aggregate(lambda gramian: gramian.sum(0))
        with pytest.raises(ValueError, match="Make it a `jaxjd.Weighting`"):
            update(tx, jac, params, mask=jnp.ones(4, bool))

    @pytest.mark.parametrize(
        ("weighting", "message"),
        [
            (jaxjd.upgrad(), "a transformation, which needs no `jaxjd.aggregate`"),
            (jaxjd.weighting.upgrad, r"write `jaxjd.weighting.upgrad\(...\)`"),
            (jaxjd.upgrad, r"write `jaxjd.upgrad\(...\)`"),
            (None, "Got None"),
        ],
    )
    def test_what_is_no_weighting(self, weighting, message):
        with pytest.raises(TypeError, match=f"must be a jaxjd.Weighting.*{message}"):
            jaxjd.aggregate(weighting)

    def test_a_jacobian_in_place_of_a_weighting(self, jac):
        with pytest.raises(TypeError, match="Got a Jacobian, which `update` takes"):
            jaxjd.aggregate(jac)

    def test_a_transformation_that_is_not_called(self, params):
        tx = optax.chain(jaxjd.upgrad, optax.sgd(0.1))
        with pytest.raises(TypeError, match=r"write `jaxjd.upgrad\(...\)`"):
            tx.init(params)

    def test_another_mask(self, params, jac):
        with pytest.raises(
            ValueError, match="`mask` must have one entry for each of the 4"
        ):
            update(jaxjd.upgrad(), jac, params, mask=jnp.ones(5, bool))
        with pytest.raises(TypeError, match="`mask` must be of bools"):
            update(jaxjd.upgrad(), jac, params, mask=jnp.ones(4))


def test_stacked_rows_are_a_jacobian(params, jac):
    actual = update(jaxjd.upgrad(), jac.dense(), params)
    expected = update(jaxjd.upgrad(), jac, params)
    assert_allclose(ravel_pytree(actual)[0], ravel_pytree(expected)[0], rtol=1e-10)


def test_jit_outside_and_inside(params, jac):
    tx = optax.chain(jaxjd.upgrad(), optax.scale(-1.0))
    outside = jax.jit(lambda jac: update(tx, jac, params))(jac)
    inside = update(tx, jac, params)
    assert_allclose(models.ravel(outside), models.ravel(inside), rtol=1e-12, atol=1e-14)


def test_transformations_are_documented_by_their_weightings():
    for name in ("constant", "dualproj", "mean", "sum", "upgrad"):
        transformation = getattr(jaxjd, name)
        weighting = getattr(jaxjd.weighting, name)
        assert weighting.__doc__ in transformation.__doc__
        assert transformation.__doc__.startswith("The aggregator with the weights of")
        assert transformation.__name__ == name
        signature = inspect.signature(transformation)
        assert signature.return_annotation is aggregating.Aggregator
        assert signature.parameters == inspect.signature(weighting).parameters
        assert typing.get_type_hints(transformation)["return"] is aggregating.Aggregator
        assert pickle.loads(pickle.dumps(transformation)) is transformation


def test_partition_errors(params, jac):
    tx = jaxjd.partition({"a": jaxjd.upgrad()}, {"hidden": "a", "scale": "b"})
    with pytest.raises(
        ValueError, match=r"`labels` must be among.*\['a'\]. Got \['b'\]"
    ):
        tx.init(params)
    tx = jaxjd.partition({"a": jaxjd.upgrad()}, {"other": "a"})
    with pytest.raises(ValueError, match="`labels` must be structured like the par"):
        tx.init(params)
    tx = jaxjd.partition({"a": jaxjd.upgrad()}, "a")  # A prefix for all parameters.
    expected = update(jaxjd.upgrad(), jac, params)
    actual = update(tx, jac, params)
    assert_array_equal(models.ravel(actual), models.ravel(expected))
    with pytest.raises(ValueError, match="`params` must be given to `update`"):
        tx.update(jac, tx.init(params))
