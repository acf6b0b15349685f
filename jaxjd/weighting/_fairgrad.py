"""FairGrad: share the progress between the losses alpha-fairly."""

from jaxtyping import Array, Float

from jaxjd._checks import check_number
from jaxjd._sharding import on_every_device
from jaxjd.solvers import bargain
from jaxjd.weighting._certified import certified
from jaxjd.weighting._weighting import Weighting


def fairgrad(
    alpha: float | Float[Array, ""] = 2.0, *, certificate: bool = False
) -> Weighting:
    r"""Weights that solve $Gw = w^{-1/\alpha}$, entry by entry.

    Among updates $d$ of equal norm, $J^\top w$ maximises
    $\sum_i (g_i^\top d)^{1 - \alpha} / (1 - \alpha)$. With $\alpha \to 0$ this is the
    sum of the progress of all losses, with 1 its product (Nash's bargaining solution),
    with 2 its harmonic mean, with $\alpha \to \infty$ the progress of the worst-off
    loss. A loss whose gradient is zero gets the weight zero. At a Pareto-stationary
    point there is no solution. The weights are finite there, and the update is nearly
    zero beside them.

    **Arguments:**

    - `alpha`: in (0, inf).
    - `certificate`: whether the state keeps the [`jaxjd.solvers.Certificate`][] of the
      last step. `optax.tree.get(opt_state, "certificate")` finds it.

    **Raises:** `ValueError` or `TypeError` if `alpha` is not a number in (0, inf).

    **Reference:** Ban & Ji (2024), arXiv:2402.15638, equation 4.

    **Example:**

    >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    >>> jaxjd.weighting.fairgrad(alpha=1.0)(J @ J.T)
    Array([0.5915, 0.4071], dtype=float32)
    """
    alpha = check_number("alpha", alpha, "(0, inf)")

    def fairgrad_weights(gramian, mask, state, _):
        solved = bargain(gramian, alpha=alpha, mask=mask)
        return solved.solution, state, solved.certificate

    return certified(on_every_device(fairgrad_weights), certificate=certificate)
