"""Callable pytrees are taken as trees, and misspelt arguments give a warning."""

import jax
import jax.numpy as jnp
import optax
import pytest
from numpy.testing import assert_array_equal

import jaxjd

ROWS = {"a": jnp.eye(3), "b": jnp.ones((3, 2))}
PARAMS = {"a": jnp.zeros(3), "b": jnp.zeros(2)}


@jax.tree_util.register_pytree_node_class
class Module:
    """A pytree that can be called, like an Equinox module."""

    def __init__(self, a, b):
        self.a, self.b = a, b

    def __call__(self, x):
        raise AssertionError("a module of labels was called")

    def tree_flatten(self):
        return (self.a, self.b), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def test_modules_that_can_be_called_are_trees():
    params, rows = Module(**PARAMS), Module(**ROWS)
    tx = jaxjd.partition({"x": jaxjd.mean(), "y": jaxjd.sum()}, Module("x", "y"))
    update, _ = tx.update(rows, tx.init(params), params)
    assert_array_equal(update.a, ROWS["a"].mean(0))
    assert_array_equal(update.b, ROWS["b"].sum(0))
    for wrt in (Module(True, False), lambda params: Module(True, params.b.size > 2)):
        tx = jaxjd.aggregate(lambda gramian: gramian[0], wrt=wrt)
        update, _ = tx.update(rows, tx.init(params), params)
        assert_array_equal(update.a, [1, 0, 0])


@pytest.mark.parametrize(
    "make",
    [
        jaxjd.upgrad,
        jaxjd.graddrop,
        lambda: jaxjd.trimmed_mean(1),
        lambda: jaxjd.excess_mtl(num_losses=3),
        lambda: jaxjd.partition({"x": jaxjd.mean()}, "x"),
    ],
)
def test_a_misspelt_extra_argument_is_warned_of(make):
    tx = make()
    state, mask = tx.init(PARAMS), jnp.array([True, False, True])
    with pytest.warns(UserWarning, match="argument `maks`.*Did you mean `mask`?"):
        tx.update(ROWS, state, PARAMS, maks=mask)
    # Arguments meant for other links give no warning (which would be an error here).
    tx.update(ROWS, state, PARAMS, mask=mask, value=1.0, value_fn=None, step=3)


def test_it_is_warned_of_in_a_chain_too():
    tx = optax.chain(jaxjd.mean(), optax.scale(2.0))
    with pytest.warns(UserWarning, match="Did you mean `losses`?"):
        tx.update(ROWS, tx.init(PARAMS), PARAMS, loses=jnp.ones(3))


@pytest.mark.parametrize(
    ("transforms", "got"),
    [
        ([jaxjd.mean()], "Got list"),
        (jaxjd.mean(), "Got Aggregator"),
        ({"x": jaxjd.mean(), "y": "x"}, "Got {'y': 'x'}"),
        ({"x": None}, "Got {'x': None}"),
    ],
)
def test_transforms_that_are_no_dict_of_aggregators(transforms, got):
    with pytest.raises(TypeError, match=f"`transforms` must be a dict from .* {got}"):
        jaxjd.partition(transforms, "x")


def test_labels_that_cannot_be_keys():
    tx = jaxjd.partition({"x": jaxjd.mean()}, {"a": "x", "b": jnp.ones(2)})
    with pytest.raises(TypeError, match="`labels` must be among .*'x'.* Got ArrayImpl"):
        tx.init(PARAMS)


def test_the_losses_along_with_the_jacobian():
    pair = jaxjd.value_and_jac(lambda p: p["a"])(PARAMS)
    tx = jaxjd.mean()
    with pytest.raises(TypeError, match="one Jacobian. .* write `losses, jac = ...`"):
        tx.update(pair, tx.init(PARAMS), PARAMS)
    with pytest.raises(TypeError, match="Join several .* by `jaxjd.concatenate`"):
        tx.update([pair[1]] * 2, tx.init(PARAMS), PARAMS)
