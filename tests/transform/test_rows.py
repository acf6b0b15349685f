"""Aggregators that need the rows of J do not hold all of J in memory."""

import jax
import jax.numpy as jnp
import pytest
from numpy.testing import assert_allclose

import jaxjd
from jaxjd.transform._rows import by_parameter, sum_over_rows
from tests import models
from tests.xla import NORMAL

M, WIDTH, LAYERS = 32, 128, 4


def loss(params, x):
    for weight in params:
        x = jnp.tanh(x @ weight)
    return x.sum()


@pytest.mark.parametrize(
    ("make", "chunk_size", "share"),
    [
        # Blocks of a quarter of one parameter's rows, with copies, and the sums.
        (jaxjd.graddrop, None, 0.4),
        (lambda: jaxjd.graddrop([0.5] * M), None, 0.6),
        (lambda: jaxjd.graddrop([0.5] * M), 8, 0.6),
        # The rows of one parameter of four, and as much again for intermediate values.
        (lambda: jaxjd.trimmed_mean(2), None, 0.6),
        (lambda: jaxjd.excess_mtl(num_losses=M), None, 0.6),
    ],
)
def test_not_all_of_a_structured_jacobian(make, chunk_size, share):
    params = [jnp.zeros((WIDTH, WIDTH), jnp.float32)] * LAYERS
    x = jnp.zeros((M, WIDTH), jnp.float32)
    tx = make()

    def step(params, state, x):
        jac = jaxjd.jac(loss, in_axes=(None, 0), chunk_size=chunk_size)(params, x)
        return tx.update(jac, state, params)

    compiled = jax.jit(step).lower(params, tx.init(params), x).compile(NORMAL)
    memory = compiled.memory_analysis().temp_size_in_bytes
    assert memory < share * 4 * M * LAYERS * WIDTH**2


def test_rows_come_in_the_order_of_the_losses(x64):
    """Rows come by parameter or in blocks, of which the last is not full."""
    params = models.parameters()
    coefficients = jnp.arange(21.0)
    mask = coefficients != 4

    @jax.jit
    def both(x, y):
        jac = jaxjd.jac(models.task_losses, in_axes=(None, 0, 0))(params, x, y)
        chunked = jaxjd.jac(
            models.task_losses, in_axes=(None, 0, 0), method="chunked", chunk_size=10
        )(params, x, y)
        sums = [
            sum_over_rows(
                one, mask, coefficients, lambda rows, c: jnp.tensordot(c, rows, 1)
            )
            for one in (jac, chunked)
        ]
        numbers = [jnp.array(n) for n in range(3)]
        each = by_parameter(jac, lambda rows, n: (rows, n), numbers)
        return jac.dense(), each, sums

    dense, each, sums = both(*models.examples(7))
    leaves = jax.tree.leaves(dense)
    for n, leaf in enumerate(leaves):
        assert_allclose(each[n][0], leaf, rtol=1e-12)
        assert each[n][1] == n
        expected = jnp.tensordot(jnp.where(mask, coefficients, 0), leaf, 1)
        for one in sums:
            assert_allclose(one[n], expected, rtol=1e-9)
