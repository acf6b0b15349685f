"""Mean: let every loss count the same, as gradient descent does."""

from jaxjd.weighting._preference import mean_weights
from jaxjd.weighting._weighting import Weighting, stateless


def mean() -> Weighting:
    """Weights $w_i = 1/m$: the gradient of the mean loss.

    With a mask, m is the number of losses that are present. If there are none, the
    weights are zero.

    **Example:**

    >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    >>> jaxjd.weighting.mean()(J @ J.T)
    Array([0.5, 0.5], dtype=float32)
    """
    return stateless(mean_weights, reads="shape")
