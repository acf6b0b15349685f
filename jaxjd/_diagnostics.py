"""What a Gramian and weights say of a step, without any further pass."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxjd._checks import check_gramian, check_mask
from jaxjd._numerics import matmul, root, unit_diagonal


class Diagnostics(NamedTuple):
    r"""What the Gramian and the weights of m losses say of a step along $-J^\top w$.

    - `weights`: $w$, [m].
    - `norms`: $\|g_i\|$ of the gradient of each loss, [m].
    - `cosines`: between the gradients, [m, m]; 0 for a gradient that is zero.
    - `conflicting`: the fraction of pairs of losses with a negative cosine, [].
    - `agreement`: the cosine between $J^\top w$ and the gradient of each loss, [m]. If
      it is negative, the step increases this loss, to first order.
    - `changes`: how each loss changes per unit of step size, $-(G w)_i$, [m].
    - `cosine_to_mean`: between $J^\top w$ and the mean gradient, [].
    - `effective_losses`: $(\sum_i |w_i|)^2 / \sum_i w_i^2$, []: m for equal weights, 1
      if one loss has all the weight.
    - `entropy`: of the weights, as fractions of the sum of their sizes, in nats, [].
    """

    weights: Float[Array, " m"]
    norms: Float[Array, " m"]
    cosines: Float[Array, "m m"]
    conflicting: Float[Array, ""]
    agreement: Float[Array, " m"]
    changes: Float[Array, " m"]
    cosine_to_mean: Float[Array, ""]
    effective_losses: Float[Array, ""]
    entropy: Float[Array, ""]


def diagnostics(
    gramian: Float[Array, "m m"],
    weights: Float[Array, " m"],
    *,
    mask: Bool[Array, " m"] | None = None,
) -> Diagnostics:
    """Describe a step from its Gramian and its weights.

    `diagnostics(jac.gramian(), weights)._asdict()` is what a logger takes. An
    aggregator can keep the diagnostics of its last step in its state:
    `jaxjd.aggregate(weighting, diagnostics=True, num_losses=m)`.

    **Arguments:**

    - `gramian`: $G = J J^\\top$, [m, m].
    - `weights`: $w$, [m].
    - `mask`: [m] of bools, False for the losses that are missing. They count for
      nothing, neither in pairs nor in the mean.

    **Returns:** [`jaxjd.Diagnostics`][], float32 or wider. A cosine with a vector of
    length zero is zero.

    **Raises:** `ValueError` or `TypeError` if `gramian` is not a square matrix of real
    numbers, or `weights` or `mask` do not have m entries.

    **Example:**

    >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    >>> shown = jaxjd.diagnostics(J @ J.T, jnp.array([0.5, 0.5]))
    >>> shown.agreement, shown.conflicting
    (Array([-0.2722,  0.7493], dtype=float32), Array(1., dtype=float32))
    """
    G = check_gramian(gramian)
    m = len(G)
    if jnp.shape(weights) != (m,):
        raise ValueError(
            f"`weights` must have one entry for each of the {m} losses. Got shape "
            f"{jnp.shape(weights)}."
        )
    present = check_mask(mask, m)
    w = jnp.where(present, jnp.asarray(weights).astype(G.dtype), 0)
    C, norms, _ = unit_diagonal(G)
    pairs = present[:, None] & present[None] & ~jnp.eye(m, dtype=bool)
    # Products with zero keep what is not finite.
    negative = jnp.where(C < 0, 1, C * 0)
    scaled = w * norms
    along = matmul(C, scaled)
    length = root(jnp.vdot(scaled, along))
    of_sum = jnp.where(present, norms, 0)
    length_of_sum = root(jnp.vdot(of_sum, matmul(C, of_sum)))
    sizes = jnp.abs(w)
    shares = _ratio(sizes, sizes.sum())
    none = shares <= 0
    information = jnp.where(none, 0, -jnp.log(jnp.where(none, 1, shares)))
    return Diagnostics(
        weights=w,
        norms=norms,
        cosines=C,
        conflicting=_ratio(
            jnp.where(pairs, negative, 0).sum(), pairs.sum().astype(G.dtype)
        ),
        agreement=jnp.where(present, _ratio(along, length), 0),
        changes=-norms * along,
        cosine_to_mean=_ratio(jnp.vdot(of_sum, along), length * length_of_sum),
        effective_losses=_ratio(shares.sum(), jnp.square(shares).sum()),
        entropy=jnp.vdot(shares, information),
    )


def _ratio(x: Float[Array, "..."], y: Float[Array, ""]) -> Float[Array, "..."]:
    zero = y == 0
    return jnp.where(zero, 0, x / jnp.where(zero, 1, y))
