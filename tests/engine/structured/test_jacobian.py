"""Does the structured Jacobian do all that a Jacobian must, whole and by chunks?"""

import functools

import jax
import jax.numpy as jnp
import pytest

import jaxjd
from jaxjd import engine
from jaxjd.engine.structured import StructuredChunks, plan, structured
from tests.engine.structured.conftest import (
    brute_force,
    normal,
    quickly,
    relative,
    traced,
)
from tests.xla import NORMAL

m = 7


def two_losses(p, x):
    """Two losses per example; a scan; a parameter used directly, one through a rule."""

    def step(h, x):
        return jnp.tanh(h @ p["w"] + x * p["b"][None]), None

    h, _ = jax.lax.scan(step, x[0][None] @ p["u"], x[1])
    return jnp.stack([h.sum(), (h**2).sum()])


PARAMS = {"b": normal(4), "u": normal(3, 4), "unused": normal(2), "w": normal(4, 4)}
EXAMPLES = (normal(m, 3), normal(m, 5))


def fun(p, x, y):
    return two_losses(p, (x, y))


def chunked(chunk_size, params=PARAMS):
    function, inputs, places, _, _ = engine.trace(
        lambda *args: (fun(*args), None),
        (params, *EXAMPLES),
        (None, 0, 0),
        identity=fun,
    )
    return structured(plan(function, places[: len(params)]), inputs, chunk_size)


@functools.cache  # Not of a wider scope, where float64 is not yet on.
def both():
    jacobian = quickly(lambda p: traced(fun, p, *EXAMPLES)[0], PARAMS)
    return jacobian, quickly(lambda p: brute_force(fun, p, *EXAMPLES), PARAMS)


@pytest.fixture
def expected():
    return both()[1]


@pytest.fixture
def jacobian():
    return both()[0]


def gramian_of(rows):
    flat = [leaf.reshape(len(leaf), -1) for leaf in rows]
    return sum(leaf @ leaf.T for leaf in flat)


def test_losses_and_rows(expected):
    _, losses, paths = traced(fun, PARAMS, *EXAMPLES)
    assert paths == [f"['{name}']" for name in PARAMS]
    assert relative(losses[0].ravel(), expected[0]) < 1e-12


def test_rows(jacobian, expected):
    for actual, row in zip(
        quickly(lambda j: j.rows(), jacobian), expected[1], strict=True
    ):
        assert relative(actual, row) < 1e-9


def test_rows_at(jacobian, expected):
    indices = jnp.array([3, 3, 0, 13])
    rows = quickly(lambda j, indices: j.rows_at(indices), jacobian, indices)
    for actual, row in zip(rows, expected[1], strict=True):
        assert relative(actual, row[indices]) < 1e-9


def test_jvp(jacobian, expected):
    tangents = [normal(*leaf.shape[1:], seed=9) for leaf in expected[1]]
    wanted = sum(
        leaf.reshape(len(leaf), -1) @ tangent.ravel()
        for leaf, tangent in zip(expected[1], tangents, strict=True)
    )
    actual = quickly(lambda j, t: j.jvp(t), jacobian, tangents)
    assert relative(actual, wanted) < 1e-9


@pytest.mark.parametrize("kept", [[0], [3, 1], [2]])
def test_restricted(jacobian, expected, kept):
    weights = jnp.asarray(normal(2 * m))

    def products(jacobian):
        restricted = jacobian.restrict(kept)
        return restricted.gramian(), restricted.vjp(weights)

    gramian, combined = quickly(products, jacobian)
    rows = [expected[1][n] for n in kept]
    assert relative(gramian, gramian_of(rows)) < 1e-9
    for actual, row in zip(combined, rows, strict=True):
        assert relative(actual, jnp.tensordot(weights, row, 1)) < 1e-9


def test_leaves_jit_and_is_carried_by_scan(expected):
    make = jax.jit(lambda p: traced(fun, p, *EXAMPLES)[0])

    def step(jacobian, shift):
        moved = {name: value + shift for name, value in PARAMS.items()}
        return make(moved), jacobian.gramian()

    last, gramians = jax.lax.scan(step, make(PARAMS), jnp.array([0.1, 0.0]))
    assert relative(gramians[0], gramian_of(expected[1])) < 1e-9
    assert relative(last.gramian(), gramian_of(expected[1])) < 1e-9
    assert relative(gramians[1], gramian_of(expected[1])) > 1e-3


def test_passes_are_made_once():
    """The Gramian and the combination need one loop forward and one backward."""

    def step(params):
        jacobian, losses, _ = traced(fun, params, *EXAMPLES)
        return losses, jacobian.vjp(jacobian.gramian()[0])

    text = jax.jit(step).lower(PARAMS).compile(NORMAL).as_text()
    assert text.count(" while(") == 2


@pytest.mark.parametrize("chunk_size", [1, 5, 6, 13])
def test_chunks(expected, chunk_size):
    weights = jnp.asarray(normal(2 * m))

    def products(params):
        jacobian, (losses, _) = chunked(chunk_size, params)
        assert isinstance(jacobian, StructuredChunks)
        last = jacobian.restrict([3])
        return losses[0], jacobian.gramian(), jacobian.vjp(weights), last.gramian()

    losses, gramian, combined, last = quickly(products, PARAMS)
    assert relative(losses.ravel(), expected[0]) < 1e-12
    assert relative(gramian, gramian_of(expected[1])) < 1e-9
    assert (gramian == gramian.T).all()
    for actual, row in zip(combined, expected[1], strict=True):
        assert jnp.abs(actual - jnp.tensordot(weights, row, 1)).max() < 1e-9
    assert relative(last, gramian_of([expected[1][3]])) < 1e-9


def test_chunks_need_less_memory():
    def temporary(chunk_size):
        x = jax.ShapeDtypeStruct((64, 32, 32), jnp.float32)

        def fun(w, x):
            return jnp.sum(jax.lax.fori_loop(0, 4, lambda _, h: jnp.tanh(h @ w), x))

        def gramian(w, x):
            function, inputs, places, _, _ = engine.trace(
                lambda *args: (fun(*args), None), (w, x), (None, 0), identity=fun
            )
            found = plan(function, places[:1])
            return structured(found, inputs, chunk_size)[0].gramian()

        w = jax.ShapeDtypeStruct((32, 32), jnp.float32)
        compiled = jax.jit(gramian).lower(w, x).compile(NORMAL)
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(8) < temporary(None) / 3


def test_all_losses_at_once(expected):
    """What is no parameter is the one example; `u` and `w` have rules as ever."""

    def losses(p):
        return jax.vmap(lambda x, y: fun(p, x, y))(*EXAMPLES)

    function, inputs, places, _, _ = engine.trace(
        lambda p: (losses(p), None), (PARAMS,), None, identity=losses
    )

    def gramian(inputs):
        jacobian, (values, _) = structured(plan(function, places), inputs)
        assert {places[0]} == jacobian.plan.direct.keys()
        return values[0].ravel(), jacobian.gramian()

    values, gramian = quickly(gramian, inputs)
    assert relative(values, expected[0]) < 1e-12
    assert relative(gramian, gramian_of(expected[1])) < 1e-9


def test_strict_promotion(x64):
    """Nothing is cast or broadcast in silence."""
    params = jax.tree.map(jnp.asarray, PARAMS)

    def everything(params):
        jacobian, _, _ = traced(fun, params, *EXAMPLES)
        rows = jacobian.rows_at(jnp.array([0]))
        products = jacobian.gramian(), jacobian.jvp([x[0] for x in rows])
        return products, jacobian.vjp(products[1]), chunked(4, params)[0].gramian()

    jax.eval_shape(everything, params)


def test_aux_comes_from_the_same_pass():
    def losses_and_aux(p, x):
        h = x @ p
        return jnp.sum(h), {"h": h, "p": p}

    p, x = normal(4, 2), normal(m, 4)
    function, inputs, places, _, _ = engine.trace(
        losses_and_aux, (p, x), (None, 0), identity=losses_and_aux
    )
    _, outputs = structured(plan(function, places[:1]), inputs)
    wanted = function.all_outputs(inputs)
    for actual, value in zip(
        jax.tree.leaves(outputs), jax.tree.leaves(wanted), strict=True
    ):
        assert actual.shape == value.shape
        assert relative(actual, value) < 1e-12


class TestParts:
    """Rows that are formed are multiplied in parts, here 3, not all equally large."""

    w = normal(12, 16)
    x = normal(50, 2, 12)

    @staticmethod
    def fun(p, x):
        y = jnp.tanh(x @ p["w"])
        return jnp.stack([y.sum(), (y**2).sum()])

    def step(self, p):
        jac = jaxjd.jac(self.fun, in_axes=(None, 0), contraction="rows")(p, self.x)
        gramian = jac.gramian()
        return gramian, jac.vjp(jnp.arange(100.0) + 0 * gramian[0])

    def test_equals_brute_force(self):
        params = {"w": jnp.asarray(self.w)}
        gramian, combined = quickly(self.step, params)
        _, (rows,) = brute_force(self.fun, params, self.x)
        assert relative(gramian, jnp.einsum("aio,bio->ab", rows, rows)) < 1e-12
        assert (gramian == gramian.T).all()
        wanted = jnp.einsum("a,aio->io", jnp.arange(100.0), rows)
        assert relative(combined["w"], wanted) < 1e-12

    def test_half_of_the_gramian(self):
        """Forming the rows takes 4 operations per entry, the whole Gramian 200."""
        lowered = jax.jit(self.step).lower({"w": jnp.asarray(self.w)})
        operations = lowered.compile(NORMAL).cost_analysis()["flops"]
        assert operations < 150 * 100 * self.w.size
