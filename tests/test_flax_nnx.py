"""A flax.nnx training loop works with two changed lines."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import jaxjd

nnx = pytest.importorskip("flax.nnx")
as_pure = jaxjd.nnx.as_pure


class Net(nnx.Module):
    def __init__(self, rngs, norm=nnx.BatchNorm, dropout=0.5):
        self.first = nnx.Linear(3, 8, rngs=rngs)
        self.norm = norm(8, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.last = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(nnx.elu(self.norm(self.first(x)))))[..., 0]


X = jax.random.normal(jax.random.key(0), (16, 3))
Y = jnp.sin(X).sum(axis=1)


def losses(model, x, y):
    return (model(x) - y) ** 2


def arrays(model, kind):
    return jax.tree.map(jnp.copy, as_pure(nnx.state(model, kind)))


def close(actual, expected, **kwargs):
    jax.tree.map(functools.partial(assert_allclose, **kwargs), actual, expected)


def count(model):
    (value,) = jax.tree.leaves(as_pure(nnx.state(model, nnx.RngCount)))
    return int(value)


def test_reads_like_value_and_grad():
    """As in `nnx.value_and_grad`, state changes once, and only Param is learned."""
    ours, theirs = Net(nnx.Rngs(0)), Net(nnx.Rngs(0))
    values, jac = jaxjd.nnx.value_and_jac(losses)(ours, X, Y)
    mean, gradient = nnx.value_and_grad(lambda m, x, y: losses(m, x, y).mean())(
        theirs, X, Y
    )
    assert_allclose(values.mean(), mean, rtol=1e-6)
    close(jac.vjp(jnp.full(16, 1 / 16)), as_pure(gradient), atol=1e-5)
    assert count(ours) == count(theirs) == 1
    close(arrays(ours, nnx.BatchStat), arrays(theirs, nnx.BatchStat), rtol=1e-6)
    assert jax.tree.structure(jac.vjp(jnp.ones(16))) == jax.tree.structure(
        arrays(ours, nnx.Param)
    )


def test_optimizer_under_jit():
    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(
        model, optax.chain(jaxjd.upgrad(), optax.adam(1e-2)), wrt=nnx.Param
    )

    @nnx.jit
    def step(model, optimizer, x, y):
        values, jac = jaxjd.nnx.value_and_jac(losses)(model, x, y)
        optimizer.update(model, jac)
        return values

    before = arrays(model, nnx.Param)
    history = [step(model, optimizer, X, Y).mean() for _ in range(60)]
    assert np.mean(history[-10:]) < 0.5 * np.mean(history[:3])
    assert count(model) == 60
    for old, new in zip(
        jax.tree.leaves(before), jax.tree.leaves(arrays(model, nnx.Param)), strict=True
    ):
        assert (old != new).any()


def test_the_update_is_that_of_the_pure_function():
    model = Net(nnx.Rngs(0), norm=nnx.LayerNorm, dropout=0.0)
    graph, params, others = nnx.split(model, nnx.Param, ...)

    def pure(params):
        return losses(nnx.merge(graph, params, others), X, Y)

    tx = jaxjd.upgrad()
    expected, _ = tx.update(jaxjd.jac(pure)(as_pure(params)), tx.init(None))
    optimizer = nnx.Optimizer(model, optax.chain(tx, optax.sgd(1.0)), wrt=nnx.Param)
    before = arrays(model, nnx.Param)
    optimizer.update(model, jaxjd.nnx.value_and_jac(losses)(model, X, Y)[1])
    change = jax.tree.map(lambda a, b: a - b, before, arrays(model, nnx.Param))
    close(change, expected, atol=1e-5)


class TestPerExample:
    def model(self, dropout=0.5):
        return Net(nnx.Rngs(0), norm=nnx.LayerNorm, dropout=dropout)

    def test_equals_the_function_of_the_batch(self):
        one = jaxjd.nnx.value_and_jac(losses, in_axes=(None, 0, 0), contraction="rows")
        values, jac = one(self.model(0.0), X, Y)
        expected_values, expected = jaxjd.nnx.value_and_jac(losses)(
            self.model(0.0), X, Y
        )
        assert_allclose(values, expected_values, rtol=1e-5)
        assert_allclose(jac.gramian(), expected.gramian(), rtol=1e-4, atol=1e-4)

    def test_every_example_draws_its_own_dropout(self):
        model = self.model()
        same = jnp.ones_like(X)
        one = jaxjd.nnx.value_and_jac(losses, in_axes=(None, 0, None))
        first, _ = one(model, same, 0.0)
        assert count(model) == 1
        second, _ = one(model, same, 0.0)
        assert count(model) == 2
        assert len(np.unique(first)) > 4
        assert (first != second).any()

    def test_batch_statistics_are_refused(self):
        message = r"writes the model's BatchStat at \['norm'\].*running averages"
        with pytest.raises(ValueError, match=message):
            jaxjd.nnx.value_and_jac(losses, in_axes=(None, 0, 0))(
                Net(nnx.Rngs(0)), X, Y
            )

    def test_running_averages_are_not(self):
        model = Net(nnx.Rngs(0))
        model.eval()
        _, jac = jaxjd.nnx.value_and_jac(losses, in_axes=(None, 0, 0))(model, X, Y)
        assert jac.num_losses == 16

    @pytest.mark.parametrize("transform", [nnx.jit, nnx.remat])
    def test_transformations_that_return_every_variable(self, transform):
        """They return random streams and running averages without writing to them."""

        def transformed(model, x, y):
            return transform(losses)(model, x, y)

        model = Net(nnx.Rngs(0), dropout=0.0)
        model.norm.use_running_average = True
        value_and_jac = jaxjd.nnx.value_and_jac
        found, jac = value_and_jac(transformed, in_axes=(None, 0, 0))(model, X, Y)
        expected, same = value_and_jac(losses, in_axes=(None, 0, 0))(model, X, Y)
        assert_allclose(found, expected, rtol=1e-5)
        assert_allclose(jac.gramian(), same.gramian(), rtol=1e-4, atol=1e-4)
        model.norm.use_running_average = False
        with pytest.raises(ValueError, match="writes the model's BatchStat"):
            value_and_jac(transformed, in_axes=(None, 0, 0))(model, X, Y)

    def test_other_variables_are_refused(self):
        def counting(model, x, y):
            model.calls.set_value(model.calls.get_value() + 1)
            return losses(model, x, y)

        model = self.model()
        model.calls = nnx.Variable(jnp.array(0))
        with pytest.raises(
            ValueError, match="writes the model's Variable at .*'calls'"
        ):
            jaxjd.nnx.value_and_jac(counting, in_axes=(None, 0, 0))(model, X, Y)


def test_auxiliary_output_and_position():
    def with_aux(x, y, model):
        prediction = model(x)
        return (prediction - y) ** 2, prediction

    for in_axes in (None, (0, 0, None)):
        model = Net(nnx.Rngs(0), norm=nnx.LayerNorm, dropout=0.0)
        (values, aux), jac = jaxjd.nnx.value_and_jac(
            with_aux, argnums=2, has_aux=True, in_axes=in_axes
        )(X, Y, model)
        assert_allclose(aux, model(X), rtol=1e-5, atol=1e-6)
        assert_allclose(values, (aux - Y) ** 2, rtol=1e-5, atol=1e-6)
        assert jac.num_losses == 16


def test_leaves_jit():
    model = Net(nnx.Rngs(0))
    jac = nnx.jit(lambda m: jaxjd.nnx.value_and_jac(losses)(m, X, Y)[1])(model)
    expected = jaxjd.nnx.value_and_jac(losses)(Net(nnx.Rngs(0)), X, Y)[1]
    assert_allclose(jac.gramian(), expected.gramian(), rtol=1e-4, atol=1e-4)
    assert_array_equal(jac.gramian(), jac.gramian().T)


def test_missing_losses():
    model = Net(nnx.Rngs(0), norm=nnx.LayerNorm, dropout=0.0)
    tx = optax.chain(jaxjd.upgrad(), optax.sgd(1.0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = arrays(model, nnx.Param)
    jac = jaxjd.nnx.value_and_jac(losses)(model, X, Y)[1]
    optimizer.update(model, jac, mask=jnp.zeros(16, bool))
    close(arrays(model, nnx.Param), before)


def test_keyword_arguments_and_explain():
    def scaled(model, x, y, *, scale, train):
        return scale * losses(model, x, y) if train else losses(model, x, y)

    model = Net(nnx.Rngs(0), norm=nnx.LayerNorm, dropout=0.5)
    rest = {"scale": jnp.array(2.0), "train": True}
    explanation = jaxjd.nnx.explain(scaled, in_axes=(None, 0, 0))(model, X, Y, **rest)
    assert explanation.method == "structured"
    assert explanation.num_losses == 16
    assert "kernel" in str(explanation)
    assert count(model) == 0  # No random numbers were drawn.
    model.eval()
    doubled, jac = jaxjd.nnx.value_and_jac(scaled, in_axes=(None, 0, 0))(
        model, X, Y, **rest
    )
    assert_allclose(doubled, 2 * losses(model, X, Y), rtol=1e-5)
    assert "method='structured'" in repr(jac.jacobian.get_value())


def test_labels_and_masks_by_attribute_names():
    model = Net(nnx.Rngs(0), norm=nnx.LayerNorm, dropout=0.0)
    _, jac = jaxjd.nnx.value_and_jac(losses)(model, X, Y)
    params = as_pure(nnx.state(model, nnx.Param))  # As nnx.Optimizer passes them.
    names = dict.fromkeys(params, "rest") | {"last": "last"}
    tx = jaxjd.partition({"rest": jaxjd.mean(), "last": jaxjd.sum()}, names)
    pure = as_pure(nnx.state(jac, nnx.Param))
    update, _ = tx.update(pure, tx.init(params), params)
    rows = jac.dense()
    # Float32 sums of 16 entries in two orders.
    near = functools.partial(close, rtol=1e-5, atol=1e-6)
    near(update["last"], jax.tree.map(lambda x: x.sum(0), rows["last"]))
    near(update["first"], jax.tree.map(lambda x: x.mean(0), rows["first"]))
    wrt = {name: name == "last" for name in params}
    only = jac.restrict(wrt).gramian()
    flat = [leaf.reshape(16, -1) for leaf in jax.tree.leaves(rows["last"])]
    assert_allclose(only, sum(x @ x.T for x in flat), rtol=1e-4, atol=1e-5)
    tx = jaxjd.aggregate(lambda gramian: gramian[0] / only[0], wrt=wrt)
    update, _ = tx.update(pure, tx.init(params), params)
    near(update["first"], jax.tree.map(lambda x: x.sum(0), rows["first"]))


def test_cross_gramian():
    """With a Jacobian of the same kind, and with the plain one that it holds."""
    model = Net(nnx.Rngs(0), norm=nnx.LayerNorm, dropout=0.0)
    _, jac = jaxjd.nnx.value_and_jac(losses)(model, X, Y)
    assert_allclose(jac.cross_gramian(jac), jac.gramian(), rtol=1e-5, atol=1e-5)
    plain = jac.jacobian.get_value()
    assert_allclose(jac.cross_gramian(plain), jac.gramian(), rtol=1e-5, atol=1e-5)


class TestErrors:
    def test_wrt(self):
        with pytest.raises(TypeError, match="`wrt` must be a type of variables"):
            jaxjd.nnx.value_and_jac(losses, wrt=nnx.All(nnx.Param))

    def test_fun(self):
        with pytest.raises(TypeError, match="`fun` must be the function .* Got 3"):
            jaxjd.nnx.value_and_jac(3)

    def test_argnums(self):
        with pytest.raises(TypeError, match="`argnums` must be the position of the"):
            jaxjd.nnx.value_and_jac(losses, argnums=(0, 1))

    def test_no_model(self):
        with pytest.raises(
            TypeError, match="Argument 0 of `fun` must be an nnx.Module"
        ):
            jaxjd.nnx.value_and_jac(losses)({"w": jnp.ones(3)}, X, Y)

    def test_the_plain_jacobian(self):
        """A `jaxjd.Jacobian` given to the nnx optimizer by mistake raises an error."""
        model = Net(nnx.Rngs(0), norm=nnx.LayerNorm, dropout=0.0)
        graph, params, others = nnx.split(model, nnx.Param, ...)
        jac = jaxjd.jac(lambda p: losses(nnx.merge(graph, p, others), X, Y))(
            as_pure(params)
        )
        optimizer = nnx.Optimizer(model, jaxjd.upgrad(), wrt=nnx.Param)
        with pytest.raises((ValueError, TypeError), match="jaxjd"):
            optimizer.update(model, jac)

    def test_no_attribute(self):
        _, jac = jaxjd.nnx.value_and_jac(losses)(Net(nnx.Rngs(0)), X, Y)
        with pytest.raises(AttributeError, match="no attribute 'gram'"):
            _ = jac.gram
