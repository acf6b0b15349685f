"""ConFIG's update has the requested direction and length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import jaxjd

pytestmark = pytest.mark.usefixtures("x64")
M = 5
# These are the lengths of the package `conflictfree`.
LENGTHS = {
    "projection": lambda norms: norms,
    "min": np.min,
    "max": np.max,
    "arithmetic": np.mean,
    "harmonic": lambda norms: len(norms) / (1 / norms).sum(),
    "geometric": lambda norms: np.prod(norms) ** (1 / len(norms)),
    2: lambda norms: norms[2],
}


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("preference", [None, [1.0, 0.0, 3.0, 0.5, 2.0]])
def test_from_the_jacobian(length, preference):
    """The weights agree with the pseudoinverse of the unit gradients."""
    weighting = jaxjd.weighting.conflict_free(preference, length=length)
    rng = np.random.default_rng(0)
    J = rng.normal(size=(M, 12)) * np.exp(rng.normal(size=(M, 1)))
    norms = np.linalg.norm(J, axis=1)
    units = J / norms[:, None]
    preferred = np.ones(M) if preference is None else np.array(preference)
    x = np.linalg.pinv(units) @ preferred
    x /= np.linalg.norm(x)
    expected = (LENGTHS[length](norms) * (units @ x)).sum() * x
    weights = weighting(jnp.asarray(J @ J.T))
    assert_allclose(weights @ J, expected, rtol=1e-10, atol=1e-12)
    # A zero gradient is left out, also from the means.
    padded = np.zeros((M + 1, M + 1))
    padded[:M, :M] = J @ J.T
    if preference is None:
        weights = weighting(jnp.asarray(padded))
        assert weights[M] == 0
        assert_allclose(weights[:M] @ J, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("norm", [1.0, 1e-6, 3e5])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_opposed_gradients(norm, dtype):
    """No direction has equal positive cosines with both, so the weights are zero."""
    g = np.array([0.3, -1.2, 0.7])
    J = np.stack([g, -norm * g]).astype(dtype)
    weights = jaxjd.weighting.conflict_free()(jnp.asarray(J @ J.T))
    assert_array_equal(weights, 0)


def test_an_index_out_of_range():
    weighting = jaxjd.weighting.conflict_free(length=3)
    with pytest.raises(ValueError, match="`length` must be the index of one of the 3"):
        jax.eval_shape(lambda: weighting(jnp.eye(3)))
