"""May every number be a hyperparameter that changes while training?"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose

import jaxjd
from tests.weighting.registry import AGGREGATORS

M = 5
ROWS = jax.random.normal(jax.random.key(0), (M, 6))
PARAMS = jnp.zeros(6)
U = jnp.linspace(0.1, 0.3, M)

# What is optional, given.
OPTIONS = {
    "aligned_mtl": {"preference": U},
    "cagrad": {"preference": U},
    "conflict_free": {"preference": U, "length": 2},
    "cosmos": {"preference": U},
    "cr_mogm": {"initial_weights": U},
    "dualproj": {"norm_eps": 1e-3, "reg_eps": 1e-2, "preference": U},
    "famo": {"reference": U},
    "graddrop": {"leak": U},
    "gradnorm": {"initial_losses": U},
    "pbi": {"preference": U, "reference": U},
    "pcd": {"tau": U[1:]},
    "sdmgrad": {"preference": U},
    "stch": {"preference": U, "reference": U},
    "upgrad": {"noise_eps": 1e-3, "num_losses": M, "warm_start": True},
}


def arguments(name):
    sizes = {}
    parameters = inspect.signature(getattr(jaxjd, name)).parameters
    if "num_losses" in parameters and name not in ("upgrad", "dualproj"):
        sizes["num_losses"] = M
    row = AGGREGATORS[name]
    return row.arguments(M), row.options | sizes | OPTIONS.get(name, {})


def injected(name):
    # A weighting can be called, so optax would take it for a schedule.
    static = "weighting" if name == "cr_mogm" else ()
    args, kwargs = arguments(name)
    return optax.inject_hyperparams(getattr(jaxjd, name), static)(*args, **kwargs)


def update(tx):
    losses = jnp.arange(1.0, M + 1)
    extra_args = {
        "cross_gramian": ROWS @ ROWS.T,
        "losses": losses,
        "losses_after": losses,
    }
    return lambda state: tx.update(ROWS, state, PARAMS, **extra_args)


def close(actual, expected):
    def numbers(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(x) if is_key else x

    jax.tree.map(
        lambda a, b: assert_allclose(numbers(a), numbers(b), rtol=1e-5, atol=1e-6),
        actual,
        expected,
    )


@pytest.mark.parametrize("name", AGGREGATORS)
def test_of_every_aggregator(name):
    """Under jit they are traced, and the update is that of the same constants."""
    args, kwargs = arguments(name)
    plain, changing = getattr(jaxjd, name)(*args, **kwargs), injected(name)
    state = changing.init(PARAMS)
    before = plain.init(PARAMS)
    close(state.inner_state, before)
    if not state.hyperparams:
        jax.eval_shape(update(changing), state)
        return
    both = jax.jit(lambda one, other: (update(plain)(one), update(changing)(other)))
    (expected, after), (actual, changed) = both(before, state)
    close(actual, expected)
    close(changed.inner_state, after)


def test_a_schedule():
    """The radius of CAGrad's ball grows, from the mean gradient on."""
    tx = optax.inject_hyperparams(jaxjd.cagrad)(optax.linear_schedule(0.0, 1.0, 2))
    state = tx.init(PARAMS)
    step = jax.jit(lambda state: tx.update(ROWS, state, PARAMS))
    for c in (0.0, 0.5, 1.0):
        given, state = step(state)
        weights = jaxjd.weighting.cagrad(c)(ROWS @ ROWS.T)
        assert_allclose(given, weights @ ROWS, rtol=1e-4, atol=1e-5)


def test_in_float64_the_hyperparameters_may_be_narrower(x64):
    J = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)))
    narrow = jnp.float32(0.5)
    for make in (
        lambda c: jaxjd.weighting.cagrad(c),
        lambda alpha: jaxjd.weighting.fairgrad(alpha),
        lambda eps: jaxjd.weighting.regularize(jaxjd.weighting.mean(), eps),
        lambda eps: jaxjd.weighting.upgrad(noise_eps=eps),
    ):
        weights = jax.eval_shape(lambda x, make=make: make(x)(J @ J.T), narrow)
        assert weights.dtype == jnp.float64


def test_what_shapes_the_state():
    """Is known in `init` outside of jit. Inside of one it is a static argument."""
    tx = optax.inject_hyperparams(jaxjd.gradvac)(num_losses=M)
    message = "`num_losses` must be a number .* `static_args='num_losses'`"
    with pytest.raises(TypeError, match=message):
        jax.jit(tx.init)(PARAMS)
    make = optax.inject_hyperparams(jaxjd.gradvac, static_args="num_losses")
    jax.eval_shape(make(num_losses=M).init, PARAMS)


def test_what_shapes_the_computation():
    tx = optax.inject_hyperparams(jaxjd.mgda)(frank_wolfe_steps=5)
    with pytest.raises(TypeError, match="say `static_args='frank_wolfe_steps'`"):
        jax.eval_shape(update(tx), tx.init(PARAMS))


def test_what_can_be_called_is_no_schedule():
    args, kwargs = arguments("cr_mogm")
    with pytest.raises(TypeError, match="say `static_args='weighting'`"):
        optax.inject_hyperparams(jaxjd.cr_mogm)(*args, **kwargs).init(PARAMS)
    make = optax.inject_hyperparams(jaxjd.graddrop)
    with pytest.raises(TypeError, match="say `static_args='keep_probability'`"):
        make(keep_probability=jnp.square).init(PARAMS)


def test_values_that_are_known_are_checked():
    tx = optax.inject_hyperparams(jaxjd.cagrad)(jnp.float32(-1))
    with pytest.raises(ValueError, match=r"`c` must be in \[0, inf\). Got"):
        tx.init(PARAMS)
    for wrong in (jnp.ones(2), jnp.array(True), "1", 1j):
        with pytest.raises(TypeError, match="`c` must be a real number. Got"):
            jaxjd.weighting.cagrad(wrong)
