"""What a Gramian and weights say of a step, against the rows themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxjd
from tests import models


def expected(J, w, present):
    """By numpy, from the rows of the losses that are present."""
    update, rows = w[present] @ J[present], J[present]
    norms = np.linalg.norm(J, axis=1)
    cosine = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)  # noqa: E731
    pairs = [(i, j) for i in range(len(rows)) for j in range(i)]
    shares = np.abs(w[present]) / np.abs(w[present]).sum()
    positive = shares[shares > 0]
    return jaxjd.Diagnostics(
        weights=np.where(present, w, 0),
        norms=norms,
        cosines=(J @ J.T) / np.outer(norms, norms),
        conflicting=np.mean([rows[i] @ rows[j] < 0 for i, j in pairs]),
        agreement=[p * cosine(row, update) for p, row in zip(present, J, strict=True)],
        changes=-J @ update,
        cosine_to_mean=cosine(rows.mean(0), update),
        effective_losses=1 / np.sum(shares**2),
        entropy=-np.sum(positive * np.log(positive)),
    )


@pytest.mark.parametrize("missing", [None, 2])
@pytest.mark.parametrize("scale", [1.0, 1e-18, 1e18])
def test_against_the_rows(x64, missing, scale):
    rng = np.random.default_rng(0)
    J, w = rng.normal(size=(5, 9)) * scale, rng.normal(size=5)
    w[1] = 0
    present = np.arange(5) != missing
    found = jaxjd.diagnostics(jnp.asarray(J @ J.T), jnp.asarray(w), mask=present)
    for name, value in expected(J, w, present)._asdict().items():
        np.testing.assert_allclose(
            getattr(found, name), value, rtol=1e-12, err_msg=name
        )


def test_a_gradient_of_zero_and_one_loss():
    found = jaxjd.diagnostics(jnp.zeros((1, 1)), jnp.ones(1))
    assert found.effective_losses == 1
    assert not any(np.any(x) for x in found._replace(weights=0, effective_losses=0))


def test_nan_in_nan_out():
    gramian = jnp.eye(3).at[1, 2].set(jnp.nan).at[2, 1].set(jnp.nan)
    found = jaxjd.diagnostics(gramian, jnp.ones(3))
    for name in ("conflicting", "cosine_to_mean"):
        assert np.isnan(getattr(found, name)), name
    assert np.isnan(found.agreement).all()


@pytest.mark.parametrize("options", [{"every": 2}, {"group": "leaf"}])
def test_kept_in_the_state_of_a_chain(x64, options):
    """Carried by a scan; of the Gramian that the weights came from."""
    params, (x, y) = models.parameters(), models.examples(4)
    fun = models.batched(models.loss)
    upgrad = jaxjd.weighting.upgrad()
    tx = optax.chain(
        jaxjd.aggregate(upgrad, diagnostics=True, num_losses=4, **options),
        optax.sgd(0.0),
    )

    @jax.jit
    def train(params):
        def step(state, scale):
            jac = jaxjd.jac(fun)(params, scale * x, y)
            _, state = tx.update(jac, state, params)
            kept = optax.tree.get(state, "diagnostics")
            return state, (kept, jac.dense())

        return jax.lax.scan(step, tx.init(params), jnp.arange(1.0, 4.0))[1]

    kept, rows = train(params)
    for n in range(3):
        computed = n - n % options.get("every", 1)
        leaves = [np.asarray(x)[computed].reshape(4, -1) for x in jax.tree.leaves(rows)]
        groups = leaves if "group" in options else [np.concatenate(leaves, 1)]
        for g, J in enumerate(groups):
            w = upgrad(jnp.asarray(J @ J.T))
            for name, value in (
                jaxjd.diagnostics(jnp.asarray(J @ J.T), w)._asdict().items()
            ):
                found = getattr(kept, name)[n]
                found = found[g] if "group" in options else found
                np.testing.assert_allclose(
                    found, value, rtol=1e-8, atol=1e-9, err_msg=name
                )


def test_errors():
    with pytest.raises(ValueError, match="`weights` must have one entry for each of"):
        jaxjd.diagnostics(jnp.eye(3), jnp.ones(2))
    with pytest.raises(ValueError, match="`gramian` must be a square matrix"):
        jaxjd.diagnostics(jnp.ones((2, 3)), jnp.ones(2))
    with pytest.raises(ValueError, match="`num_losses` must be given"):
        jaxjd.aggregate(jaxjd.weighting.upgrad(), diagnostics=True)
