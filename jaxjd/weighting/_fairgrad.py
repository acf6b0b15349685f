"""FairGrad: alpha-fair shares of the progress."""

from jaxjd._checks import check_number
from jaxjd.solvers import bargain
from jaxjd.weighting._certified import certified
from jaxjd.weighting._weighting import Weighting


def fairgrad(alpha: float = 2.0, *, certificate: bool = False) -> Weighting:
    r"""Weights that solve $Gw = w^{-1/\alpha}$, entry by entry.

    Along the update $J^\top w$ of its length, $\sum_i (g_i^\top d)^{1 - \alpha} / (1 -
    \alpha)$ is largest: with $\alpha \to 0$ the sum of the progress of all losses, with
    1 its product (Nash's bargain), with 2 its harmonic mean, with $\alpha \to \infty$
    the least of all. A loss whose gradient is zero gets the weight zero. Where the
    point is Pareto-stationary there is no solution; the weights are finite then, and
    the update nearly zero beside them.

    **Arguments:**

    - `alpha`: in (0, inf).
    - `certificate`: whether the state keeps the [`jaxjd.solvers.Certificate`][] of the
      last step.
      `optax.tree.get(opt_state, "certificate")` finds it.

    **Raises:** `ValueError` or `TypeError` if `alpha` is not in (0, inf).

    **Reference:** Ban & Ji (2024), arXiv:2402.15638, equation 4.
    """
    alpha = check_number("alpha", alpha, "(0, inf)")

    def fairgrad_weights(gramian, mask, state, _):
        solved = bargain(gramian, alpha=alpha, mask=mask)
        return solved.solution, state, solved.certificate

    return certified(fairgrad_weights, certificate=certificate)
