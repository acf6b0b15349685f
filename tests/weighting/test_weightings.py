"""The registry: what every weighting does, a row each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import jaxjd

M = 6
ROWS = {
    "constant": lambda: jaxjd.weighting.constant(jnp.linspace(-1.0, 2.0, M)),
    "dualproj": jaxjd.weighting.dualproj,
    "mean": jaxjd.weighting.mean,
    "sum": jaxjd.weighting.sum,
    "upgrad": jaxjd.weighting.upgrad,
}
every = pytest.mark.parametrize("name", ROWS)


def gramian(key=0, rank=M, dtype=jnp.float32):
    rows = jax.random.normal(jax.random.key(key), (M, rank), dtype)
    return rows @ rows.T


def test_the_registry_is_complete():
    exported = {
        name for name in vars(jaxjd.weighting) if name[0].islower() and name[0] != "_"
    }
    modules = {name for name in exported if "_" + name in vars(jaxjd.weighting)}
    assert exported == set(ROWS) == modules
    assert all(callable(getattr(jaxjd, name)) for name in ROWS)


@every
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64, jnp.bfloat16])
def test_dtypes(name, dtype, x64):
    weights = ROWS[name]()(gramian(dtype=jnp.float32).astype(dtype))
    assert weights.dtype == (jnp.float64 if dtype == jnp.float64 else jnp.float32)
    assert jnp.isfinite(weights).all()


@every
def test_does_not_compile_again(name):
    traces = []

    @jax.jit
    def weights(gramian):
        traces.append(gramian)
        return ROWS[name]()(gramian)

    first, second = weights(gramian(0)), weights(gramian(1))
    assert len(traces) == 1
    # Outside of jit the same numbers come out, up to another order of summation.
    assert_allclose(first, ROWS[name]()(gramian(0)), rtol=2e-4, atol=2e-5)
    assert_allclose(second, ROWS[name]()(gramian(1)), rtol=2e-4, atol=2e-5)


@every
def test_vmap_over_gramians(name, x64):
    gramians = jnp.stack(
        [gramian(key, rank, jnp.float64) for key, rank in [(0, 6), (1, 3)]]
    )
    together = jax.vmap(ROWS[name]())(gramians)
    for weights, one in zip(together, gramians, strict=True):
        # What is unique where the Gramian is singular: not w, but G w.
        alone = ROWS[name]()(one)
        assert_allclose(one @ weights, one @ alone, atol=1e-6 * jnp.trace(one))


@every
def test_scan(name):
    weighting = ROWS[name]()

    def step(state, gramian):
        weights, state = weighting.update(gramian, state)
        return state, weights

    gramians = jnp.stack([gramian(key) for key in range(3)])
    _, weights = jax.lax.scan(step, weighting.init(), gramians)
    assert_allclose(weights[2], weighting(gramians[2]), rtol=2e-4, atol=2e-5)


@every
def test_a_zero_gramian_gives_finite_weights(name):
    assert jnp.isfinite(ROWS[name]()(jnp.zeros((M, M)))).all()


@every
def test_permuting_the_losses_permutes_the_weights(name, x64):
    if name == "constant":
        pytest.skip("It does not look at the losses.")
    order = jnp.array([3, 1, 0, 5, 4, 2])
    one = gramian(dtype=jnp.float64)
    assert_allclose(
        ROWS[name]()(one[order][:, order]), ROWS[name]()(one)[order], rtol=1e-8
    )


@every
@pytest.mark.parametrize("shape", [(6,), (5, 6), (0, 0), (2, 6, 6)])
def test_a_gramian_that_is_not_square(name, shape):
    with pytest.raises(
        ValueError, match=r"`gramian` must be a square matrix, \[m, m\]"
    ):
        ROWS[name]()(jnp.ones(shape))


@every
def test_a_gramian_of_integers(name):
    with pytest.raises(TypeError, match="`gramian` must be real floating-point"):
        ROWS[name]()(jnp.ones((M, M), int))


def test_values():
    """Known without computing."""
    one = gramian()
    assert_array_equal(jaxjd.weighting.mean()(one), np.full(M, 1 / M, np.float32))
    assert_array_equal(jaxjd.weighting.sum()(one), np.ones(M))
    assert_array_equal(jaxjd.weighting.constant(range(M))(one), np.arange(M))
    mask = jnp.arange(M) < 4
    assert_array_equal(jaxjd.weighting.mean()(one, mask=mask), mask / 4)
    assert_array_equal(jaxjd.weighting.sum()(one, mask=mask), mask)
    constant = jaxjd.weighting.constant(range(M))
    assert_array_equal(constant(one, mask=mask), [0, 1, 2, 3, 0, 0])


J = np.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])


def test_the_example_of_torchjd():
    """https://torchjd.org prints [0.2929, 1.9004, 1.9004] and [1.1109, 0.7894]."""
    jacobian = jnp.asarray(J, jnp.float32)
    gramian = jacobian @ jacobian.T
    theirs = jaxjd.weighting.upgrad(norm_eps=1e-4, reg_eps=1e-4)(gramian)
    assert_allclose(theirs, [1.1109, 0.7894], atol=1e-4)
    assert_allclose(theirs @ jacobian, [0.2929, 1.9004, 1.9004], atol=1e-4)
    exact = jaxjd.weighting.upgrad()(gramian)
    assert_allclose(exact @ jacobian, [0.29240, 1.90058, 1.90058], atol=1e-4)


def test_dualproj_of_two_gradients(x64):
    """With two losses the projection of u is known in closed form."""
    g1, g2 = J
    mean = (g1 + g2) / 2
    assert g1 @ mean < 0 < g2 @ mean
    expected = mean - (g1 @ mean) / (g1 @ g1) * g1
    weights = jaxjd.weighting.dualproj()(jnp.asarray(J @ J.T))
    assert_allclose(weights @ J, expected, rtol=1e-7)
    # A preference that conflicts with nobody is left alone.
    weights = jaxjd.weighting.dualproj([1.0, 0.8])(jnp.asarray(J @ J.T))
    assert_allclose(weights, [1.0, 0.8], rtol=1e-12)


def test_a_preference_of_losses_that_agree():
    """Without conflict the projections change nothing."""
    gramian = jnp.array([[2.0, 1.0], [1.0, 3.0]])
    for name in ("upgrad", "dualproj"):
        weights = getattr(jaxjd.weighting, name)([0.3, 0.9])(gramian)
        assert_allclose(weights, [0.3, 0.9], rtol=1e-6)


@pytest.mark.parametrize("name", ["upgrad", "dualproj"])
@pytest.mark.parametrize(
    ("preference", "error", "message"),
    [
        ([1.0, -0.5], ValueError, "`preference` must not be negative. Got .* -0.5"),
        ([1.0, np.nan], ValueError, "`preference` must be finite"),
        ([[1.0, 2.0]], ValueError, r"`preference` must be a vector.*\(1, 2\)"),
        ([], ValueError, "`preference` must be a vector"),
        ([1j, 1], TypeError, "`preference` must be real numbers. Got complex"),
    ],
)
def test_a_preference_that_is_none(name, preference, error, message):
    with pytest.raises(error, match=message):
        getattr(jaxjd.weighting, name)(preference)


@pytest.mark.parametrize("name", ["upgrad", "dualproj", "constant"])
def test_a_vector_of_another_length(name):
    weighting = getattr(jaxjd.weighting, name)([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="one entry for each of the 6 losses. Got 3"):
        weighting(gramian())


def test_a_preference_may_be_traced(x64):
    one = gramian(dtype=jnp.float64)
    preference = jnp.linspace(0.0, 1.0, M)
    weights = jax.jit(lambda u: jaxjd.weighting.upgrad(u)(one))(preference)
    assert_allclose(weights, jaxjd.weighting.upgrad(preference)(one), rtol=1e-8)
