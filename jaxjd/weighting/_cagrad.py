"""CAGrad: help the worst-off loss, but stay close to the mean gradient."""

from jaxtyping import Array, Float

from jaxjd._checks import check_number
from jaxjd._sharding import on_every_device
from jaxjd._typing import PerLoss
from jaxjd.solvers import maximise_on_ball
from jaxjd.weighting._certified import certified
from jaxjd.weighting._preference import Preference
from jaxjd.weighting._weighting import Weighting


def cagrad(
    c: float | Float[Array, ""] = 0.5,
    preference: PerLoss | None = None,
    *,
    certificate: bool = False,
) -> Weighting:
    r"""Weights of conflict-averse gradient descent.

    The update maximises $\min_i g_i^\top d$ over $\|d - g_0\| \leq c \|g_0\|$, where
    $g_0$ is the mean of the gradients. With $c = 0$ it is the mean itself. With
    $c < 1$ it may conflict, with $c \geq 1$ it does not. If no point in the ball beats
    the zero update for the worst-off loss, the update is zero, even if zero is not in
    the ball. TorchJD does the same.

    The problem is solved exactly, by [`jaxjd.solvers.maximise_on_ball`][]. TorchJD
    solves the dual problem by an interior point method on the CPU, and takes a Gramian
    with a trace below 1e-4 for zero. Here no scale is special.

    **Arguments:**

    - `c`: the radius of the ball, relative to the norm of its centre, in [0, inf).
    - `preference`: $u \succeq 0$, m numbers: $g_0 = J^\top u$. By default $1/m$ for
      each loss.
    - `certificate`: whether the state keeps the [`jaxjd.solvers.Certificate`][] of the
      last step. `optax.tree.get(opt_state, "certificate")` finds it.

    **Raises:** `ValueError` or `TypeError` if `c` is not a number in [0, inf) or
    `preference` is not a vector of finite nonnegative reals. When used, `ValueError` if
    the preference does not have m entries.

    **Reference:** Liu et al. (2021), arXiv:2110.14048, equation 3 and algorithm 1.

    **Example:**

    >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    >>> jaxjd.weighting.cagrad(c=0.5)(J @ J.T)
    Array([0.7041, 0.5   ], dtype=float32)
    """
    c = check_number("c", c, "[0, inf)")
    chosen = Preference(preference)

    def cagrad_weights(gramian, mask, state, _, centre):
        best = maximise_on_ball(gramian, centre, c, mask=mask)
        return centre + best.solution, state, best.certificate

    return certified(
        on_every_device(cagrad_weights), certificate=certificate, preference=chosen
    )
