"""How does a weighting look at two independent batches instead of one?"""

import jax.numpy as jnp

from jaxjd._checks import check_gramian
from jaxjd.weighting._weighting import Weighting


def of_cross_gramian(name: str, weighting: Weighting) -> Weighting:
    r"""The weighting of the extra argument `cross_gramian`, $J_1 J_2^\top$.

    Its expectation is the Gramian of the expected Jacobian; that of $J_1 J_1^\top$ is
    not. The Gramian itself only says how many losses there are, and in which type the
    weights are.

    **Raises:** when used, `ValueError` if there is no `cross_gramian`, or it is not
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

    return Weighting(weighting.init, update)
