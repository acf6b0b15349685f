"""Are repeated equations found, and does evaluating them as calls change nothing?"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import jaxpr_as_fun

import jaxjd
from jaxjd import engine
from jaxjd.engine import _repeats
from tests.engine.structured.conftest import normal

pytestmark = pytest.mark.usefixtures("x64")
DEPTH, WIDTH = 5, 3


def layer(w, x, scale=2.0):
    y = jnp.tanh((x - x.mean()) @ w) * scale
    return x + jnp.sin(y) * jnp.where(y > 0, y, 0.5)


WEIGHTS = [normal(WIDTH, WIDTH, seed=n) for n in range(DEPTH)]
X = normal(WIDTH)


def calls(fun, *args):
    """How often each part that is called is called, in the order of its first call."""
    parts = _repeats.parts(jax.make_jaxpr(fun)(*args).jaxpr)
    found = [part.block for part in parts if part.is_called]
    return [found.count(block) for block in dict.fromkeys(found)]


def same_layers(weights, x):
    for w in weights:
        x = layer(w, x)
    return x.sum()


def two_kinds(weights, x):
    for w in weights[:2]:
        x = layer(w, x)
    for w in weights[2:]:
        x = layer(w, x, scale=3.0)
    return x.sum()


def other_constants(weights, x):
    """What is between one scale and the next is the same in all layers."""
    for n, w in enumerate(weights):
        x = layer(w, x, scale=n)
    return x.sum()


def short_between_constants(weights, x):
    for n, w in enumerate(weights):
        x = jnp.sin(x @ w + n) * n
    return x.sum()


def tasks(weights, x):
    """Each task has its own slice of the data, and a rule of `jax.custom_jvp`."""
    data, found = jnp.outer(x, x).ravel(), []
    for n, w in enumerate(weights):
        y = jax.nn.relu((x - x.mean()) @ w) * 2.0
        y = jnp.sin(jnp.tanh(y) * jnp.exp(-jnp.abs(y)))
        found.append(jnp.square(y - data[n]).sum())
    return sum(found)


def with_rule(slope):
    """The same function, whose derivative is this one."""

    @jax.custom_jvp
    def function(x):
        return jnp.sin(x)

    function.defjvp(lambda primals, tangents: (jnp.sin(*primals), slope * tangents[0]))
    return function


def other_rules(weights, x):
    for n, w in enumerate(weights):
        x = with_rule(float(n))(layer(w, x))
    return x.sum()


def equal_rules(weights, x):
    for w in weights:
        x = with_rule(3.0)(layer(w, x))
    return x.sum()


def skips(weights, x):
    """All layers are the same equations, but not all of them of the same operands."""
    first = x
    for n, w in enumerate(weights):
        h = layer(w, x)
        x = first + jnp.abs(h) if n < 2 else h + jnp.abs(h)
    return x.sum()


def returned(weights, x):
    """One layer returns what is inside of it, the others do not."""
    for w in weights:
        inside = jnp.tanh((x - x.mean()) @ w)
        x = x + jnp.sin(inside) * jnp.cos(inside) * jnp.exp(-inside)
    return x.sum() * inside.sum()


@pytest.mark.parametrize(
    ("fun", "expected"),
    [
        (same_layers, [DEPTH]),
        (two_kinds, [2, 3]),
        (other_constants, [DEPTH - 1]),
        (short_between_constants, []),
        (tasks, [DEPTH]),
        (other_rules, [DEPTH]),
        (equal_rules, [DEPTH]),
        (skips, None),
        (returned, [DEPTH]),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_repetitions_are_called(fun, expected):
    assert expected is None or calls(fun, WEIGHTS, X) == expected
    closed = jax.make_jaxpr(fun)(WEIGHTS, X)
    operands = [*closed.consts, *WEIGHTS, X]
    found = _repeats.evaluate(closed.jaxpr, operands)
    wanted = jaxpr_as_fun(closed)(*WEIGHTS, X)
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


@pytest.mark.parametrize("fun", [tasks, other_rules, equal_rules])
def test_derivatives_of_repetitions(fun):
    """Each layer keeps its own derivative."""
    closed = jax.make_jaxpr(fun)(WEIGHTS, X)
    found = jax.jit(
        jax.grad(
            lambda weights: _repeats.evaluate(
                closed.jaxpr, [*closed.consts, *weights, X]
            )[0]
        )
    )(WEIGHTS)
    wanted = jax.jit(jax.grad(fun))(WEIGHTS, X)
    for x, y in zip(found, wanted, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12)


def test_rules_that_cannot_be_compared():
    """One that sees which tangents are zero, and one whose trace has ended."""

    def fun(weights, x):
        for w in weights:

            def apply(w, x, shift):
                seen = jax.custom_jvp(jnp.sin)
                seen.defjvp(lambda p, t: (jnp.sin(*p), t[0] * shift))
                return seen(layer(w, x))

            x = jax.jit(apply)(w, x, x.sum())
        symbolic = jax.custom_jvp(jnp.tanh)
        symbolic.defjvp(lambda p, t: (jnp.tanh(*p), t[0]), symbolic_zeros=True)
        return symbolic(x).sum()

    assert calls(fun, WEIGHTS, X) == []
    closed = jax.make_jaxpr(fun)(WEIGHTS, X)
    found = _repeats.evaluate(closed.jaxpr, [*closed.consts, *WEIGHTS, X])
    np.testing.assert_allclose(found[0], fun(WEIGHTS, X), rtol=1e-12)


def test_one_more_layer_adds_little():
    """What is lowered for a layer more is a call, and not its equations again."""
    x = normal(4, WIDTH)

    def lines(depth):
        def gramian_and_update(weights):
            jac = jaxjd.jac(same_layers, in_axes=(None, 0))(weights, x)
            gramian = jac.gramian()
            return gramian, jac.vjp(gramian[0])

        weights = [jnp.asarray(WEIGHTS[0])] * depth
        lowered = jax.jit(gramian_and_update).lower(weights)
        return len(lowered.as_text().splitlines())

    # A call of the forward pass, of the backward pass, of the contraction and of the
    # weight gradient, and what sums and zeros stand between them.
    assert lines(12) - lines(11) <= 16


@pytest.mark.slow
def test_layers_are_compiled_once_outside_of_jit(caplog):
    """A function that is traced anew has layers equal to those of before."""
    x = normal(4, WIDTH)

    def compiled():
        caplog.clear()
        with jax.log_compiles():
            jaxjd.jac(same_layers, in_axes=(None, 0))(WEIGHTS, x)
        messages = [record.getMessage() for record in caplog.records]
        return any("Compiling" in text and "repeated" in text for text in messages)

    jax.clear_caches()
    assert compiled()
    assert not compiled()


def test_losses_at_each_layer_do_not_reach_the_heads_of_others():
    """A repeated part returns a loss and what goes on to the next part."""

    def losses(params):
        h, found = jnp.asarray(X), []
        for w, head in params:
            h = layer(w, h)
            found.append(jnp.sum(jnp.sin(h @ head) ** 2))
        return found

    heads = [normal(WIDTH, 2, seed=n) for n in range(DEPTH)]
    params = list(zip(WEIGHTS, heads, strict=True))
    assert calls(losses, params) == [DEPTH]
    rows = jax.jacrev(lambda p: jnp.stack(losses(p)))(params)
    operators = {}

    @jax.jit
    def both(params):
        jacobians = {
            method: jaxjd.jac(losses, method=method)(params)
            for method in ("dense", "structured")
        }
        operators.update({m: jac._operator for m, jac in jacobians.items()})
        return [jac.dense() for jac in jacobians.values()]

    for found in both(params):
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12),
            found,
            rows,
        )
    dense = operators["dense"]
    assert isinstance(dense, engine.Dense)
    # Layer n reaches the losses from its own on, its head only that one.
    everything = tuple(range(DEPTH))
    wanted = [places for n in everything for places in (everything[n:], (n,))]
    assert list(dense.places) == wanted


def test_an_operand_in_two_places():
    """Two uses of the same shapes, of which one takes the same index twice."""

    def fun(p, i, j):
        both = lax.dynamic_slice(p["a"], (i, i), (2, 2))
        apart = lax.dynamic_slice(p["b"], (i, j), (2, 2))
        return jnp.sum(jnp.sin(both) * jnp.cos(apart))

    params = {name: normal(4, 4, seed=n) for n, name in enumerate("ab")}
    i, j = jnp.array([0, 1]), jnp.array([2, 0])
    weights = jnp.array([0.3, -2.0])

    @jax.jit
    def products(params):
        jac = jaxjd.jac(fun, in_axes=(None, 0, 0))(params, i, j)
        return jac.gramian(), jac.vjp(weights)

    gramian, combined = products(params)
    rows = jax.vmap(jax.grad(fun), (None, 0, 0))(params, i, j)
    flat = jnp.concatenate([x.reshape(2, -1) for x in jax.tree.leaves(rows)], 1)
    np.testing.assert_allclose(gramian, flat @ flat.T, rtol=1e-12)
    wanted = jax.tree.map(lambda x: jnp.tensordot(weights, x, 1), rows)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12),
        combined,
        wanted,
    )
