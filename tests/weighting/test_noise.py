"""UPGrad and DualProj ignore noise, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import jaxjd
from tests.solvers import problems

both = pytest.mark.parametrize("name", ["upgrad", "dualproj"])
M, N = 6, 12


def jacobian():
    """Two gradients below rounding oppose the others, so the exact update is 0."""
    J = problems.conflicting(np.random.default_rng(0), M)
    J[1] = -J[[0, 2, 3, 4]].sum(0) * 1e-10
    J[5] = -J[[2, 3]].sum(0) * 1e-11
    return J


@both
def test_a_gradient_below_rounding_is_let_go_in_either_precision(name, x64):
    make = getattr(jaxjd.weighting, name)
    J = jacobian()
    mask = np.array([True, False, True, True, True, False])
    without = np.asarray(make(noise_eps=0)(J @ J.T, mask=mask)) @ J
    scale = 4 / M  # The preferences are 1 / M with all six losses, 1 / 4 with four.
    for dtype in (np.float32, np.float64):
        G = (J @ J.T).astype(dtype)
        update = np.asarray(make()(G), float) @ J
        assert_allclose(update, scale * without, atol=1e-5)
        exact = np.asarray(make(noise_eps=0)(G), float) @ J
        assert np.linalg.norm(exact) <= 1e-5 * np.linalg.norm(update)


def test_the_worst_cosines_of_the_page():
    """The row 100 : 1 of the page: conflicting pairs whose norms differ 100 times."""
    rng = np.random.default_rng(2)
    rows = rng.normal(size=(500, 2, 20))
    J = np.array([1, -1])[:, None] * rng.normal(size=(500, 1, 20)) + 0.5 * rows
    J[:, 0] *= 100
    J = J.astype(np.float32)
    torchjd = jaxjd.weighting.upgrad(norm_eps=1e-4, reg_eps=1e-4)
    for weighting, least, most in (
        (jaxjd.weighting.upgrad(), 0, 0.01),
        (torchjd, -0.9, -0.7),
    ):
        weights = jax.jit(jax.vmap(weighting))(J @ J.transpose(0, 2, 1))
        update = np.einsum("bm,bmn->bn", weights, J)
        cosines = np.einsum("bmn,bn->bm", J, update) / np.linalg.norm(J, axis=2)
        cosines /= np.linalg.norm(update, axis=1)[:, None]
        assert least <= cosines.min() <= most


@both
def test_missing_and_zero_gradients_do_not_count(name):
    """Missing and zero gradients do not enter the root mean square of the norms."""
    weighting = getattr(jaxjd.weighting, name)(noise_eps=0.5)
    J = problems.conflicting(np.random.default_rng(1), 4)
    G = (J @ J.T).astype(np.float32)
    padded = np.zeros((M, M), np.float32)
    padded[:4, :4] = G
    alone = weighting(G)
    assert_allclose(weighting(padded)[:4] * M, alone * 4, rtol=1e-5)
    padded[4:] = padded[:, 4:] = 1e3
    mask = np.arange(M) < 4
    masked = weighting(padded, mask=mask)
    assert_allclose(masked[:4], alone, rtol=1e-5)
    assert_array_equal(masked[4:], 0)


@both
def test_every_eps_may_be_traced_and_scheduled(name):
    make = getattr(jaxjd, name)
    rows = problems.conflicting(np.random.default_rng(2), 4).astype(np.float32)
    for options in (
        {"noise_eps": 0.3},
        {"norm_eps": 1e-4, "reg_eps": 1e-2},
        {"reg_eps": 1e-2},
    ):
        tx = optax.inject_hyperparams(make)(**options)
        params = jnp.zeros(rows.shape[1])
        state = jax.jit(tx.init)(params)
        update, _ = jax.jit(tx.update)(rows, state, params)
        plain = make(**options)
        expected, _ = plain.update(rows, plain.init(params), params)
        assert_allclose(update, expected, rtol=1e-5, atol=1e-6)
    # A new value takes effect.
    changed = state._replace(hyperparams=state.hyperparams | {"reg_eps": 1.0})
    assert not np.allclose(jax.jit(tx.update)(rows, changed, params)[0], expected)


@both
def test_bad_hyperparameters_are_refused_where_they_are_written(name):
    make = getattr(jaxjd, name)
    for option in ("noise_eps", "reg_eps"):
        for bad in (-1.0, float("nan"), jnp.float32(-1)):
            with pytest.raises(ValueError, match=f"`{option}` must be in"):
                make(**{option: bad})
    with pytest.raises(ValueError, match="`norm_eps` has no meaning without"):
        make(norm_eps=1e-4)
    with pytest.raises(ValueError, match="`noise_eps` and `reg_eps`.*give one"):
        make(noise_eps=0, reg_eps=1e-4)
