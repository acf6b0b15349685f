"""GradNorm: bring the gradient norms of all losses to rates that they should have."""

from typing import NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from jaxjd._checks import (
    check_integer,
    check_length,
    check_mask,
    check_num_losses,
    check_number,
    check_vector,
    known,
    present_only,
)
from jaxjd._numerics import like, root
from jaxjd._typing import PerLoss
from jaxjd.scalarization._learned import LearnedState, check_optimizer, start, step
from jaxjd.scalarization._scalarizer import (
    Scalarizer,
    finite_losses,
    sum_of_present,
)
from jaxjd.weighting import Weighting
from jaxjd.weighting._losses import flat_losses, needed_losses


class GradNormState(NamedTuple):
    """The state of GradNorm.

    - `learned`: the weights of the next step, and the state of their optimizer.
    - `first`: the first value of each loss [m].
    - `started`: which losses have one [m].
    """

    learned: LearnedState
    first: Float[Array, " m"]
    started: Bool[Array, " m"]


def gradnorm(
    *,
    num_losses: int,
    alpha: float | Float[Array, ""] = 1.5,
    optimizer: optax.GradientTransformation | None = None,
    initial_losses: PerLoss | None = None,
) -> Scalarizer:
    r"""GradNorm: weights that even out how fast the losses are trained.

    $s(\ell) = \sum_i w_i \ell_i$. The weights start from 1. After each step they
    descend in $\sum_i |w_i \|g_i\| - \bar G r_i^\alpha|$, where $\bar G$ is the mean of
    all $w_i \|g_i\|$, and $r_i$ is the loss relative to its first value, divided by the
    mean of those of all losses. The target $\bar G r_i^\alpha$ counts as constant. Then
    the weights are scaled to sum m.

    $\|g_i\|$ is the norm of the gradient with respect to the parameters that the losses
    share. The paper takes the last shared layer:

    ```python
    tx = jaxjd.aggregate(
        jaxjd.scalarization.gradnorm(num_losses=2), wrt={"last": True, ...}
    )
    updates, state = tx.update(jac, state, params, losses=losses)
    ```

    `jaxjd.gradnorm(num_losses=2)` takes all parameters. Only the norms are computed, by
    [`jaxjd.Jacobian.squared_norms`][], and no Gramian. As a function of the losses its
    `update` takes the squared norms, [m], as the extra argument `squared_norms`.

    Losses must be positive. A weight that the optimizer takes below 0, where it would
    increase the loss, becomes 0. A missing loss keeps its weight, and the others share
    what they have together. A batch with a loss or a norm that is not finite makes the
    weights NaN and leaves the state as it was.

    **Arguments:**

    - `num_losses`: m.
    - `alpha`: $\alpha \geq 0$, how strongly a loss that is behind is pulled. With 0 all
      norms become equal.
    - `optimizer`: of the weights, by default `optax.adam(0.025)`.
    - `initial_losses`: m numbers that the losses are relative to, where it is known
      what an untrained model has: $\log C$ for C classes. By default those of the first
      batch.

    **Raises:** `TypeError` or `ValueError` if an argument is not a number, or is out of
    range, or `optimizer` is not an optimizer. When used, `ValueError` if `losses` are
    not given, or there are not `num_losses` losses.

    **Reference:** Chen et al. (2018), arXiv:1711.02257, equation 2 and Algorithm 1.

    **Example:**

    >>> params = jnp.zeros(3)
    >>> tx = jaxjd.gradnorm(num_losses=2)
    >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    >>> losses = jnp.array([1.0, 4.0])
    >>> update, state = tx.update(J, tx.init(params), params, losses=losses)
    >>> update
    Array([2., 2., 2.], dtype=float32)
    """
    size = check_integer("num_losses", num_losses, least=1)
    power = check_number("alpha", alpha, "[0, inf)")
    tx = check_optimizer(optimizer)
    given = None
    if initial_losses is not None:
        given = check_vector("initial_losses", initial_losses, nonnegative=True)
        if isinstance(size, int):
            check_length("initial_losses", given, size)

    def init():
        ones = jnp.ones(known("num_losses", size))
        first = ones if given is None else given.astype(ones.dtype)
        return GradNormState(
            start(ones, tx), first, jnp.full(ones.shape, given is not None)
        )

    def update(gramian, state, /, *, mask=None, losses=None, **extra_args):
        del extra_args  # For other links of the chain.
        gramian, mask = present_only(gramian, mask)
        m = check_num_losses(len(state.first), gramian)
        values = needed_losses("gradnorm", losses, m).astype(gramian.dtype)
        norms = root(jnp.diagonal(gramian))
        usable = jnp.isfinite(gramian).all() & finite_losses(values, mask)
        weights = jnp.where(mask, state.learned.scales.astype(values.dtype), 0)
        new = balanced(state, weights, values, norms, mask, usable)
        return jnp.where(usable, weights, jnp.nan), new

    def balanced(state, weights, values, norms, mask, usable):
        dtype = values.dtype
        now = jnp.where(mask, values, 1)
        first = jnp.where(state.started, state.first.astype(dtype), now)
        count = jnp.maximum(mask.sum(), 1).astype(dtype)
        progress = now / first
        rates = progress / (sum_of_present(progress, mask) / count)
        sizes = weights * norms
        targets = sum_of_present(sizes, mask) / count * rates ** like(power, values)
        gradient = jnp.sign(sizes - targets) * norms
        usable &= jnp.where(mask, jnp.isfinite(gradient), True).all()
        started = state.started | (mask & usable)
        learned = step(state.learned, gradient, mask, usable, tx)
        # The weights of the losses that are present have the sum that they had.
        moved = jnp.maximum(learned.scales, 0)
        total = sum_of_present(moved, mask)
        before = sum_of_present(state.learned.scales, mask)
        scale = before / jnp.where(total > 0, total, 1)
        scaled = jnp.where(mask & (total > 0), scale * moved, state.learned.scales)
        return GradNormState(
            learned._replace(scales=scaled),
            jnp.where(started, first.astype(state.first.dtype), state.first),
            started,
        )

    weighting = Weighting(init, update, reads="diagonal")
    return Scalarizer(init, of_norms(weighting), weighting)


def of_norms(weighting: Weighting):
    """The sum of the losses with weights that come from the norms of the gradients."""

    def update(losses, state, /, *, mask=None, squared_norms=None, **extra_args):
        values = flat_losses(losses)
        present = check_mask(mask, len(values))
        if squared_norms is None:
            raise ValueError(
                "`squared_norms` must be given to the update of gradnorm: [m], of the "
                "gradients of the losses with respect to the parameters that they "
                "share, `jac.squared_norms()`."
            )
        if jnp.shape(squared_norms) != values.shape:
            raise ValueError(
                f"`squared_norms` must have one entry for each of the {len(values)} "
                f"losses. Got shape {jnp.shape(squared_norms)}."
            )
        diagonal = jnp.diag(jnp.asarray(squared_norms))
        weights, state = weighting.update(
            diagonal, state, mask=present, losses=values, **extra_args
        )
        terms = weights.astype(values.dtype) * jnp.where(present, values, 0)
        return sum_of_present(terms, present), state

    return update
