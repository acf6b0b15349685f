"""Scale by losses: give any weighting the gradients of the logarithms."""

import jax.numpy as jnp

from jaxjd._checks import present_only
from jaxjd.weighting._losses import needed_losses
from jaxjd.weighting._weighting import Weighting, check_weighting


def scale_by_losses(weighting: Weighting) -> Weighting:
    r"""A weighting that sees every gradient divided by its loss.

    $g_i / \ell_i$ is the gradient of $\log \ell_i$, which does not depend on the unit
    of the loss. The weighting sees the Gramian with the entries $G_{ij} / (\ell_i
    \ell_j)$, and its weights are divided by the losses. The losses are the extra
    argument `losses` of `update`: an array or a pytree of arrays with m entries in all,
    row-major, as [`jaxjd.value_and_jac`][] returns them:

    ```python
    tx = jaxjd.aggregate(jaxjd.weighting.scale_by_losses(jaxjd.weighting.upgrad()))
    losses, jac = jaxjd.value_and_jac(fun)(params)
    updates, state = tx.update(jac, state, params, losses=losses)
    ```

    They must be positive, which is not checked: a loss of zero makes the weights
    infinite or NaN. The values of missing losses do not matter.

    **Arguments:**

    - `weighting`: gets the mask and all extra arguments. Its state is the state.

    **Raises:** `TypeError` if `weighting` is not a weighting. When used, `ValueError`
    if `losses` is not given, or does not have m entries.

    **Example:**

    >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    >>> weighting = jaxjd.weighting.scale_by_losses(jaxjd.weighting.mean())
    >>> losses = jnp.array([1.0, 100.0])
    >>> weights, _ = weighting.update(J @ J.T, weighting.init(), losses=losses)
    >>> weights
    Array([0.5  , 0.005], dtype=float32)
    """
    check_weighting(weighting)

    def update(gramian, state, /, *, mask=None, losses=None, **extra_args):
        gramian, present = present_only(gramian, mask)
        values = needed_losses("scale_by_losses", losses, gramian.shape[0])
        values = values.astype(gramian.dtype)
        inverse = jnp.where(present, 1 / jnp.where(present, values, 1), 0)
        # One factor after the other: their product may overflow.
        scaled = gramian * inverse[:, None] * inverse[None]
        weights, state = weighting.update(
            scaled, state, mask=present, losses=losses, **extra_args
        )
        return weights * inverse, state

    return Weighting(weighting.init, update, takes=weighting.takes)
