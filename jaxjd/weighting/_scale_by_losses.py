"""Scale by losses: give any weighting the gradients of the logarithms."""

import jax
import jax.numpy as jnp

from jaxjd._checks import present_only
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
    """
    check_weighting(weighting)

    def update(gramian, state, /, *, mask=None, losses=None, **extra_args):
        gramian, present = present_only(gramian, mask)
        if losses is None:
            raise ValueError(
                "`losses` must be given to the update of scale_by_losses, as "
                "`jaxjd.value_and_jac` returns them."
            )
        leaves = [
            jnp.ravel(leaf).astype(gramian.dtype) for leaf in jax.tree.leaves(losses)
        ]
        values = jnp.concatenate(leaves)
        if values.shape != present.shape:
            raise ValueError(
                f"`losses` must have one entry for each of the {present.shape[0]} "
                f"losses. Got {values.shape[0]}."
            )
        inverse = jnp.where(present, 1 / jnp.where(present, values, 1), 0)
        # One factor after the other: their product may overflow.
        scaled = gramian * inverse[:, None] * inverse[None]
        weights, state = weighting.update(
            scaled, state, mask=present, losses=losses, **extra_args
        )
        return weights * inverse, state

    return Weighting(weighting.init, update)
