"""DWA: give more weight to the losses that fell least in the last epoch."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxjd._checks import check_integer, check_number, known
from jaxjd._numerics import like
from jaxjd.scalarization._learned import check_length_of_state
from jaxjd.scalarization._scalarizer import (
    Scalarizer,
    finite_losses,
    scalarizer,
    sum_of_present,
)
from jaxjd.weighting._weighting import keep_unless


class DWAState(NamedTuple):
    """The state of DWA.

    - `steps`: how many there were in this epoch, [].
    - `sums`: of each loss over this epoch [m].
    - `counts`: how many steps of this epoch it took part in [m].
    - `last`, `before`: its means over the last epoch and the one before [m]. 0 until
      there is one.
    """

    steps: Int[Array, ""]
    sums: Float[Array, " m"]
    counts: Int[Array, " m"]
    last: Float[Array, " m"]
    before: Float[Array, " m"]


def dwa(
    *,
    num_losses: int,
    epoch_steps: int | Int[Array, ""],
    temperature: float | Float[Array, ""] = 2.0,
) -> Scalarizer:
    r"""Dynamic weight average: weights from how fast the mean losses of epochs fall.

    $s(\ell) = \sum_i \lambda_i \ell_i$ with $\lambda = m \operatorname{softmax}(r / T)$
    and $r_i = L_i(t-1) / L_i(t-2)$, where $L_i(t)$ is the mean of the loss over epoch
    t. In the first two epochs, and for a loss without two means, $r_i = 1$.

    The mean is over the batches in which the loss was present. With a mask, m is the
    number of losses that are present. A batch with a loss that is not finite makes the
    weights NaN and leaves the state as it was.

    **Arguments:**

    - `num_losses`: m.
    - `epoch_steps`: how many steps an epoch has.
    - `temperature`: $T > 0$. With larger ones the weights are more equal.

    **Raises:** `TypeError` or `ValueError` if an argument is not a number, or is out of
    range. When used, `ValueError` if there are not `num_losses` losses.

    **Reference:** Liu et al. (2019), arXiv:1803.10704, equation 7.

    **Example:**

    >>> scalarizer = jaxjd.scalarization.dwa(num_losses=2, epoch_steps=100)
    >>> scalar, state = scalarizer.update(jnp.array([1.0, 4.0]), scalarizer.init())
    >>> scalar
    Array(5., dtype=float32)
    """
    size = check_integer("num_losses", num_losses, least=1)
    period = check_integer("epoch_steps", epoch_steps, least=1)
    checked = check_number("temperature", temperature, "(0, inf)")

    def init():
        zeros = jnp.zeros(known("num_losses", size))
        counts = jnp.zeros(zeros.shape, jnp.int32)
        return DWAState(jnp.zeros((), jnp.int32), zeros, counts, zeros, zeros)

    def scalar(values, mask, state, **extra_args):
        del extra_args  # For other links of the chain.
        check_length_of_state(state.sums, values)
        last, before = (x.astype(values.dtype) for x in (state.last, state.before))
        exists = before != 0
        rates = jnp.where(exists, last / jnp.where(exists, before, 1), 1)
        exponents = jnp.where(mask, rates / like(checked, values), -jnp.inf)
        shares = jnp.where(mask.any(), jax.nn.softmax(exponents), 0)
        weights = mask.sum().astype(values.dtype) * shares
        new = recorded(state, jnp.where(mask, values, 0), mask)
        new = keep_unless(finite_losses(values, mask), new, state)
        return sum_of_present(weights * values, mask), new

    def recorded(state, values, mask):
        steps = jnp.asarray(optax.safe_increment(state.steps))
        sums = state.sums + values.astype(state.sums.dtype)
        counts = state.counts + mask.astype(jnp.int32)
        seen = counts > 0
        means = sums / jnp.maximum(counts, 1).astype(sums.dtype)
        over = DWAState(
            jnp.zeros_like(steps),
            jnp.zeros_like(sums),
            jnp.zeros_like(counts),
            jnp.where(seen, means, state.last),
            jnp.where(seen, state.last, state.before),
        )
        going_on = DWAState(steps, sums, counts, state.last, state.before)
        return keep_unless(steps >= period, over, going_on)

    return scalarizer("dwa", scalar, init)
