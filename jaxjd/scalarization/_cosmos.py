"""COSMOS: descend in the weighted sum, and keep the losses near a direction."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxjd._checks import check_number
from jaxjd._numerics import like, root
from jaxjd._typing import PerLoss
from jaxjd.scalarization._scalarizer import Scalarizer, stateless, sum_of_present
from jaxjd.weighting._preference import Preference


def cosmos(
    penalty: float | Float[Array, ""],
    preference: PerLoss | None = None,
) -> Scalarizer:
    r"""The scalarization of COSMOS: a weighted sum with a reward for its direction.

    $s(\ell) = r^\top \ell - \lambda \frac{r^\top \ell}{\|r\| \|\ell\|}$. The second
    term draws the vector of losses towards the direction of the preference $r$, so
    other preferences end at other points of the Pareto front.

    In the paper the network also gets $r$ as an input, drawn anew for every batch. That
    is left to the user: the update takes another `preference`, which may be traced.

    **Arguments:**

    - `penalty`: $\lambda \geq 0$, in units of the weighted sum. The paper takes 0.01
      to 8, depending on the problem.
    - `preference`: $r \succeq 0$, m numbers. By default $1/m$.

    **Raises:** `TypeError` or `ValueError` if `penalty` is not a number in [0, inf), or
    `preference` is not a vector of finite nonnegative reals. When used, `ValueError` if
    the preference does not have m entries.

    **Reference:** Ruchte & Grabocka (2021), arXiv:2103.13392.

    **Example:**

    >>> scalarizer = jaxjd.scalarization.cosmos(penalty=1.0)
    >>> jax.value_and_grad(scalarizer)(jnp.array([1.0, 4.0]))
    (Array(1.6425, dtype=float32), Array([0.3789, 0.5303], dtype=float32))
    """
    strength = check_number("penalty", penalty, "[0, inf)")
    chosen = Preference(preference)

    def scalar(
        values: Float[Array, " m"], mask: Bool[Array, " m"], r: Float[Array, " m"]
    ) -> Float[Array, ""]:
        total = sum_of_present(r * values, mask)
        lengths = root((r * r).sum()) * root(sum_of_present(values * values, mask))
        zero = lengths == 0
        cosine = jnp.where(zero, 0, total / jnp.where(zero, 1, lengths))
        return total - like(strength, values) * cosine

    return stateless("cosmos", scalar, preference=chosen)
