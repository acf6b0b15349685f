"""The chunk that is chosen for a budget of memory, and what its step takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxjd
from jaxjd.jacobian._value_and_jac import choose_method, trace
from tests.xla import NORMAL

AXES = (None, 0, 0)


def normal(*shape):
    return jax.random.normal(jax.random.key(len(shape)), shape, jnp.float32)


def mlp():
    def loss(params, x, y):
        first, second, last = params
        return jnp.sum((jnp.tanh(jnp.tanh(x @ first) @ second) @ last - y) ** 2)

    params = normal(64, 256), normal(256, 256), normal(256, 4)
    return loss, (params, normal(512, 64), normal(512, 4))


def cnn():
    def convolved(x, kernel, stride):
        strides = stride, stride
        found = jax.lax.conv_general_dilated(x[None], kernel, strides, "SAME")
        return jax.nn.relu(found[0])

    def loss(params, x, y):
        first, second, last = params
        h = convolved(convolved(x, first, 1), second, 2)
        return jnp.sum((h.ravel() @ last - y) ** 2)

    params = normal(8, 3, 3, 3), normal(16, 8, 3, 3), normal(16 * 8 * 8, 4)
    return loss, (params, normal(128, 3, 16, 16), normal(128, 4))


def tasks():
    x = normal(512, 32)

    def losses(params):
        h = jnp.tanh(jnp.tanh(x @ params["first"]) @ params["second"])
        return jnp.stack([jnp.mean((h @ head - 1) ** 2) for head in params["heads"]])

    params = {"first": normal(32, 256), "second": normal(256, 256)}
    return losses, ({**params, "heads": normal(16, 256)},)


def temporary(fun, args, **options):
    def step(*args):
        jac = jaxjd.jac(fun, **options)(*args)
        return jac.vjp(jac.gramian()[0])

    compiled = jax.jit(step).lower(*args).compile(NORMAL)
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    ("make", "axes", "method", "budget"),
    [
        (mlp, AXES, "auto", 4e6),
        pytest.param(mlp, AXES, "auto", 2e6, marks=pytest.mark.slow),
        pytest.param(mlp, AXES, "chunked", 40e6, marks=pytest.mark.slow),
        (cnn, AXES, "auto", 4e6),
        pytest.param(cnn, AXES, "auto", 2e6, marks=pytest.mark.slow),
        pytest.param(cnn, AXES, "chunked", 4e6, marks=pytest.mark.slow),
        (tasks, None, "auto", 12e6),
        pytest.param(tasks, None, "auto", 6e6, marks=pytest.mark.slow),
        pytest.param(tasks, None, "auto", 25e6, marks=pytest.mark.slow),
        pytest.param(mlp, AXES, "auto", 20e6, marks=pytest.mark.slow),
    ],
)
def test_a_step_takes_what_was_given(make, axes, method, budget):
    """Never a tenth more, and in chunks not less than a third."""
    fun, args = make()
    options = {
        "in_axes": axes,
        "method": method,
        "chunk_size": "auto",
        "memory": int(budget),
    }
    found = jaxjd.explain(fun, **options)(*args)
    assert found.estimate <= budget
    taken = temporary(fun, args, **options)
    assert taken < 1.1 * budget
    if found.chunk_size is not None:
        assert taken > budget / 3


def chosen(make, axes, budget, method="auto"):
    fun, args = make()
    found = trace(fun, 0, axes, False, args, {})
    return choose_method(found, method, "auto", "auto", int(budget))


def test_the_largest_that_fits():
    """The chunk grows with the budget, and one more example would not fit."""
    sizes = [chosen(mlp, AXES, budget).chunk_size for budget in (2e6, 3e6, 4e6, 6e6)]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 4
    assert chosen(mlp, AXES, 1e9).chunk_size is None
    # None fits: one example for each of two blocks, as few as there may be.
    least = chosen(mlp, AXES, 0)
    assert least.chunk_size == 2
    assert least.estimate > 0
    # All arguments must fit together with the Gramian.
    by_rows = chosen(mlp, AXES, 40e6, "chunked")
    assert 2 < by_rows.chunk_size < chosen(mlp, AXES, 80e6, "chunked").chunk_size


def test_tasks_are_kept_if_they_fit():
    assert chosen(tasks, None, 1e9).method == "dense"
    assert chosen(tasks, None, 1e9).chunk_size is None
    in_chunks = chosen(tasks, None, 12e6)
    assert in_chunks.method == "chunked"
    assert 2 <= in_chunks.chunk_size < 16


def test_the_update_is_the_same_and_is_explained():
    fun, (params, x, y) = mlp()
    few = params, x[:12], y[:12]
    options = {"in_axes": AXES, "chunk_size": "auto", "memory": 400_000}

    @jax.jit
    def gramians(*args):
        both = jaxjd.jac(fun, **options), jaxjd.jac(fun, in_axes=AXES)
        return [jac(*args).gramian() for jac in both]

    found, expected = gramians(*few)
    # Of nearly orthogonal gradients, rounding is relative to the norms.
    norms = jnp.sqrt(jnp.diag(expected))
    cosines = [G / norms[:, None] / norms for G in (found, expected)]
    np.testing.assert_allclose(*cosines, atol=1e-6)
    explanation = jaxjd.explain(fun, **options)(*few)
    assert 2 <= explanation.chunk_size < 12
    size, megabytes = explanation.chunk_size, explanation.estimate / 1e6
    assert f"\nchunk_size: {size}, about {megabytes:.3g} MB" in str(explanation)
    everything = jaxjd.explain(fun, in_axes=AXES, chunk_size="auto")(*few)
    assert "\nchunk_size: everything, about " in str(everything)


def test_errors():
    fun, args = tasks()
    with pytest.raises(ValueError, match="all rows are kept.*Got 'auto'"):
        jaxjd.jac(fun, method="dense", chunk_size="auto")
    with pytest.raises(TypeError, match="an integer, \"auto\" or None. Got 'large'"):
        jaxjd.jac(fun, chunk_size="large")
    with pytest.raises(ValueError, match="function of one example.*chunk_size='auto'"):
        jaxjd.jac(fun, method="structured", chunk_size="auto")(*args)
