"""IMTL-L: bring all losses to one size by scales that are learned."""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from jaxjd.scalarization._learned import learned
from jaxjd.scalarization._scalarizer import Scalarizer, sum_of_present


def imtl_l(
    *, num_losses: int, optimizer: optax.GradientTransformation | None = None
) -> Scalarizer:
    r"""The loss balance of impartial multi-task learning.

    $s(\ell) = \sum_i e^{s_i} \ell_i - s_i$. Each $s_i$ starts from 0 and descends in
    the same scalar. At its minimum $e^{s_i} \ell_i = 1$: all scaled losses are equal.
    It is twice [`jaxjd.scalarization.uw`][] with the opposite sign of $s$. The other
    half of the paper, the gradient balance, is [`jaxjd.weighting.imtl_g`][].

    The state holds the scales, as `scales`, and that of their optimizer. A missing loss
    keeps its scale. A batch with a loss that is not finite makes the weights NaN and
    leaves the state as it was.

    **Arguments:**

    - `num_losses`: m.
    - `optimizer`: of the scales, by default `optax.adam(0.025)`.

    **Raises:** `TypeError` or `ValueError` if `num_losses` is not a positive integer,
    or `optimizer` is not an optimizer. When used, `ValueError` if there are not
    `num_losses` losses.

    **Reference:** Liu et al. (2021), Towards Impartial Multi-task Learning, section
    3.2, with $a = e$ and $b = 1$.

    **Example:**

    >>> scalarizer = jaxjd.scalarization.imtl_l(num_losses=2)
    >>> scalar, state = scalarizer.update(jnp.array([1.0, 4.0]), scalarizer.init())
    >>> scalar
    Array(5., dtype=float32)
    """
    return learned("imtl_l", scaled_sum, num_losses, optimizer)


def scaled_sum(
    values: Float[Array, " m"], mask: Bool[Array, " m"], scales: Float[Array, " m"]
) -> Float[Array, ""]:
    return sum_of_present(jnp.exp(scales) * values - scales, mask)
