"""PCD: follow the first loss as far as every other loss still makes progress."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from jaxjd._checks import (
    check_integer,
    check_num_losses,
    check_number,
    check_vector,
    known,
)
from jaxjd._numerics import like, matmul, root
from jaxjd._sharding import on_every_device
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
    tau: float | Float[Array, ""] | Float[Array, " m-1"] | Sequence[float] = 0.02,
    decay: float | Float[Array, ""] = 0.999,
    eps: float | Float[Array, ""] = 1e-8,
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

    **Raises:** `ValueError` or `TypeError` if an argument is not a number, or is out of
    range, or `tau` has another length. When used, `ValueError` if there are not
    `num_losses` losses.

    **Reference:** Varam & AlHajri (2026), arXiv:2606.29521, appendix B.

    **Example:**

    >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    >>> weighting = jaxjd.weighting.pcd(num_losses=2)
    >>> weights, state = weighting.update(J @ J.T, weighting.init())
    >>> weights
    Array([1.8481, 1.0954], dtype=float32)
    """
    size = check_integer("num_losses", num_losses, least=1)
    checked_decay = check_number("decay", decay, "[0, 1)")
    checked_eps = check_number("eps", eps, "[0, inf)")
    fractions = check_fractions(tau)
    if isinstance(size, int):
        check_num_fractions(fractions, size)

    def init():
        m = known("num_losses", size)
        return PCDState(jnp.zeros(m), jnp.zeros(m, jnp.int32))

    def pcd_weights(gramian, mask, state, _):
        m = check_num_losses(len(state.counts), gramian)
        dtype = gramian.dtype
        decay, eps = like(checked_decay, gramian), like(checked_eps, gramian)
        taus = check_num_fractions(fractions, m).astype(dtype)
        seen = jnp.diagonal(gramian)
        counts = state.counts + mask.astype(jnp.int32)
        before = state.squared_norms.astype(dtype)
        average = jnp.where(mask, decay * before + (1 - decay) * seen, before)
        debiased = average / (1 - decay ** jnp.maximum(counts, 1).astype(dtype))
        size = root(debiased + eps)
        scales = jnp.where(size > 0, 1 / jnp.where(size > 0, size, 1), 0)

        normalised = gramian * scales[:, None] * scales[None, :]
        primary = jnp.arange(m) == 0
        secondary = ~primary & (jnp.diagonal(normalised) > 0)
        levels = taus * jnp.diagonal(normalised) - normalised[0]
        constrained = secondary[:, None] & secondary[None, :]
        shortest = least_distance(
            jnp.where(constrained, normalised, 0), jnp.where(secondary, levels, 0)
        )
        mu = jnp.where(shortest.feasible, shortest.solution, 0)
        weights = jnp.where(primary, 1, mu)

        # The direction is zero if its squared norm is only the rounding of its terms.
        norm2 = jnp.vdot(weights, matmul(normalised, weights))
        magnitude = jnp.vdot(weights, jnp.sqrt(jnp.diagonal(normalised))) ** 2
        exists = norm2 > 10 * float(jnp.finfo(dtype).eps) * magnitude
        exists &= seen[0] > 0
        ratio = jnp.where(exists, seen[0] / jnp.where(exists, norm2, 1), 0)
        weights = weights * scales * root(ratio)
        return weights, PCDState(average, counts), shortest.certificate

    return certified(on_every_device(pcd_weights), init=init, certificate=certificate)


def check_fractions(
    tau: float | Float[Array, ""] | Float[Array, " m-1"] | Sequence[float],
) -> Float[Array, ""] | Float[Array, " m-1"]:
    """**Raises:** `ValueError` or `TypeError` if they are not numbers in [0, 1]."""
    if isinstance(tau, int | float) or not (isinstance(tau, Sequence) or np.ndim(tau)):
        return jnp.asarray(check_number("tau", tau, "[0, 1]"))
    values = check_vector("tau", tau, nonnegative=True)
    if not isinstance(values, Tracer) and (np.asarray(values) > 1).any():
        raise ValueError(f"`tau` must be in [0, 1]. Got {np.asarray(values)}.")
    return values


def check_num_fractions(
    fractions: Float[Array, ""] | Float[Array, " m-1"], m: int
) -> Float[Array, " m"]:
    """One fraction for each loss. That of the primary loss is not used.

    **Raises:** `ValueError` if there is not one for each secondary loss.
    """
    if not fractions.ndim:
        return jnp.broadcast_to(fractions, m)
    if len(fractions) != m - 1:
        raise ValueError(
            "`tau` must be a number or have one entry for each of the "
            f"{m - 1} secondary losses. Got {len(fractions)}."
        )
    return jnp.concatenate([jnp.zeros_like(fractions[:1]), fractions])
