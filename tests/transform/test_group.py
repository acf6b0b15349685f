"""A Gramian, weights and a state for each group of parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxjd
from tests import models

pytestmark = pytest.mark.usefixtures("x64")

LABELS = ["encoder/b", "encoder/w", "decoder/b", "decoder/w", "heads/0", "heads/1"]
GROUPS = {
    "leaf": [0, 1, 2, 3, 4, 5],
    "layer": [0, 0, 1, 1, 2, 2],
    "depth": [0, 0, 1, 1, 2, 2],
    "path": [0, 1, 0, 1, 2, 2],
    "labels": [0, 0, 0, 0, 1, 1],
}


def losses(params, x):
    h = x
    for name in ("encoder", "decoder"):
        h = jnp.tanh(h @ params[name]["w"] + params[name]["b"][None])
    first, second = params["heads"]
    return {"fit": jnp.mean((h @ first) ** 2), "far": jnp.mean(h @ second - h.sum(1))}


def parameters(dtype=jnp.float64):
    keys = jax.random.split(jax.random.key(0), 6)
    shapes = [(4, 5), (5,), (5, 5), (5,), (5,), (5,)]
    leaves = [
        jax.random.normal(key, shape, dtype)
        for key, shape in zip(keys, shapes, strict=True)
    ]
    return {
        "encoder": {"w": leaves[0], "b": leaves[1]},
        "decoder": {"w": leaves[2], "b": leaves[3]},
        "heads": leaves[4:],
    }


X = np.random.default_rng(1).normal(size=(7, 4))
ARGUMENTS = {
    "leaf": "leaf",
    "layer": "layer",
    "depth": 1,
    "path": lambda path: path.split("/")[1] if "heads" not in path else "heads",
    "labels": {"encoder": "trunk", "decoder": "trunk", "heads": "heads"},
}


@jax.jit
def updates(params):
    """Of every way to group, by every method."""

    def update(group, method):
        tx = jaxjd.aggregate(jaxjd.weighting.upgrad(), group=group)
        jac = jaxjd.jac(losses, method=method)(params, X)
        return tx.update(jac, tx.init(params), params)[0]

    by_method = {
        f"path, {method}": update(ARGUMENTS["path"], method)
        for method in ("dense", "chunked", "structured")
    }
    return {
        name: update(group, "auto") for name, group in ARGUMENTS.items()
    } | by_method


def test_each_group_has_the_update_of_its_own_rows():
    params = parameters()
    jacobian = jax.jacrev(losses)(params, X)
    # Losses and parameters in a dict come in the order of its sorted keys.
    by_loss = [jax.tree.leaves(jacobian[loss]) for loss in ("far", "fit")]
    rows = [np.stack(list(map(np.ravel, leaf))) for leaf in zip(*by_loss, strict=True)]
    names = ["decoder/b", "decoder/w", "encoder/b", "encoder/w", "heads/0", "heads/1"]
    for name, update in updates(params).items():
        labels = GROUPS[name.partition(",")[0]]
        of = dict(zip(LABELS, labels, strict=True))
        found = [np.ravel(leaf) for leaf in jax.tree.leaves(update)]
        for label in set(labels):
            group = [n for n, leaf in enumerate(names) if of[leaf] == label]
            J = np.concatenate([rows[n] for n in group], axis=1)
            weights = jaxjd.weighting.upgrad()(jnp.asarray(J @ J.T))
            expected = np.asarray(weights) @ J
            np.testing.assert_allclose(
                np.concatenate([found[n] for n in group]), expected, rtol=0, atol=1e-9
            )


def test_a_state_for_each_group():
    """As a partition with the same weighting for every group, over three batches."""
    params = parameters(jnp.float32)
    make = lambda: jaxjd.weighting.gradvac(num_losses=2)  # noqa: E731
    labels = {"encoder": "a", "decoder": "b", "heads": "c"}
    grouped = jaxjd.aggregate(make(), group=1)
    apart = jaxjd.partition({x: jaxjd.aggregate(make()) for x in "abc"}, labels)

    @jax.jit
    def train(params):
        def step(states, scale):
            jac = jaxjd.jac(losses)(
                params, scale.astype(jnp.float32) * X.astype(np.float32)
            )
            found, first = grouped.update(jac, states[0], params)
            expected, second = apart.update(jac, states[1], params)
            return (first, second), (found, expected)

        states = grouped.init(params), apart.init(params)
        return jax.lax.scan(step, states, jnp.arange(1, 4))

    (first, _), (found, expected) = train(params)
    # Random orders of the losses do not matter for two of them.
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    keys = jax.random.key_data(optax.tree.get(first, "key"))
    assert len(np.unique(keys, axis=0)) == 3


def test_weights_that_need_no_gramian():
    params = parameters()
    tx = jaxjd.aggregate(jaxjd.weighting.mean(), group="leaf")
    update, _ = tx.update(jaxjd.jac(losses)(params, X), tx.init(params), params)
    of_mean = jax.grad(lambda p: sum(losses(p, X).values()) / 2)(params)
    for a, b in zip(jax.tree.leaves(update), jax.tree.leaves(of_mean), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


def test_layers_of_an_nnx_model_inside_a_partition():
    """A group may hold the layers of a part of the model."""
    nnx = pytest.importorskip("flax.nnx")

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.trunk = nnx.List([nnx.Linear(4, 3, rngs=rngs) for _ in range(2)])
            self.head = nnx.Linear(4, 2, rngs=rngs)

    def fun(model):
        a, b = (layer(X.astype(np.float32)) for layer in model.trunk)
        return jnp.stack([jnp.sum(a * b), jnp.sum(a**2) - jnp.sum(b)])

    model = Model(nnx.Rngs(0))
    upgrad = jaxjd.weighting.upgrad()
    transforms = {
        "trunk": jaxjd.aggregate(upgrad, group="layer"),
        "head": jaxjd.sum(),
    }
    tx = optax.chain(
        jaxjd.partition(transforms, {"trunk": "trunk", "head": "head"}), optax.sgd(1.0)
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    _, jac = jaxjd.nnx.value_and_jac(fun)(model)
    optimizer.update(model, jac)
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    change = jax.tree.map(lambda a, b: np.asarray(b - a), before, after)
    rows = jac.dense()["trunk"]
    for n in range(2):
        J = np.asarray(models.ravel_rows(nnx.to_pure_dict(rows)[n]))
        expected = -np.asarray(upgrad(jnp.asarray(J @ J.T))) @ J
        np.testing.assert_allclose(
            models.ravel(change["trunk"][n]), expected, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"group": "module"}, ValueError, '`group` must be "leaf", "layer".*module'),
        ({"group": 0}, ValueError, "`group` must be a depth of at least 1. Got 0"),
        ({"group": True}, TypeError, "`group` must not be a bool"),
        ({"group": 1, "wrt": True}, ValueError, "`wrt` and `group`"),
        ({"group": {"encoder": 1}}, ValueError, "`group` must be structured like"),
        ({"group": lambda path: [path]}, TypeError, "`group` must give labels"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        jaxjd.aggregate(jaxjd.weighting.upgrad(), **arguments).init(parameters())


def test_one_cross_gramian_is_not_enough():
    params = parameters()
    tx = jaxjd.aggregate(jaxjd.weighting.sdmgrad(num_losses=2), group=1)
    jac = jaxjd.jac(losses)(params, X)
    with pytest.raises(ValueError, match="`cross_gramian` is that of all parameters"):
        tx.update(jac, tx.init(params), params, cross_gramian=jac.gramian())
