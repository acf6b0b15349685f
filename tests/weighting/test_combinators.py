"""Combinators show a weighting the Gramian that they promise, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import jaxjd

M = 4
MAKE = {
    "normalize": jaxjd.weighting.normalize,
    "regularize": lambda weighting: jaxjd.weighting.regularize(weighting, 1e-2),
    "scale_by_losses": jaxjd.weighting.scale_by_losses,
}
every = pytest.mark.parametrize("name", MAKE)
# A dict of losses, which are ordered by their keys.
LOSSES = {"a": jnp.array([[2.0, 0.5]]), "b": jnp.array([3.0, 1e-3])}
MASK = jnp.array([True, False, True, True])


def gradients():
    rng = np.random.default_rng(0)
    return rng.normal(size=(M, 6)) * np.array([[1e-3], [1], [30], [2]])


def seen(name, gramian, **kwargs):
    """Return the weights, and the Gramian and arguments seen by the inner weighting."""
    calls = []

    def update(gramian, state, /, **kwargs):
        calls.append((gramian, kwargs))
        return jnp.ones(len(gramian)), state + 1

    weighting = MAKE[name](jaxjd.Weighting(lambda: jnp.zeros(()), update))
    state = weighting.init()
    weights, state = weighting.update(gramian, state, losses=LOSSES, **kwargs)
    assert state == 1
    return weights, *calls[0]


@every
def test_state_mask_and_extra_arguments_are_passed_on(name):
    J = gradients()
    _, gramian, kwargs = seen(name, jnp.asarray(J @ J.T), mask=MASK, other=3)
    assert_array_equal(kwargs["mask"], MASK)
    assert kwargs["other"] == 3
    assert kwargs["losses"] is LOSSES
    # The row of the missing loss is set to zero first.
    assert_allclose(gramian[1], [0, 1e-2 * (name == "regularize"), 0, 0], rtol=1e-6)


def test_normalize():
    J = gradients()
    J[1] = 0
    weights, gramian, _ = seen("normalize", jnp.asarray(J @ J.T))
    norms = np.array([np.linalg.norm(g) if g.any() else 1 for g in J])
    units = J / norms[:, None]
    assert_allclose(gramian, units @ units.T, atol=1e-6)
    assert_allclose(weights, 1 / norms, rtol=1e-5)


def test_regularize():
    J = gradients()
    weights, gramian, _ = seen("regularize", jnp.asarray(J @ J.T))
    expected = J @ J.T / np.trace(J @ J.T) + 1e-2 * np.eye(M)
    assert_allclose(gramian, expected, rtol=1e-5, atol=1e-7)
    assert_array_equal(weights, 1)
    # The trace is that of the present losses; a zero Gramian stays finite.
    _, gramian, _ = seen("regularize", jnp.asarray(J @ J.T), mask=MASK)
    assert_allclose(jnp.trace(gramian), 1 + M * 1e-2, rtol=1e-5)
    _, gramian, _ = seen("regularize", jnp.zeros((M, M)))
    assert_allclose(gramian, 1e-2 * np.eye(M), rtol=1e-6)


def test_scale_by_losses():
    """The weighting sees the gradients of the logarithms of the losses."""
    J = gradients()
    weights, gramian, _ = seen("scale_by_losses", jnp.asarray(J @ J.T))
    values = np.array([2, 0.5, 3, 1e-3])
    scaled = J / values[:, None]
    assert_allclose(gramian, scaled @ scaled.T, rtol=1e-4, atol=1e-6)
    assert_allclose(weights, 1 / values, rtol=1e-6)


def test_losses_that_are_missing_may_have_any_value():
    weighting = jaxjd.weighting.scale_by_losses(jaxjd.weighting.imtl_g())
    J = gradients()
    G = jnp.asarray(J @ J.T)
    one, _ = weighting.update(
        G, weighting.init(), mask=MASK, losses=jnp.array([1.0, 0.0, 2.0, 3.0])
    )
    other, _ = weighting.update(
        G, weighting.init(), mask=MASK, losses=jnp.array([1.0, jnp.nan, 2.0, 3.0])
    )
    assert jnp.isfinite(one).all()
    assert_array_equal(one, other)


def test_in_a_transformation():
    """With `sum`, the update is the gradient of the sum of the logarithms."""

    def losses(params):
        return jnp.stack([params[0] ** 2 + 1, jnp.exp(params[1]), params.sum() ** 4])

    params = jnp.array([0.5, 1.0])
    scaled = jaxjd.weighting.scale_by_losses(jaxjd.weighting.sum())
    tx = jaxjd.aggregate(scaled)
    values, jac = jaxjd.value_and_jac(losses)(params)
    update, _ = tx.update(jac, tx.init(params), params, losses=values)
    expected = jax.grad(lambda params: jnp.log(losses(params)).sum())(params)
    assert_allclose(update, expected, rtol=1e-5)


@every
def test_a_gramian_that_is_not_finite(name):
    weighting = MAKE[name](jaxjd.weighting.imtl_g())
    spoilt = jnp.eye(M).at[1, 1].set(jnp.nan)
    weights, _ = weighting.update(spoilt, weighting.init(), losses=jnp.ones(M))
    assert jnp.isnan(weights).all()
    weights, _ = weighting.update(
        spoilt, weighting.init(), losses=jnp.ones(M), mask=MASK
    )
    assert_allclose(weights, MASK / 3, rtol=1e-5)


@every
def test_what_is_not_a_weighting(name):
    for given, message in {
        jaxjd.mean(): "transformation: write `jaxjd.weighting.NAME",
        jaxjd.mean: r"makes one: write `jaxjd.weighting.mean\(...\)`",
        jaxjd.weighting.mean: r"makes one: write `jaxjd.weighting.mean\(...\)`",
        jnp.diagonal: r"a function: one of a Gramian becomes `jaxjd.Weighting\(init",
        "mean": "Got 'mean'",
    }.items():
        with pytest.raises(TypeError, match=f"`weighting` must be .*{message}"):
            MAKE[name](given)
    with pytest.raises(TypeError, match="Got a Jacobian, which the update of"):
        MAKE[name](jaxjd.jac(jnp.square)(jnp.ones(3)))


def test_without_losses():
    weighting = jaxjd.weighting.scale_by_losses(jaxjd.weighting.mean())
    with pytest.raises(ValueError, match="`losses` must be given to the update"):
        weighting(jnp.eye(M))
    with pytest.raises(ValueError, match="each of the 4 losses. Got 3"):
        weighting.update(jnp.eye(M), weighting.init(), losses=jnp.ones((3, 1)))
