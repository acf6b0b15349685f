"""UW: weigh each loss by its uncertainty, which is learned."""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from jaxjd.scalarization._learned import learned
from jaxjd.scalarization._scalarizer import Scalarizer, sum_of_present


def uw(
    *, num_losses: int, optimizer: optax.GradientTransformation | None = None
) -> Scalarizer:
    r"""Uncertainty weighting: the losses in units of a variance that is learned.

    $s(\ell) = \sum_i \tfrac12 e^{-s_i} \ell_i + \tfrac12 s_i$, where $s_i = \log
    \sigma_i^2$. Each $s_i$ starts from 0 and descends in the same scalar. At its
    minimum $e^{s_i} = \ell_i$, so all losses count the same, whatever their units.

    The state holds the scales, as `scales`, and that of their optimizer. A missing loss
    keeps its scale. A batch with a loss that is not finite makes the weights NaN and
    leaves the state as it was.

    **Arguments:**

    - `num_losses`: m.
    - `optimizer`: of the scales, by default `optax.adam(0.025)`.

    **Raises:** `TypeError` or `ValueError` if `num_losses` is not a positive integer,
    or `optimizer` is not an optimizer. When used, `ValueError` if there are not
    `num_losses` losses.

    **Reference:** Kendall et al. (2018), arXiv:1705.07115, equation 7, with $s = \log
    \sigma^2$. The default rate is that of GradNorm's paper for both.

    **Example:**

    >>> scalarizer = jaxjd.scalarization.uw(num_losses=2)
    >>> scalar, state = scalarizer.update(jnp.array([1.0, 4.0]), scalarizer.init())
    >>> scalar
    Array(2.5, dtype=float32)
    """
    return learned("uw", uncertain_sum, num_losses, optimizer)


def uncertain_sum(
    values: Float[Array, " m"], mask: Bool[Array, " m"], scales: Float[Array, " m"]
) -> Float[Array, ""]:
    return sum_of_present((jnp.exp(-scales) * values + scales) / 2, mask)
