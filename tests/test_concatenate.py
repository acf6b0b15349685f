"""Are the losses of several functions those of one that returns them all?"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose

import jaxjd
from tests import models

rng = np.random.default_rng(0)
INSIDE, BOUNDARY = rng.normal(size=(5, 2)), rng.normal(size=(3, 2))
PARAMS = {
    "a": rng.normal(size=(2, 4)),
    "b": rng.normal(size=4),
    "c": rng.normal(size=(4, 4)),
    "d": rng.normal(size=4),
    "unknown": np.array(0.7),
}


def u(params, x):
    h = jnp.tanh(jnp.tanh(x @ params["a"] + params["b"]) @ params["c"])
    return h @ params["d"]


def residual(params, x):
    """The network is used in three ways here: by itself and in both derivatives."""
    slope = jax.grad(u, 1)(params, x)
    curvature = jax.jvp(lambda x: jax.grad(u, 1)(params, x), (x,), (jnp.eye(2)[0],))[1]
    return (slope[1] + u(params, x) * slope[0] - params["unknown"] * curvature[0]) ** 2


def boundary(params, x):
    return {"value": (u(params, x) - x[0]) ** 2, "rest": jnp.sin(x * u(params, x))}


def penalties(params):
    return [jnp.sum(params["c"] ** 4), u(params, jnp.ones(2))]


def losses(params):
    return {
        "inside": jax.vmap(residual, (None, 0))(params, INSIDE),
        "boundary": jax.vmap(boundary, (None, 0))(params, BOUNDARY),
        "penalties": penalties(params),
    }


def flat(tree):
    return jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(tree)])


def jacobians(params, chunk_size=None):
    per_example = {"in_axes": (None, 0), "chunk_size": chunk_size}
    return {
        "inside": jaxjd.jac(residual, **per_example)(params, INSIDE),
        "boundary": jaxjd.jac(boundary, **per_example)(params, BOUNDARY),
        "penalties": jaxjd.jac(penalties)(params),
    }


def test_equals_brute_force(x64):
    params = jax.tree.map(jnp.asarray, PARAMS)
    m = 5 + 9 + 2
    weights = jnp.linspace(-1.0, 2.0, m)
    direction = jax.tree.map(jnp.cos, params)
    some = {"a": True, "b": False, "c": True, "d": False, "unknown": True}

    @jax.jit
    def everything(params):
        of_each = jacobians(params)
        found = [
            (
                jac.gramian(),
                jac.squared_norms(),
                models.ravel(jac.vjp(weights)),
                flat(jac.jvp(direction)),
                models.ravel_rows(jac.dense()),
                jac.cross_gramian(of_each["boundary"]),
                of_each["boundary"].cross_gramian(jac).T,
                jac.restrict(some).gramian(),
            )
            for jac in (
                jaxjd.concatenate(of_each),
                jaxjd.concatenate(jacobians(params, chunk_size=4)),
            )
        ]
        J = models.brute_force(lambda p: flat(losses(p)), params)
        kept = jax.jacrev(lambda p: flat(losses(p)))(params)
        kept = [kept[name].reshape(m, -1) for name, keep in some.items() if keep]
        return J, models.ravel(direction), sum(x @ x.T for x in kept), found

    J, d, restricted, found = everything(params)
    G = J @ J.T
    cross = G[:, :9]  # In the order of the keys.
    for actual in found:
        expected = (G, jnp.diag(G), weights @ J, J @ d, J, cross, cross, restricted)
        for x, y in zip(actual, expected, strict=True):
            assert_allclose(x, y, rtol=1e-10, atol=1e-10)
        assert (actual[0] == actual[0].T).all()


def test_structure_is_that_of_the_jacobians(x64):
    @jax.jit
    def compared(params):
        jac = jaxjd.concatenate(jacobians(params))
        shapes = jax.tree.map(lambda x: list(x.shape), losses(params))
        assert f"losses={shapes}" in repr(jac)
        assert "method='structured + " in repr(jac)
        # A concatenation of concatenations is flat in the engine, nested for the user.
        nested = jaxjd.concatenate([jac, jacobians(params)["inside"]])
        assert nested.num_losses == 21
        assert jax.tree.structure(nested.jvp(params)) == jax.tree.structure(
            [losses(params), 0]
        )
        ones = jax.tree.map(jnp.ones_like, losses(params))
        alone = jaxjd.concatenate([jac])
        return [
            (flat(jac.vjp(ones)), flat(jac.vjp(jnp.ones(16)))),
            (alone.gramian(), jac.gramian()),
        ]

    for found, expected in compared(jax.tree.map(jnp.asarray, PARAMS)):
        assert_allclose(found, expected, rtol=1e-12)


def test_trains_in_a_scan():
    """With a partition, and by rows, inside of one compiled loop."""
    params = jax.tree.map(jnp.float32, PARAMS)
    labels = {"a": "x", "b": "x", "c": "x", "d": "x", "unknown": "y"}
    by_group = {"x": jaxjd.upgrad(), "y": jaxjd.trimmed_mean(num_trimmed=1)}
    tx = optax.chain(jaxjd.partition(by_group, labels), optax.adam(1e-2))

    @jax.jit
    def trained(params):
        def step(carry, _):
            params, state = carry
            jac = jaxjd.concatenate(jacobians(params))
            updates, state = tx.update(jac, state, params)
            return (optax.apply_updates(params, updates), state), flat(losses(params))

        return jax.lax.scan(step, (params, tx.init(params)), None, length=30)[1]

    values = trained(params)
    assert values[-1, 9:14].mean() < values[0, 9:14].mean() / 2


def test_wrong_arguments():
    params = jax.tree.map(jnp.asarray, PARAMS)
    jac = jacobians(params)["penalties"]
    with pytest.raises(ValueError, match=r"at least one jaxjd\.Jacobian\. Got \[\]"):
        jaxjd.concatenate([])
    with pytest.raises(TypeError, match="Got float among them"):
        jaxjd.concatenate([jac, 1.0])
    other = jaxjd.jac(lambda p: p["a"].sum())({"a": jnp.ones((2, 4))})
    with pytest.raises(ValueError, match="the same parameters"):
        jaxjd.concatenate([jac, other])
    several = jaxjd.concatenate([jac, jac])
    with pytest.raises(ValueError, match="Jacobian of one function. Got that of 2"):
        several.features("features")
