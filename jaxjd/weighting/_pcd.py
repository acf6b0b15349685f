"""PCD: follow one loss as far as every other loss still makes progress."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

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
from jaxjd._names import check_names, names_in, place_of
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
    primary: str | int | Int[Array, ""] = 0,
    tau: float
    | Float[Array, ""]
    | Float[Array, " m-1"]
    | Sequence[float]
    | Mapping[str, Any] = 0.02,
    decay: float | Float[Array, ""] = 0.999,
    eps: float | Float[Array, ""] = 1e-8,
    certificate: bool = False,
) -> Weighting:
    r"""Weights of priority-constrained descent.

    One loss, p, is the primary one. With $\tilde g_i = g_i / \sqrt{\hat v_i +
    \epsilon}$, where $\hat v_i$ is the debiased moving average of $\|g_i\|^2$, the
    direction

    $$\operatorname{argmin}_d \tfrac12 \|d - \tilde g_p\|^2 \quad\text{subject to}\quad
    \tilde g_j^\top d \geq \tau \|\tilde g_j\|^2 \quad (j \neq p)$$

    is scaled to the norm of $g_p$. If no direction satisfies the constraints, they are
    dropped, and the update is $g_p$. If $g_p$ or the direction is zero, or the primary
    loss is missing, so is the update.

    **Arguments:**

    - `num_losses`: m.
    - `primary`: which loss is the primary one: its place among the rows, or its name.
      The losses of a dict are named by its keys, those of nested ones by their paths,
      such as `"heads/pose"`, and those of an array have their indices at the end. By
      default it is the first row. In a dict that is the first of the sorted keys.
    - `tau`: the fraction of the progress along its own normalised gradient that every
      secondary loss is guaranteed, in [0, 1]: one number; or m - 1, in the order of the
      rows; or a dict like the losses, whose number for the primary one is not used.
    - `decay`: how much of the moving average stays, in [0, 1).
    - `eps`: in [0, inf).
    - `certificate`: whether the state keeps the [`jaxjd.solvers.Certificate`][] of the
      last step. `optax.tree.get(opt_state, "certificate")` finds it.

    **Raises:** `ValueError` or `TypeError` if an argument is not a number, or is out of
    range, or `tau` has another length. When used, `ValueError` if there are not
    `num_losses` losses, if no loss has the name `primary`, or if it is a name and the
    update is given a Gramian without `loss_names`.

    **Reference:** Varam & AlHajri (2026), arXiv:2606.29521, appendix B. There the first
    loss is the primary one.

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
    fractions, tau_names = check_fractions(tau), names_in(tau)
    of_all = tau_names is not None
    if not isinstance(primary, str):
        primary = check_integer("primary", primary, least=0)
    if isinstance(size, int):
        check_primary(primary, size)
        check_num_fractions(fractions, size, of_all)

    def init():
        m = known("num_losses", size)
        return PCDState(jnp.zeros(m), jnp.zeros(m, jnp.int32))

    def pcd_weights(place, gramian, mask, state, _):
        m = check_num_losses(len(state.counts), gramian)
        dtype = gramian.dtype
        decay, eps = like(checked_decay, gramian), like(checked_eps, gramian)
        check_num_fractions(fractions, m, of_all)
        check_primary(place, m)
        taus = fraction_of_each(fractions, m, place).astype(dtype)
        seen = jnp.diagonal(gramian)
        counts = state.counts + mask.astype(jnp.int32)
        before = state.squared_norms.astype(dtype)
        average = jnp.where(mask, decay * before + (1 - decay) * seen, before)
        debiased = average / (1 - decay ** jnp.maximum(counts, 1).astype(dtype))
        size = root(debiased + eps)
        scales = jnp.where(size > 0, 1 / jnp.where(size > 0, size, 1), 0)

        normalised = gramian * scales[:, None] * scales[None, :]
        is_primary = jnp.arange(m) == place
        secondary = ~is_primary & (jnp.diagonal(normalised) > 0)
        levels = taus * jnp.diagonal(normalised) - normalised[place]
        constrained = secondary[:, None] & secondary[None, :]
        shortest = least_distance(
            jnp.where(constrained, normalised, 0), jnp.where(secondary, levels, 0)
        )
        mu = jnp.where(shortest.feasible, shortest.solution, 0)
        weights = jnp.where(is_primary, 1, mu)

        # The direction is zero if its squared norm is only the rounding of its terms.
        norm2 = jnp.vdot(weights, matmul(normalised, weights))
        magnitude = jnp.vdot(weights, jnp.sqrt(jnp.diagonal(normalised))) ** 2
        exists = norm2 > 10 * float(jnp.finfo(dtype).eps) * magnitude
        exists &= seen[place] > 0
        ratio = jnp.where(exists, seen[place] / jnp.where(exists, norm2, 1), 0)
        weights = weights * scales * root(ratio)
        return weights, PCDState(average, counts), shortest.certificate

    def of(place: int | Int[Array, ""]) -> Weighting:
        solve = on_every_device(partial(pcd_weights, place))
        return certified(solve, init=init, certificate=certificate)

    def update(gramian, state, /, *, loss_names=None, **extra_args):
        check_names("tau", tau_names, loss_names)
        place = primary
        if isinstance(place, str):
            place = place_of("primary", place, loss_names)
        return of(place).update(gramian, state, **extra_args)

    return Weighting(of(0).init, update, takes=("loss_names",))


def check_primary(primary: str | int | Int[Array, ""], m: int) -> None:
    """**Raises:** `ValueError` if it is a number that no row has."""
    if isinstance(primary, int) and primary >= m:
        raise ValueError(
            f"`primary` must be the index of one of the {m} losses. Got {primary}."
        )


def check_fractions(
    tau: float
    | Float[Array, ""]
    | Float[Array, " m-1"]
    | Sequence[float]
    | Mapping[str, Any],
) -> Float[Array, ""] | Float[Array, " m-1"]:
    """**Raises:** `ValueError` or `TypeError` if they are not numbers in [0, 1]."""
    listed = isinstance(tau, Sequence | Mapping)
    if isinstance(tau, int | float) or not (listed or np.ndim(tau)):
        return jnp.asarray(check_number("tau", tau, "[0, 1]"))
    values = check_vector("tau", tau, nonnegative=True)
    if not isinstance(values, Tracer) and (np.asarray(values) > 1).any():
        raise ValueError(f"`tau` must be in [0, 1]. Got {np.asarray(values)}.")
    return values


def check_num_fractions(
    fractions: Float[Array, ""] | Float[Array, " k"], m: int, of_all: bool
) -> None:
    """**Raises:** `ValueError` if there is not one for each loss that needs one."""
    if not fractions.ndim or len(fractions) == (m if of_all else m - 1):
        return
    wanted = f"the {m}" if of_all else f"the {m - 1} secondary"
    raise ValueError(
        f"`tau` must be a number or have one entry for each of {wanted} losses. Got "
        f"{len(fractions)}."
    )


def fraction_of_each(
    fractions: Float[Array, ""] | Float[Array, " k"],
    m: int,
    primary: int | Int[Array, ""],
) -> Float[Array, " m"]:
    """One fraction for each loss. That of the primary loss is not used."""
    if not fractions.ndim or len(fractions) == m:
        return jnp.broadcast_to(fractions, m)
    every = jnp.arange(m)
    place = jnp.where(every > primary, every - 1, every)
    # A primary loss in the last row is one place beyond the fractions.
    padded = jnp.concatenate([fractions, jnp.zeros_like(fractions, shape=(1,))])
    return padded[place]
