"""Krum leaves out the outliers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

import jaxjd

J = np.array([[0.0, 1.0], [0.1, 1.0], [0.0, 1.2], [0.1, 0.9], [9.0, 9.0], [-7.0, 3.0]])


@jax.jit
def two_of_six(gramian, mask):
    return jaxjd.weighting.krum(1, 2)(gramian, mask=mask)


def expected(present, neighbours):
    """Compute the weights from the definition, one gradient after the other."""
    scores = {}
    for i in present:
        distances = sorted(np.linalg.norm(J[i] - J[j]) for j in present if j != i)
        scores[i] = sum(distances[:neighbours])
    best = sorted(present, key=lambda i: scores[i])[:2]
    return [1 / len(best) if i in best else 0 for i in range(6)]


@pytest.mark.parametrize(
    ("present", "neighbours"),
    [
        ([0, 1, 2, 3, 4, 5], 3),
        ([0, 1, 2, 4, 5], 2),
        ([1, 2, 4, 5], 1),
        # Fewer than num_byzantine + 3: one neighbour. Fewer than num_selected: all.
        ([0, 2, 4], 1),
        ([4], 1),
    ],
)
def test_the_definition(present, neighbours):
    mask = np.isin(np.arange(6), present)
    weights = two_of_six(jnp.asarray(J @ J.T), jnp.asarray(mask))
    assert_array_equal(weights, expected(present, neighbours))
    assert weights[4] == weights[5] == 0 or len(present) == 1


@pytest.mark.parametrize(
    ("byzantine", "selected", "least"), [(4, 1, 7), (1, 7, 7), (0, 8, 8)]
)
def test_too_few_losses(byzantine, selected, least):
    weighting = jaxjd.weighting.krum(byzantine, selected)
    with pytest.raises(ValueError, match=f"of at least {least} losses.* Got 6"):
        weighting(jnp.eye(6))
