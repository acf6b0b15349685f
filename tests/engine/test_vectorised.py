"""Losses of one vectorised computation: is each pulled back through its own slice?

Against a brute-force Jacobian in float64.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.ad_checkpoint import checkpoint_name
from numpy.testing import assert_allclose

import jaxjd
from jaxjd.engine import _jaxpr
from tests import models

pytestmark = pytest.mark.usefixtures("x64")

# No other axis has as many entries as there are losses.
B, D, M, C = 7, 5, 11, 3
rng = np.random.default_rng(0)
X = rng.normal(size=(B, 6))
ROWS = rng.normal(size=(M, 6))
LABELS = rng.integers(0, C, size=(M, B))
TARGETS = rng.normal(size=(B, M))
PARAMS = {
    "trunk": rng.normal(size=(6, D)),
    "heads": rng.normal(size=(M, D, C)),
    "biases": rng.normal(size=(M, C)),
    "columns": rng.normal(size=(D, M)),
    "shared": rng.normal(size=C),
    "scale": rng.normal(size=1),
    "squares": rng.normal(size=(D, D, D)),
}


def features(p):
    return checkpoint_name(jnp.tanh(jnp.asarray(X) @ p["trunk"]), "features")


def classifiers(p):
    """With what the heads share in them, and at their inputs."""
    h = features(p)

    def loss(head, bias, labels):
        logits = jnp.tanh(h @ head + bias[None]) + p["shared"][None]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return jax.vmap(loss)(p["heads"], p["biases"], jnp.asarray(LABELS))


def outputs(p):
    """The outputs of one network."""
    return jnp.mean((features(p) @ p["columns"] - TARGETS) ** 2, axis=0)


def of_other_axes(p):
    h = features(p)

    def loss(head):
        hidden = jax.vmap(lambda row: jax.nn.relu(row @ head))(h)
        return jnp.sum(jax.nn.softmax(hidden) @ p["shared"]) * jnp.max(h)

    return jax.vmap(loss, in_axes=2)(jnp.moveaxis(p["heads"], 0, 2))


def scaled(p):
    """A parameter of one entry, and a penalty that all losses share."""
    h = features(p)

    def loss(head, bias):
        return jnp.sum((h @ head) * p["scale"][None]) + jnp.sum(bias * p["scale"])

    return jax.vmap(loss)(p["heads"], p["biases"]) + jnp.sum(h**2)


def two_pieces(p):
    return {"a": outputs(p), "b": 2 * scaled(p), "c": jnp.sum(p["shared"] ** 3)}


def of_examples(p):
    """One loss for each row of a batch."""
    hidden = jnp.tanh(jnp.asarray(ROWS) @ p["trunk"])
    return jnp.sum(hidden**2, axis=1) * p["scale"]


def mixed(p):
    """Each loss depends on all slices."""
    return outputs(p) @ jnp.cos(jnp.arange(M * M, dtype=float)).reshape(M, M)


def all_heads(p):
    """Each loss depends on its own head, and on all others."""
    h, penalty = features(p), jnp.sum(p["heads"] ** 2)
    return jax.vmap(lambda head: jnp.sum(h @ head) + penalty)(p["heads"])


def in_a_loop(p):
    h = features(p)
    return jax.lax.map(lambda head: jnp.sum(jnp.tanh(h @ head)), p["heads"])


def of_equal_axes(p):
    """As many losses as the other axes have entries."""
    h = features(p)[:D]

    def loss(head, bias):
        return jnp.sum(jnp.tanh(h @ head + bias[None] + p["squares"][0].T) ** 2)

    biases = p["squares"][1] + p["squares"][1].T
    return jax.vmap(loss)(p["squares"], biases)


def two_groups(p):
    """The same computation twice: its equations become calls of one function."""
    h = features(p)

    def losses(heads):
        def loss(head):
            logits = jnp.tanh(h @ head)
            return jnp.mean(jax.nn.logsumexp(logits, axis=-1))

        return jax.vmap(loss)(heads)

    return [losses(p["heads"]), losses(p["squares"])]


def parameters(p):
    return p["columns"][0]


APART = [classifiers, outputs, of_other_axes, scaled, two_pieces, of_examples]
OTHERS = [of_equal_axes, two_groups, mixed, all_heads, in_a_loop, parameters]


def flat(tree):
    return jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(tree)])


def test_equals_brute_force():
    params = jax.tree.map(jnp.asarray, PARAMS)

    @jax.jit
    def everything(params):
        found, wanted = {}, {}
        for fun in [*APART, *OTHERS]:
            name = fun.__name__
            jac = jaxjd.jac(fun, method="dense")(params)
            found[name] = models.ravel_rows(jac.dense())
            rows = jax.jacrev(lambda p, fun=fun: flat(fun(p)))(params)
            wanted[name] = models.ravel_rows(rows)
        of = jaxjd.jac(classifiers)(params).features("features")
        found["features"] = of.gramian()

        def heads(h):
            def loss(head, bias, labels):
                logits = jnp.tanh(h @ head + bias[None]) + params["shared"][None]
                losses = optax.softmax_cross_entropy_with_integer_labels
                return losses(logits, labels).mean()

            stacked = params["heads"], params["biases"], jnp.asarray(LABELS)
            return jax.vmap(loss)(*stacked)

        rows = jax.jacrev(heads)(features(params)).reshape(M, -1)
        wanted["features"] = rows @ rows.T
        return found, wanted

    found, wanted = everything(params)
    for name, value in wanted.items():
        assert_allclose(found[name], value, rtol=1e-12, atol=1e-13, err_msg=name)


def in_loops(jaxpr):
    """The shapes of all that is computed in loops."""
    shapes = set()
    for eqn in jaxpr.eqns:
        for value in jax.tree.leaves(eqn.params, is_leaf=_jaxpr.is_jaxpr):
            if _jaxpr.is_jaxpr(value):
                inner = _jaxpr.opened(value)[0]
                shapes |= in_loops(inner)
                if eqn.primitive.name == "scan":
                    shapes |= {v.aval.shape for e in inner.eqns for v in e.outvars}
    return shapes


@pytest.mark.parametrize("fun", [*APART[:-2], of_examples])
def test_a_row_is_pulled_back_through_one_slice(fun):
    rows = jax.make_jaxpr(lambda p: jaxjd.jac(fun, method="dense")(p).dense())
    shapes = in_loops(rows(jax.tree.map(jnp.asarray, PARAMS)).jaxpr)
    assert shapes
    assert not any(M in shape for shape in shapes), shapes
