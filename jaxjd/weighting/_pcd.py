"""PCD: follow the first loss, as far as every other one still makes progress."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxjd._checks import check_integer, check_num_losses, check_number, check_vector
from jaxjd._numerics import matmul, root
from jaxjd.solvers import least_distance
from jaxjd.weighting._certified import certified
from jaxjd.weighting._weighting import Weighting


class PCDState(NamedTuple):
    """The state of PCD."""

    squared_norms: Float[Array, " m"]
    """The moving average of the squared norms of the gradients, not debiased."""
    counts: Int[Array, " m"]
    """How many steps each loss took part in."""


def pcd(
    *,
    num_losses: int,
    tau: float | Float[Array, " m-1"] | Sequence[float] = 0.02,
    decay: float = 0.999,
    eps: float = 1e-8,
    certificate: bool = False,
) -> Weighting:
    r"""Weights of priority-constrained descent.

    The first loss is the primary one. With $\tilde g_i = g_i / \sqrt{\hat v_i +
    \epsilon}$, where $\hat v_i$ is the debiased moving average of $\|g_i\|^2$, the
    direction

    $$\operatorname{argmin}_d \tfrac12 \|d - \tilde g_1\|^2 \quad\text{subject to}\quad
    \tilde g_j^\top d \geq \tau \|\tilde g_j\|^2 \quad (j \geq 2)$$

    is scaled to the norm of $g_1$. If no direction satisfies the constraints, they are
    dropped, and the update is $g_1$. If $g_1$ or the direction is zero, or the first
    loss is missing, so is the update.

    **Arguments:**

    - `num_losses`: m.
    - `tau`: the fraction of the progress along its own normalised gradient that every
      secondary loss is guaranteed, in [0, 1]: one number, or m - 1.
    - `decay`: how much of the moving average stays, in [0, 1).
    - `eps`: in [0, inf).
    - `certificate`: whether the state keeps the [`jaxjd.solvers.Certificate`][] of the
      last step. `optax.tree.get(opt_state, "certificate")` finds it.

    **Raises:** `ValueError` or `TypeError` if an argument is outside of its range or
    `tau` has another length, and, when used, `ValueError` if there are not `num_losses`
    losses.

    **Reference:** Varam & AlHajri (2026), arXiv:2606.29521, appendix B.
    """
    num_losses = check_integer("num_losses", num_losses, least=1)
    decay = check_number("decay", decay, "[0, 1)")
    eps = check_number("eps", eps, "[0, inf)")
    taus = _check_tau(tau, num_losses)

    def init():
        return PCDState(jnp.zeros(num_losses), jnp.zeros(num_losses, jnp.int32))

    def pcd_weights(gramian, mask, state, _):
        check_num_losses(num_losses, gramian)
        dtype = gramian.dtype
        seen = jnp.diagonal(gramian)
        counts = state.counts + mask.astype(jnp.int32)
        before = state.squared_norms.astype(dtype)
        average = jnp.where(mask, decay * before + (1 - decay) * seen, before)
        debiased = average / (1 - decay ** jnp.maximum(counts, 1).astype(dtype))
        size = root(debiased + eps)
        scales = jnp.where(size > 0, 1 / jnp.where(size > 0, size, 1), 0)

        normalised = gramian * scales[:, None] * scales[None, :]
        primary = jnp.arange(num_losses) == 0
        secondary = ~primary & (jnp.diagonal(normalised) > 0)
        levels = jnp.asarray(taus, dtype) * jnp.diagonal(normalised) - normalised[0]
        constrained = secondary[:, None] & secondary[None, :]
        shortest = least_distance(
            jnp.where(constrained, normalised, 0), jnp.where(secondary, levels, 0)
        )
        mu = jnp.where(shortest.feasible, shortest.solution, 0)
        weights = jnp.where(primary, 1, mu)

        # Zero but for the rounding of a sum of products of this size.
        norm2 = jnp.vdot(weights, matmul(normalised, weights))
        magnitude = jnp.vdot(weights, jnp.sqrt(jnp.diagonal(normalised))) ** 2
        exists = norm2 > 10 * float(jnp.finfo(dtype).eps) * magnitude
        exists &= seen[0] > 0
        ratio = jnp.where(exists, seen[0] / jnp.where(exists, norm2, 1), 0)
        weights = weights * scales * root(ratio)
        return weights, PCDState(average, counts), shortest.certificate

    return certified(pcd_weights, init=init, certificate=certificate)


def _check_tau(tau, num_losses: int) -> Float[np.ndarray, " m"]:
    """One fraction for each loss; that of the primary one is not used."""
    if np.ndim(tau) == 0:
        return np.full(num_losses, check_number("tau", tau, "[0, 1]"))
    values = np.asarray(check_vector("tau", tau, nonnegative=True), float)
    if (values > 1).any():
        raise ValueError(f"`tau` must be in [0, 1]. Got {values}.")
    if len(values) != num_losses - 1:
        raise ValueError(
            "`tau` must be a number or have one entry for each of the "
            f"{num_losses - 1} secondary losses. Got {len(values)}."
        )
    return np.concatenate([[0.0], values])
