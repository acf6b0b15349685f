"""Normalize: give any weighting gradients of norm 1."""

import jax.numpy as jnp

from jaxjd._checks import present_only
from jaxjd._numerics import unit_diagonal
from jaxjd.weighting._weighting import Weighting, check_weighting


def normalize(weighting: Weighting) -> Weighting:
    r"""A weighting that sees every gradient scaled to norm 1.

    The weighting sees the Gramian with the entries $G_{ij} / (\|g_i\| \|g_j\|)$, and
    its weights are divided by the norms, so the update is that of the unit gradients. A
    zero gradient stays zero and keeps its weight.

    >>> import jaxjd
    >>> tx = jaxjd.aggregate(jaxjd.weighting.normalize(jaxjd.weighting.mean()))

    **Arguments:**

    - `weighting`: gets the mask and all extra arguments. Its state is the state.

    **Raises:** `TypeError` if `weighting` is not a weighting.

    **Example:**

    >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    >>> weighting = jaxjd.weighting.normalize(jaxjd.weighting.mean())
    >>> weighting(J @ J.T)
    Array([0.1179, 0.0811], dtype=float32)
    """
    check_weighting(weighting)

    def update(gramian, state, /, *, mask=None, **extra_args):
        gramian, present = present_only(gramian, mask)
        scaled = unit_diagonal(gramian)
        weights, state = weighting.update(scaled.C, state, mask=present, **extra_args)
        return weights / jnp.where(scaled.norms == 0, 1, scaled.norms), state

    return Weighting(weighting.init, update, takes=weighting.takes)
