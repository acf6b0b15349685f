"""PBI: go along a direction in the space of losses, and pay for leaving it."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxjd._checks import check_number
from jaxjd._numerics import like, root
from jaxjd._typing import PerLoss
from jaxjd.scalarization._reference import above, check_reference
from jaxjd.scalarization._scalarizer import Scalarizer, stateless
from jaxjd.weighting._preference import Preference

# The rounding of a point on the line is about one, so its gradient is at most a
# hundredth of the penalty there.
ROUNDINGS = 100


def pbi(
    penalty: float | Float[Array, ""] = 5.0,
    preference: PerLoss | None = None,
    *,
    reference: PerLoss | None = None,
) -> Scalarizer:
    r"""Penalty-based boundary intersection: two distances in the space of losses.

    With $u = w / \|w\|$ and $f = \ell - z$, it is $s(\ell) = d_1 + \theta d_2$, where
    $d_1 = u^\top f$ is the distance from the reference point along the preference, and
    $d_2 = \|f - d_1 u\|$ that from its line. On the line, $d_2$ has no gradient. There
    it counts as zero: a distance that is rounding is smoothed away.

    **Arguments:**

    - `penalty`: $\theta \geq 0$. 5 in the experiments of the paper.
    - `preference`: $w \succeq 0$, m numbers, of which only the proportions count. By
      default all are equal.
    - `reference`: $z$, the ideal point, m numbers. By default 0.

    **Raises:** `TypeError` or `ValueError` if `penalty` is not a number in [0, inf), or
    a vector is not one of finite reals, or a preference is negative. When used,
    `ValueError` if a vector does not have m entries.

    **Reference:** Zhang & Li (2007), MOEA/D: A Multiobjective Evolutionary Algorithm
    Based on Decomposition, section II.C.

    **Example:**

    >>> scalarizer = jaxjd.scalarization.pbi(penalty=5.0)
    >>> jax.value_and_grad(scalarizer)(jnp.array([1.0, 4.0]))
    (Array(14.1421, dtype=float32), Array([-2.8284,  4.2426], dtype=float32))
    """
    theta = check_number("penalty", penalty, "[0, inf)")
    chosen = Preference(preference)
    point = check_reference(reference)

    def scalar(
        values: Float[Array, " m"], mask: Bool[Array, " m"], w: Float[Array, " m"]
    ) -> Float[Array, ""]:
        f = jnp.where(mask, above(point, values), 0)
        length = root((w * w).sum())
        u = w / jnp.where(length > 0, length, 1)
        along = (u * f).sum()
        across = f - along * u
        rounding = ROUNDINGS * float(jnp.finfo(values.dtype).eps)
        floor = lax.stop_gradient(rounding**2 * (f * f).sum())
        return along + like(theta, values) * root((across * across).sum() + floor)

    return stateless("pbi", scalar, preference=chosen)
