"""DualProj: average the gradients, then project onto the dual cone of all of them."""

from jaxtyping import Array, Float

from jaxjd._typing import PerLoss
from jaxjd.weighting._preference import Preference
from jaxjd.weighting._projection import projection
from jaxjd.weighting._weighting import Weighting


def dualproj(
    preference: PerLoss | None = None,
    *,
    noise_eps: float | Float[Array, ""] | None = None,
    norm_eps: float | Float[Array, ""] | None = None,
    reg_eps: float | Float[Array, ""] | None = None,
    warm_start: bool = False,
    num_losses: int | None = None,
    certificate: bool = False,
) -> Weighting:
    r"""Weights of the projection of the mean gradient onto the dual cone.

    $w = \operatorname{argmin}_{v \succeq u} v^\top G v$ with the preference $u$: among
    the updates that conflict with no loss, $J^\top w$ is the closest to $J^\top u$.

    **Arguments:** and **Raises:** as [`jaxjd.weighting.upgrad`][].

    **Reference:** Lopez-Paz & Ranzato (2017), arXiv:1706.08840, equation 11, where it
    constrains the gradient of the current task; Quinton & Rey (2024),
    arXiv:2406.16232, section 4, for the mean gradient.

    **Example:**

    >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    >>> jaxjd.weighting.dualproj()(J @ J.T)
    Array([0.6111, 0.5   ], dtype=float32)
    """
    return projection(
        Preference(preference),
        lambda preferred: preferred,
        lambda m: (m,),
        noise_eps=noise_eps,
        norm_eps=norm_eps,
        reg_eps=reg_eps,
        warm_start=warm_start,
        num_losses=num_losses,
        certificate=certificate,
    )
