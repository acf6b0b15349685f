"""UPGrad: project every gradient onto the dual cone of all of them, then average."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxjd._typing import PerLoss
from jaxjd.weighting._preference import Preference
from jaxjd.weighting._projection import projection
from jaxjd.weighting._weighting import Weighting


def upgrad(
    preference: PerLoss | None = None,
    *,
    noise_eps: float | Float[Array, ""] | None = None,
    norm_eps: float | Float[Array, ""] | None = None,
    reg_eps: float | Float[Array, ""] | None = None,
    warm_start: bool = False,
    num_losses: int | None = None,
    certificate: bool = False,
) -> Weighting:
    r"""Weights of UPGrad: the update $J^\top w$ conflicts with no loss.

    $w = \sum_i w_i$, where $w_i = \operatorname{argmin}_{v \succeq u_i e_i} v^\top G v$
    and $u$ is the preference: $J^\top w_i$ is the projection of $u_i g_i$, the i-th
    gradient, onto the dual cone of all the gradients. Each $G w_i \succeq 0$, hence so
    is $G w$: to first order no loss increases.

    UPGrad ignores a gradient whose norm is below the rounding of the others, with a
    smooth transition. Such a gradient is only rounding error. Avoiding conflict with it
    would ruin the update, as soon as a classifier with one loss per example fits some
    of them. There is no conflict with longer gradients. In float32, for up to 128
    losses, the cosine between the update and a gradient is at least -1e-3 if the norms
    are within a factor of 1e5 of each other, at any scale. With a factor of 1e6 the
    smallest seen was -4e-3. From 1e7 on, the shortest gradients are noise, and their
    cosines can be anything.

    **Arguments:**

    - `preference`: $u \succeq 0$, m numbers. By default $1/m$ for each loss.
    - `noise_eps`: the norm of a gradient, relative to the root mean square of the norms
      that are not zero, below which it is noise. By default the rounding of float32,
      1.2e-7, for Gramians in float64 too. With 0 no gradient is ignored: this is the
      exact projection. See [`jaxjd.solvers.project_dual_cone`][].
    - `norm_eps`, `reg_eps`: another rule of regularisation instead. `norm_eps=1e-4,
      reg_eps=1e-4` gives TorchJD's weights, which conflict when the norms of gradients
      differ by 100 times, and which train a classifier faster if it has one loss per
      example. Cannot be given together with `noise_eps`.
    - `warm_start`: whether the state keeps the projections of the last step, and the
      next search begins there. The weights are the same. It helps if the gradients
      change slowly, as those of a few tasks do, and hurts if every step has new
      examples. On MNIST it took 10 iterations instead of 14 for the losses of the 10
      digits, but 89 instead of 79 for those of 128 new examples.
    - `num_losses`: m. Only needed with `warm_start`, for the size of the state.
    - `certificate`: whether the state keeps the [`jaxjd.solvers.Certificate`][] of the
      last step, the worst of all projections.
      `optax.tree.get(opt_state, "certificate")` finds it.

    **Raises:** `ValueError` or `TypeError` if `preference` is not a vector of finite
    nonnegative reals, an `eps` is not a nonnegative number, `noise_eps` and `reg_eps`
    are both given, or `norm_eps` is given alone, and, when used, `ValueError` if the
    preference does not have m entries, or there are not `num_losses` losses.

    **Reference:** Quinton & Rey (2024), arXiv:2406.16232, equation 5 and Proposition 1.

    **Example:**

    >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    >>> weights = jaxjd.weighting.upgrad()(J @ J.T)
    >>> weights
    Array([1.1111, 0.7895], dtype=float32)
    >>> weights @ J
    Array([0.2924, 1.9006, 1.9006], dtype=float32)
    """
    return projection(
        Preference(preference),
        jnp.diag,
        lambda m: (m, m),
        noise_eps=noise_eps,
        norm_eps=norm_eps,
        reg_eps=reg_eps,
        warm_start=warm_start,
        num_losses=num_losses,
        certificate=certificate,
    )
