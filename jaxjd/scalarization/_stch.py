"""STCH: descend in the worst of the weighted losses, smoothly."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxjd._checks import check_number
from jaxjd._numerics import like
from jaxjd._typing import PerLoss
from jaxjd.scalarization._reference import above, check_reference
from jaxjd.scalarization._scalarizer import Scalarizer, stateless
from jaxjd.weighting._preference import Preference


def stch(
    smoothing: float | Float[Array, ""],
    preference: PerLoss | None = None,
    *,
    reference: PerLoss | None = None,
) -> Scalarizer:
    r"""The smooth Tchebycheff scalarization: a soft maximum of the weighted losses.

    $s(\ell) = \mu \log \sum_i \exp(\lambda_i (\ell_i - z_i) / \mu)$, which is at most
    $\mu \log m$ above $\max_i \lambda_i (\ell_i - z_i)$. Every Pareto-optimal point
    minimises it for some preference $\lambda$, also where the front is not convex.

    **Arguments:**

    - `smoothing`: $\mu > 0$, in units of the weighted losses. The paper tries 0.01 to
      1 and finds that small values work well.
    - `preference`: $\lambda \succeq 0$, m numbers. By default $1/m$.
    - `reference`: $z$, the ideal point, m numbers. By default 0.

    **Raises:** `TypeError` or `ValueError` if `smoothing` is not a positive number, or
    a vector is not one of finite reals, or a preference is negative. When used,
    `ValueError` if a vector does not have m entries.

    **Reference:** Lin et al. (2024), arXiv:2402.19078.

    **Example:**

    >>> scalarizer = jaxjd.scalarization.stch(smoothing=0.1)
    >>> jax.value_and_grad(scalarizer)(jnp.array([1.0, 1.2]))
    (Array(0.6313, dtype=float32), Array([0.1345, 0.3655], dtype=float32))
    """
    mu = check_number("smoothing", smoothing, "(0, inf)")
    chosen = Preference(preference)
    point = check_reference(reference)

    def soft_maximum(
        values: Float[Array, " m"],
        mask: Bool[Array, " m"],
        preferred: Float[Array, " m"],
    ) -> Float[Array, ""]:
        weighted = preferred * above(point, values)
        smooth = like(mu, values)
        # As in appendix B.1: without the maximum, the quotients do not overflow.
        largest = lax.stop_gradient(jnp.max(weighted, where=mask, initial=-jnp.inf))
        largest = jnp.where(mask.any(), largest, 0)
        exponents = jnp.where(mask, (weighted - largest) / smooth, -jnp.inf)
        soft = smooth * jax.nn.logsumexp(exponents) + largest
        return jnp.where(mask.any(), soft, 0)

    return stateless("stch", soft_maximum, preference=chosen)
