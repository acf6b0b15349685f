"""Are floats sorted as `jnp.sort` does it?"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jaxjd._sorting import sort

VALUES = [3.0, -np.inf, np.nan, -2.5, 0.0, -0.0, np.inf, -1e-3, -np.nan, 1e3, 2.0, 2.0]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_values(dtype, x64):
    values = jnp.asarray(VALUES).astype(dtype).reshape(4, 3)

    @jax.jit
    def both(values):
        return [(sort(values, n), jnp.sort(values, axis=n)) for n in (0, 1)]

    for ordered, expected in both(values):
        assert ordered.dtype == values.dtype
        assert_array_equal(ordered.astype(float), expected.astype(float))


def test_derivatives():
    values = jnp.array([3.0, 1.0, 2.0])
    weights = jnp.array([1.0, 10.0, 100.0])
    assert_allclose(jax.grad(lambda x: weights @ sort(x, 0))(values), [100, 1, 10])
