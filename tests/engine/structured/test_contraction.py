"""Are both contractions exact, and is the cheaper one chosen?"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxjd.engine.structured import _contraction
from jaxjd.engine.structured._contraction import Factors, choose, costs
from jaxjd.engine.structured._rules import Sizes
from tests.engine.structured.conftest import normal, relative


def factors(m, k, b, t, i, o, one_hot, seed):
    right = jnp.asarray(normal(m, k, b, t, o, seed=seed))
    if one_hot:
        places = np.random.default_rng(seed).integers(-1, i + 1, (m, b, t))
        return Factors(jnp.asarray(np.where(places == i, -1, places)), right, i)
    return Factors(jnp.asarray(normal(m, b, t, i, seed=seed)), right, i)


@pytest.mark.parametrize("one_hot", [False, True])
@pytest.mark.parametrize("t", [1, 4])
def test_pairs_and_rows_agree(t, one_hot):
    x = factors(3, 2, 2, t, 5, 4, one_hot, 0)
    y = factors(2, 2, 2, t, 5, 4, one_hot, 1)
    left = x.left
    if one_hot:
        left = jax.nn.one_hot(left, 5, dtype=x.right.dtype)
    rows = jnp.einsum("mbti,mkbto->mkbio", left, x.right)
    assert relative(_contraction.gradients(x), rows) < 1e-12
    wanted = (
        _contraction.gradients(x).reshape(6, -1)
        @ _contraction.gradients(y).reshape(4, -1).T
    )
    assert relative(_contraction.products_by_pairs(x, y), wanted) < 1e-12
    squared = (rows**2).sum((2, 3, 4)).ravel()
    for way in ("pairs", "rows"):
        assert relative(_contraction.squared_norms(x, way), squared) < 1e-12


# The shapes of common layers, m = 32 or 64, and the way that is known to be faster.
LAYERS = {
    "dense": (Sizes(1, 1, 784, 512), 64, False, "pairs"),
    "small_dense_large_batch": (Sizes(1, 1, 8, 4), 256, False, "rows"),
    "attention_of_64_tokens": (Sizes(1, 64, 128, 128), 32, False, "rows"),
    "wide_layer_of_2_tokens": (Sizes(1, 2, 4096, 4096), 32, False, "pairs"),
    "recurrent": (Sizes(1, 28, 64, 64), 64, False, "rows"),
    "convolution": (Sizes(1, 1024, 27, 32), 64, False, "rows"),
    "depthwise": (Sizes(32, 1024, 9, 1), 64, False, "rows"),
    "embedding_of_words": (Sizes(1, 64, 32_000, 128), 32, True, "pairs"),
    "embedding_of_characters": (Sizes(1, 64, 64, 128), 32, True, "rows"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_choice(name):
    sizes, m, one_hot, way = LAYERS[name]
    assert choose(sizes, m, 1, one_hot) == way


def test_costs_of_a_dense_layer():
    """One position: 2 m² (i + o) operations against 2 m² i o."""
    found = costs(Sizes(1, 1, 300, 200), 10, 1, one_hot=False)
    assert found["pairs"].flops == 2 * 100 * (300 + 1 + 200)
    assert found["rows"].flops == 2 * 10 * 60_000 + 2 * 100 * 60_000
    assert found["rows"].bytes > 4 * 10 * 60_000 > found["pairs"].bytes
