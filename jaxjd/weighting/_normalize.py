"""Normalize: any weighting, of the unit gradients."""

import jax.numpy as jnp

from jaxjd._checks import present_only
from jaxjd._numerics import unit_diagonal
from jaxjd.weighting._weighting import Weighting, check_weighting


def normalize(weighting: Weighting) -> Weighting:
    r"""A weighting that sees every gradient scaled to norm 1.

    Its Gramian has the entries $G_{ij} / (\|g_i\| \|g_j\|)$, and its weights are
    divided by the norms: the update is that of the unit gradients. A gradient that is
    zero stays zero and keeps its weight.

    >>> import jaxjd
    >>> tx = jaxjd.aggregate(jaxjd.weighting.normalize(jaxjd.weighting.mean()))

    **Arguments:**

    - `weighting`: it gets the mask and all extra arguments, and its state is the state.

    **Raises:** `TypeError` if `weighting` is not a weighting.
    """
    check_weighting(weighting)

    def update(gramian, state, /, *, mask=None, **extra_args):
        gramian, present = present_only(gramian, mask)
        scaled = unit_diagonal(gramian)
        weights, state = weighting.update(scaled.C, state, mask=present, **extra_args)
        return weights / jnp.where(scaled.norms == 0, 1, scaled.norms), state

    return Weighting(weighting.init, update)
