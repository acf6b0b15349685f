"""Do operators of all kinds multiply with each other?"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxjd
from jaxjd import engine
from tests import models

KINDS = {
    "dense": {"method": "dense"},
    "chunked": {"method": "chunked"},
    "chunked by 4": {"method": "chunked", "chunk_size": 4},
    "structured": {},
    "structured by 7": {"chunk_size": 7},
    "structured by pairs": {"contraction": "pairs"},  # Of another plan.
}


def operators(params, *examples):
    make = {
        kind: jaxjd.jac(models.task_losses, in_axes=(None, 0, 0), **options)
        for kind, options in KINDS.items()
    }
    return {kind: jac(params, *examples)._operator for kind, jac in make.items()}


def rows(params, *examples):
    """[m, n], the losses of an example side by side."""

    def losses(params):
        by_example = jax.vmap(models.task_losses, (None, 0, 0))(params, *examples)
        return jnp.concatenate(
            [by_example["fit"][:, None], by_example["moments"]], axis=1
        ).ravel()

    return models.ravel_rows(jax.jacrev(losses)(params))


def test_products_of_all_pairs(x64):
    """15 and 9 losses, in blocks that do not divide them."""
    params = models.parameters()
    one = models.examples(5)
    two = tuple(x[:3] + 1 for x in models.examples(4))
    J1, J2 = rows(params, *one), rows(params, *two)

    @jax.jit
    def everything(params, one, two):
        left, right = operators(params, *one), operators(params, *two)
        pairs = {
            (x, y): left[x].products(right[y])
            for x, y in itertools.product(KINDS, KINDS)
        }
        # Whose rows are formed a few at a time, because the others' are no factors.
        some = {kind: of.restrict([2, 0]) for kind, of in left.items()}
        restricted = {kind: of.products(some["dense"]) for kind, of in some.items()}
        gramians = {kind: of.gramian() for kind, of in left.items()}
        norms = {kind: of.squared_norms() for kind, of in left.items()}
        alone = {kind: of.backward()(weights) for kind, of in left.items()}
        return pairs, restricted, gramians, norms, alone

    weights = jnp.linspace(-1.0, 2.0, 15)
    pairs, restricted, gramians, norms, alone = everything(params, one, two)
    for kinds, product in pairs.items():
        np.testing.assert_allclose(product, J1 @ J2.T, rtol=1e-10, err_msg=str(kinds))
    # Leaves are `hidden[0]` [5, 3], `hidden[1]` [3] and `scale`.
    kept = jnp.delete(J1, jnp.arange(15, 18), axis=1)
    for kind in KINDS:
        np.testing.assert_allclose(
            restricted[kind], kept @ kept.T, rtol=1e-10, err_msg=kind
        )
        np.testing.assert_allclose(gramians[kind], J1 @ J1.T, rtol=1e-10, err_msg=kind)
        assert (gramians[kind] == gramians[kind].T).all()
        np.testing.assert_allclose(
            norms[kind], jnp.diag(J1 @ J1.T), rtol=1e-10, err_msg=kind
        )
        combination = np.concatenate([np.ravel(leaf) for leaf in alone[kind]])
        np.testing.assert_allclose(
            combination, weights @ J1, rtol=1e-10, atol=1e-12, err_msg=kind
        )


@pytest.mark.parametrize("kind", KINDS)
def test_operator_is_described(kind):
    params = models.parameters(jnp.float32)
    params["scale"] = params["scale"].astype(jnp.bfloat16)
    operator = jax.eval_shape(operators, params, *models.examples(5, jnp.float32))[kind]
    assert isinstance(operator, engine.Operator)
    assert operator.method == kind.partition(" ")[0]
    assert operator.num_rows == 15
    assert 1 <= operator.block_size() <= 15
    shapes = [(15, 5, 3), (15, 3), (15,)]
    of_rows = jax.eval_shape(lambda of: of.rows(), operator)
    assert [x.shape for x in of_rows] == shapes
    assert [x.dtype for x in of_rows] == operator.dtypes


@pytest.mark.parametrize("of_two_functions", [False, True])
def test_two_batches_without_their_rows(of_two_functions):
    """As structured as the Gramian: no more memory than for that of both."""
    width, m = 128, 64
    params = [jnp.zeros((width, width), jnp.float32)] * 4

    def loss(params, x):
        for weight in params:
            x = jnp.tanh(x @ weight)
        return x.sum()

    def another(params, shift, x):
        return loss(params, x + shift) ** 2

    def memory(chunk_size):
        jac = jaxjd.jac(loss, in_axes=(None, 0), chunk_size=chunk_size)
        other = jaxjd.jac(another, in_axes=(None, None, 0), chunk_size=chunk_size)

        def cross(params, x, y):
            if of_two_functions:
                return jac(params, x).cross_gramian(other(params, jnp.float32(1), y))
            return jac(params, x).cross_gramian(jac(params, y))

        x = jnp.zeros((m, width), jnp.float32)
        compiled = jax.jit(cross).lower(params, x, x[1:]).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    rows_of_one_layer = 4 * m * width**2
    assert memory(None) < rows_of_one_layer / 4
    assert memory(16) < rows_of_one_layer / 4
