"""Does each loss pay for what it depends on, and for nothing else?

Functions that return all their losses, against a brute-force Jacobian in float64.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose

import jaxjd
from tests import models

pytestmark = pytest.mark.usefixtures("x64")

rng = np.random.default_rng(0)
X = rng.normal(size=(5, 3))
PARAMS = {
    "trunk": rng.normal(size=(3, 4)),
    "loop": rng.normal(size=(4, 4)) / 2,
    "a": rng.normal(size=4),
    "b": rng.normal(size=(4, 2)),
    "free": rng.normal(size=2),
}


def features(p):
    return jnp.tanh(jnp.asarray(X) @ p["trunk"])


def loss_a(p):
    return jnp.sum(features(p) @ p["a"])


def loss_b(p):
    return jnp.mean((features(p) @ p["b"]) ** 2)


def loss_free(p):
    return jnp.sum(p["free"] ** 3)


@jax.custom_vjp
def doubled(x):
    return jnp.sin(x)


doubled.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (2 * g * jnp.cos(x),))


def scanned(p):
    def cell(h, _):
        return jnp.tanh(h @ p["loop"]), None

    return jax.lax.scan(cell, features(p), None, length=3)[0]


# The losses, and for each the parameters that it depends on.
A, B, FREE = {"trunk", "a"}, {"trunk", "b"}, {"free"}
CASES = {
    "stack": (lambda p: jnp.stack([loss_a(p), loss_b(p)]), [A, B]),
    "dict": (
        lambda p: {"z": loss_a(p), "b": loss_b(p), "f": loss_free(p)},
        [B, FREE, A],  # In the order of the keys.
    ),
    "weighted": (
        lambda p: (
            jnp.log1p(jnp.array([2.0, 3.0]) * jnp.stack([loss_b(p), loss_free(p)]) ** 2)
            / 7
        ),
        [B, FREE],
    ),
    "column": (
        lambda p: jnp.concatenate([loss_a(p)[None, None], loss_b(p)[None, None]]),
        [A, B],
    ),
    "jit": (
        jax.jit(lambda p: (loss_a(p), jax.jit(loss_b)(p), jax.jit(loss_free)(p))),
        [A, B, FREE],
    ),
    "one_by_one_and_together": (
        lambda p: jnp.concatenate([(features(p) @ p["a"]) ** 2, loss_free(p)[None]]),
        [A, A, A, A, A, FREE],
    ),
    "mixed": (
        # A row of the stack, and a sum of rows: there the pieces meet again.
        lambda p: (lambda s: jnp.stack([s[0], s.sum()]))(
            jnp.stack([loss_a(p), loss_b(p)])
        ),
        [A, A | B],
    ),
    "taken_apart": (
        lambda p: (lambda s: [s[2], s[1:][0], s[:2], s[None][0, :2], s[::2]])(
            jnp.concatenate([(features(p) @ p["b"]).sum(0), loss_free(p)[None]])
        ),
        # Nothing is known of the steps of a slice, and the two of `b` are one piece.
        [FREE, B, B, B, B, B, B | FREE, B | FREE],
    ),
    "chosen": (
        lambda p: (lambda s: jnp.where(s < 1e3, jnp.tanh(s), jnp.sqrt(s)))(
            jnp.stack([loss_a(p), loss_free(p)])
        ),
        [A, FREE],
    ),
    "broadcast": (
        # JAX also broadcasts axes of length 1, here a stack of scalars against another.
        lambda p: (
            lambda s: (s[:, None] * jnp.cos(s)[None], s[:1].squeeze() * jnp.sin(s))
        )(jnp.stack([loss_a(p), loss_free(p)])),
        [A | FREE] * 6,
    ),
    "loops": (
        lambda p: (
            jnp.sum(scanned(p) @ p["b"]),
            jnp.sum(jax.checkpoint(doubled)(scanned(p)) @ p["a"]),
            jax.lax.cond(p["free"][0] > 0, loss_free, lambda p: 2 * loss_free(p), p),
        ),
        [B | {"loop"}, A | {"loop"}, None],  # A branch may depend on what it is given.
    ),
    "alone": (loss_b, [B]),
    "beside_nothing": (lambda p: [jnp.zeros((0, 2)), loss_b(p), jnp.zeros(0)], [B]),
    "none": (lambda p: (loss_a(p), jnp.float64(3.0)), [A, set()]),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_brute_force(name):
    fun, depends = CASES[name]
    params = jax.tree.map(jnp.asarray, PARAMS)
    m = len(depends)
    weights = jnp.linspace(-1.0, 2.0, m)
    direction = jax.tree.map(jnp.cos, params)

    def flat(losses):
        return jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(losses)])

    def measured(params, jacobians):
        return [
            (
                flat(values),
                jac.gramian(),
                models.ravel(jac.vjp(weights)),
                flat(jac.jvp(direction)),
                models.ravel_rows(jac.dense()),
                jac.cross_gramian(jacobians[0][1]),
                jac.squared_norms(),
            )
            for values, jac in jacobians
        ]

    @jax.jit
    def everything(params):
        J = models.brute_force(lambda p: flat(fun(p)), params)
        jacobians = [
            jaxjd.value_and_jac(fun, method=method)(params)
            for method in ("dense", "chunked", "structured")
        ]
        found = measured(params, jacobians)
        return J, flat(fun(params)), models.ravel(direction), found

    J, losses, d, found = everything(params)
    G = J @ J.T
    for actual in found:
        expected = (losses, G, weights @ J, J @ d, J, G, jnp.diag(G))
        for x, y in zip(actual, expected, strict=True):
            assert_allclose(x, y, rtol=1e-11, atol=1e-11)
        gramian = actual[1]
        assert (gramian == gramian.T).all()
    operator = jaxjd.jac(fun, method="dense")(params)._operator
    for parameter, held in zip(sorted(PARAMS), operator.places, strict=True):
        for row, names in enumerate(depends):
            if names is not None:
                assert (row in held) == (parameter in names), (parameter, row)


def flops(fun, *args):
    # What XLA merges and removes does not depend on how well it compiles the rest.
    return jax.jit(fun).lower(*args).compile().cost_analysis()["flops"]


WIDTH = 48


def network(weights, h):
    for weight in weights:
        h = jnp.tanh(h @ weight)
    return h


def two_tasks(params):
    h = network(params["trunk"], jnp.ones((64, WIDTH)))
    return [jnp.sum(network(params[head], h) ** 2) for head in ("a", "b")]


def alone(params):
    return jnp.sum(network(params["free"], jnp.ones((64, WIDTH))) ** 2)


def three_tasks(params):
    return jnp.stack([*two_tasks(params), alone(params)])


def partitioned(jac, params):
    labels = {name: "shared" if name == "trunk" else "own" for name in params}
    weighted = jaxjd.aggregate(lambda gramian: gramian[0])
    tx = jaxjd.partition({"shared": weighted, "own": jaxjd.sum()}, labels)
    return tx.update(jac, tx.init(params), params)[0]


ASKED = {
    "gramian": lambda jac, params: jac.gramian(),
    "vjp": lambda jac, params: jac.vjp(jnp.ones(jac.num_losses)),
    "partition": partitioned,
}


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("method", ["dense", "chunked", "structured"])
def test_a_disjoint_loss_costs_what_it_costs_alone(method, asked):
    """Beside two tasks with a trunk: no other pass for them, and none through them.

    Its first layer acts on the same values as the first one of the trunk.
    """
    layer = jnp.ones((WIDTH, WIDTH)) / WIDTH
    params = {"trunk": [layer] * 2, "a": [layer] * 2, "b": [layer] * 2}
    params["free"] = [layer] * 3

    def cost(losses):
        def step(params):
            return ASKED[asked](jaxjd.jac(losses, method=method)(params), params)

        return flops(step, params)

    together = cost(two_tasks) + cost(alone)
    # A pass through one layer more would be 4 per cent.
    assert cost(three_tasks) <= 1.01 * together


@pytest.mark.parametrize("method", ["dense", "structured"])
def test_losses_that_share_nothing_cost_what_their_sum_costs(method):
    """No backward pass goes through what another loss depends on."""
    x = jnp.ones((64, 32))
    params = [jnp.ones((32, 32)) / 32] * 6

    def losses(params):
        return [jnp.sum(jnp.tanh(jnp.tanh(x @ p) @ p) ** 2) for p in params]

    def step(params):
        jac = jaxjd.jac(losses, method=method, contraction=CONTRACTION[method])(params)
        return jac.vjp(jnp.ones(6))

    together = flops(jax.grad(lambda params: sum(losses(params))), params)
    assert flops(step, params) <= 1.1 * together


CONTRACTION = {"dense": "auto", "structured": "rows"}


def test_a_shared_trunk_is_passed_once_per_loss_and_a_head_once():
    """And one weight gradient is taken, however many losses there are."""
    m, width = 4, 64
    x = jnp.ones((32, width))
    params = {
        "trunk": [jnp.ones((width, width)) / width] * 4,
        "heads": [jnp.ones((width, width)) / width] * m,
    }

    def losses(params):
        h = x
        for weight in params["trunk"]:
            h = jnp.tanh(h @ weight)
        return [jnp.sum((h @ head) ** 2) for head in params["heads"]]

    def update(params):
        jac = jaxjd.jac(losses, method="structured", contraction="kernel")(params)
        return jac.vjp(jnp.ones(m))

    layer = flops(lambda x, w: x @ w, x, params["trunk"][0])
    # Forward 4 + m; backward, of activations, m of heads and 3 m of the trunk; weight
    # gradients 4 + m. Products with `tanh` and sums are a few per cent of a layer.
    bound = ((4 + m) + (m + 3 * m) + (4 + m)) * layer
    assert flops(update, params) <= 1.1 * bound


@pytest.mark.parametrize("method", ["dense", "structured"])
def test_heads_take_no_forward_pass_of_their_own(method):
    """XLA does not merge two passes through a normalisation, if only one is pulled
    back."""
    x = jnp.ones((500, WIDTH))

    def losses(params):
        h = x
        for weight in params["trunk"]:
            h = h @ weight
            h = h * jax.lax.rsqrt(jnp.mean(h**2, -1, keepdims=True) + 1e-5)
        return [jnp.sum((h @ head) ** 2) for head in params["heads"]]

    params = {"trunk": [jnp.ones((WIDTH, WIDTH))] * 3, "heads": [jnp.ones(WIDTH)] * 2}

    def by_hand(params):
        return [jax.grad(lambda p, i=i: losses(p)[i])(params) for i in range(2)]

    def update(params):
        return partitioned(jaxjd.jac(losses, method=method)(params), params)

    # One more pass through the trunk would be 3 products on top of 15.
    assert flops(update, params) <= 1.1 * flops(by_hand, params)


def test_losses_of_one_computation_are_pulled_back_one_after_another():
    """On a CPU no more memory is taken than for their rows and one backward pass."""
    m, x = 64, jnp.ones((1000, WIDTH))

    def losses(params):
        h = network([params["w"]] * 2, x)
        return jax.vmap(lambda head: jnp.mean((h @ head) ** 2))(params["heads"])

    params = {"w": jnp.ones((WIDTH, WIDTH)), "heads": jnp.ones((m, WIDTH))}
    assert jaxjd.explain(losses)(params).pieces == (m,)

    def rows(params):
        return jaxjd.jac(losses, method="dense")(params).dense()

    compiled = jax.jit(rows).lower(params).compile()
    taken = compiled.memory_analysis().temp_size_in_bytes
    assert taken <= 0.25 * m * x.nbytes


def test_small_rows_are_kept_by_default():
    """Few parameters beside many activations, as in a physics-informed network."""
    x = jnp.ones((500, 3))

    def losses(params):
        h = jnp.tanh(x @ params["w"])
        return {"residual": jnp.mean(h[:400] ** 2), "boundary": jnp.mean(h[400:] ** 2)}

    params = {"w": jnp.ones((3, 4))}
    explanation = jaxjd.explain(losses)(params)
    assert explanation.method == "dense"
    assert "keeping their rows takes less time" in explanation.reason
    assert explanation.pieces == (1, 1)
    assert "pulled back in 2 pieces of (1, 1)" in str(explanation)


@functools.partial(jax.jit, static_argnums=0)
def trained(fun, params):
    tx = optax.chain(jaxjd.upgrad(), optax.sgd(1e-2))

    def step(carry, _):
        params, state, _ = carry
        values, jac = jaxjd.value_and_jac(fun)(params)
        updates, state = tx.update(jac, state, params)
        return (optax.apply_updates(params, updates), state, jac), values

    jac = jaxjd.jac(fun)(params)
    return jax.lax.scan(step, (params, tx.init(params), jac), None, length=4)[1]


def test_under_scan_and_vmap():
    """A Jacobian in pieces is carried by a loop, and mapped over seeds."""
    fun, _ = CASES["dict"]
    params = jax.tree.map(jnp.asarray, PARAMS)
    one = trained(fun, params)
    several = jax.tree.map(lambda p: jnp.stack([p, p + 0.1]), params)
    both = jax.vmap(functools.partial(trained, fun))(several)
    jax.tree.map(lambda a, b: assert_allclose(a, b[0], rtol=1e-10), one, both)


def test_one_array_as_two_arguments():
    """Outside of `jit`: two operands that the plan tells apart are one object."""

    def losses(p, x, y):
        return jnp.stack([jnp.sum(x @ p["a"]), jnp.sum((y @ p["a"]) ** 2)])

    params, x = {"a": jnp.arange(3.0)}, jnp.asarray(X)
    jac = jaxjd.jac(losses, method="structured")(params, x, x)
    J = models.brute_force(losses, params, x, x)
    assert_allclose(jac.gramian(), J @ J.T, rtol=1e-12)


def test_derivative_through_the_gramian():
    fun, _ = CASES["stack"]
    params = jax.tree.map(jnp.asarray, PARAMS)

    def by_rows(p):
        J = models.brute_force(fun, p)
        return jnp.sum(jnp.sin(J @ J.T))

    def of(method):
        return lambda p: jnp.sum(jnp.sin(jaxjd.jac(fun, method=method)(p).gramian()))

    expected = jax.grad(by_rows)(params)
    for method in ("dense", "structured"):
        actual = jax.grad(of(method))(params)
        assert_allclose(models.ravel(actual), models.ravel(expected), rtol=1e-9)
