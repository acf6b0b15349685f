"""Give a weighting the cross Gramian of two independent batches."""

import jax.numpy as jnp

from jaxjd._checks import check_gramian
from jaxjd.weighting._weighting import Weighting


def of_cross_gramian(name: str, weighting: Weighting) -> Weighting:
    r"""A weighting that sees the extra argument `cross_gramian`, not the Gramian.

    The expectation of $J_1 J_2^\top$ is the Gramian of the expected Jacobian, unlike
    that of $J_1 J_1^\top$. The Gramian itself only tells the number of losses and the
    dtype of the weights.

    **Raises:** when used, `ValueError` if `cross_gramian` is not given, or is not
    [m, m], and `TypeError` if it is not real.
    """

    def update(gramian, state, /, *, mask=None, cross_gramian=None, **extra_args):
        gramian = check_gramian(gramian)
        if cross_gramian is None:
            raise ValueError(
                f"`cross_gramian` must be given to the update of {name}: [m, m], of "
                "two independent batches, `jac1.cross_gramian(jac2)`."
            )
        cross_gramian = jnp.asarray(cross_gramian)
        if cross_gramian.shape != gramian.shape:
            raise ValueError(
                "`cross_gramian` must have the shape of `gramian`, "
                f"{gramian.shape}. Got {cross_gramian.shape}."
            )
        if not jnp.issubdtype(cross_gramian.dtype, jnp.floating):
            raise TypeError(
                "`cross_gramian` must be real floating-point. Got "
                f"{cross_gramian.dtype}."
            )
        cross_gramian = cross_gramian.astype(gramian.dtype)
        return weighting.update(cross_gramian, state, mask=mask, **extra_args)

    return Weighting(weighting.init, update, takes=weighting.takes)
