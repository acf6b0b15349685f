"""CR-MOGM: average the weights of any weighting over the steps."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxjd._checks import (
    check_integer,
    check_length,
    check_mask,
    check_num_losses,
    check_number,
    check_vector,
    known,
)
from jaxjd._typing import PerLoss
from jaxjd.weighting._weighting import Weighting, check_weighting, keep_unless


class CRMOGMState(NamedTuple):
    """The state of [`jaxjd.weighting.cr_mogm`][].

    - `weighting`: the state of the weighting whose weights are averaged.
    - `average`: the average weight of each loss [m].
    - `started`: whether a loss has an average yet [m].
    - `count`: how many steps were made.
    """

    weighting: Any
    average: Float[Array, " m"]
    started: Bool[Array, " m"]
    count: Int[Array, ""]


def cr_mogm(
    weighting: Weighting,
    decay: float
    | Float[Array, ""]
    | Callable[[Int[Array, ""]], Float[Array, ""]] = 0.9,
    *,
    num_losses: int,
    initial_weights: PerLoss | None = None,
) -> Weighting:
    r"""Weights of CR-MOGM: an exponential moving average of those of a weighting.

    $w_k = \alpha_k w_{k-1} + (1 - \alpha_k) \hat w_k$, where $\hat w_k$ are the weights
    of the inner weighting at step k. Averages depend less on the batch, and with them
    stochastic methods converge. A missing loss keeps its average and has the weight 0
    in this step. Weights that are not finite leave the averages as they were.

    **Arguments:**

    - `weighting`: the one whose weights are averaged. It gets the mask and all extra
      arguments. Its state is part of the state.
    - `decay`: $\alpha$, how much of the average stays, in [0, 1], or a schedule of
      optax: a function of the number of steps made. The paper lets it increase towards
      1 as the learning rate decays.
    - `num_losses`: m.
    - `initial_weights`: $w_0$, m numbers. By default the average of a loss starts with
      its first weight.

    **Raises:** `TypeError` or `ValueError` if `weighting` is not a weighting, another
    argument is not a number, or is out of range, or the initial weights are not m
    finite numbers. When used, `ValueError` if there are not `num_losses` losses.

    **Reference:** Zhou et al. (2022), On the Convergence of Stochastic Multi-Objective
    Gradient Manipulation and Beyond, Algorithm 1.

    **Example:**

    >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    >>> weighting = jaxjd.weighting.cr_mogm(jaxjd.weighting.mean(), num_losses=2)
    >>> weights, state = weighting.update(J @ J.T, weighting.init())
    >>> weights
    Array([0.5, 0.5], dtype=float32)
    """
    check_weighting(weighting)
    size = check_integer("num_losses", num_losses, least=1)
    if not callable(decay):
        check_number("decay", decay, "[0, 1]")
    start = None
    if initial_weights is not None:
        start = check_vector("initial_weights", initial_weights, nonnegative=False)
        if isinstance(size, int):
            check_length("initial_weights", start, size)

    def init():
        m = known("num_losses", size)
        average = jnp.zeros(m) if start is None else start.astype(float)
        started = jnp.full(m, start is not None)
        return CRMOGMState(weighting.init(), average, started, jnp.zeros((), jnp.int32))

    def update(gramian, state, /, *, mask=None, **extra_args):
        chosen, inner = weighting.update(
            gramian, state.weighting, mask=mask, **extra_args
        )
        mask = check_mask(mask, check_num_losses(len(state.average), gramian))
        stays = decay(state.count) if callable(decay) else decay
        stays = jnp.asarray(stays, chosen.dtype)
        average = state.average.astype(chosen.dtype)
        moved = jnp.where(state.started, stays * average + (1 - stays) * chosen, chosen)
        new = CRMOGMState(
            inner,
            jnp.where(mask, moved, average),
            state.started | mask,
            jnp.asarray(optax.safe_increment(state.count)),
        )
        finite = jnp.isfinite(chosen).all()
        # The inner weighting itself decides what it keeps.
        kept = keep_unless(finite, new, state)._replace(weighting=inner)
        return jnp.where(mask, moved, 0), kept

    return Weighting(init, update, weighting.reads, weighting.takes)
