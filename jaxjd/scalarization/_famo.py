"""FAMO: make all losses fall at the same rate, from the losses alone."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxjd._checks import check_integer, check_length, known
from jaxjd._typing import PerLoss
from jaxjd.scalarization._learned import (
    LEARNING_RATE,
    LearnedState,
    check_length_of_state,
    check_optimizer,
    start,
    step,
)
from jaxjd.scalarization._reference import above, check_reference
from jaxjd.scalarization._scalarizer import (
    Scalarizer,
    finite_losses,
    scalarizer,
    sum_of_present,
)
from jaxjd.weighting._losses import needed_losses

# As in the code of the authors.
EPSILON = 1e-8
WEIGHT_DECAY = 1e-3


class FAMOState(NamedTuple):
    """The state of FAMO.

    - `learned`: the logits of the weights, and the state of their optimizer.
    - `losses`: of the last batch, before the step [m].
    - `seen`: which of them were there [m].
    """

    learned: LearnedState
    losses: Float[Array, " m"]
    seen: Bool[Array, " m"]


def famo(
    *,
    num_losses: int,
    reference: PerLoss | None = None,
    optimizer: optax.GradientTransformation | None = None,
) -> Scalarizer:
    r"""Fast adaptive multitask optimization.

    With $z = \operatorname{softmax}(\xi)$ and $f_i = \ell_i - b_i + 10^{-8}$,

    $$s(\ell) = c \sum_i z_i \log f_i, \qquad c = 1 / \sum_i (z_i / f_i),$$

    where $z$ and $c$ count as constants. So the weights $c z_i / f_i$ sum to 1. The
    logits $\xi$ start from 0 and descend along $\nabla_\xi\, z^\top \delta$, where
    $\delta_i = \log f_i - \log f_i^+$ is how far the step has taken the loss.

    For this, `update` needs the losses of the last batch once more, at the parameters
    that the last step has led to. They are the extra argument `losses_after`. In the
    first step they do not matter, and may be the losses:

    ```python
    def step(params, state, batch, after):
        losses, jac = jaxjd.value_and_jac(fun)(params, batch)
        updates, state = tx.update(
            jac, state, params, losses=losses, losses_after=after
        )
        params = optax.apply_updates(params, updates)
        return params, state, fun(params, batch)  # The next `after`.
    ```

    If every step has the same batch, they are the losses of this step.

    Losses must be above their bounds; otherwise the weights are NaN. A missing loss
    keeps its logit. A batch with a loss that is not finite makes the weights NaN, and
    the logits learn nothing from it.

    **Arguments:**

    - `num_losses`: m.
    - `reference`: $b$, lower bounds of the losses, m numbers. By default 0.
    - `optimizer`: of the logits. By default Adam with L2 regularisation, as in the
      paper: `optax.chain(optax.add_decayed_weights(1e-3), optax.adam(0.025))`.

    **Raises:** `TypeError` or `ValueError` if `num_losses` is not a positive integer,
    `reference` is not m finite reals, or `optimizer` is not an optimizer. When used,
    `ValueError` if `losses_after` is not given, or there are not `num_losses` losses.

    **Reference:** Liu et al. (2023), arXiv:2306.03792. The weights are scaled to sum 1
    as in the code of the authors.

    **Example:**

    >>> scalarizer = jaxjd.scalarization.famo(num_losses=2)
    >>> losses, after = jnp.array([1.0, 4.0]), jnp.array([0.9, 3.9])
    >>> scalar, state = scalarizer.update(
    ...     losses, scalarizer.init(), losses_after=after
    ... )
    >>> scalar
    Array(1.109, dtype=float32)
    """
    size = check_integer("num_losses", num_losses, least=1)
    bounds = check_reference(reference)
    if bounds is not None and isinstance(size, int):
        check_length("reference", bounds, size)
    if optimizer is None:
        decay = optax.add_decayed_weights(WEIGHT_DECAY)
        optimizer = optax.chain(decay, optax.adam(LEARNING_RATE))
    tx = check_optimizer(optimizer)

    def init():
        zeros = jnp.zeros(known("num_losses", size))
        return FAMOState(start(zeros, tx), zeros, jnp.zeros(zeros.shape, bool))

    def scalar(values, mask, state, *, losses_after=None, **extra_args):
        del extra_args  # For other links of the chain.
        check_length_of_state(state.losses, values)
        after = needed_losses(
            "famo, of the last batch after the step",
            losses_after,
            len(values),
            name="losses_after",
        )
        learned = learn(state, after.astype(values.dtype))
        z = shares(learned.scales.astype(values.dtype), mask)
        f = jnp.where(mask, above(bounds, values) + EPSILON, 1)
        inverse = sum_of_present(z / f, mask)
        c = 1 / jnp.where(mask.any(), inverse, 1)
        total = sum_of_present(lax.stop_gradient(c * z) * jnp.log(f), mask)
        seen = mask & finite_losses(values, mask)
        kept = jnp.where(seen, values, 0).astype(state.losses.dtype)
        return total, FAMOState(learned, kept, seen)

    def learn(state, after):
        """Descend in the logits, for the losses that the last batch had."""
        seen = state.seen
        before = above(bounds, state.losses.astype(after.dtype)) + EPSILON
        delta = jnp.log(jnp.where(seen, before, 1))
        delta -= jnp.log(jnp.where(seen, above(bounds, after) + EPSILON, 1))
        z = shares(state.learned.scales.astype(after.dtype), seen)
        gradient = z * (delta - (z * delta).sum())
        usable = seen.any() & jnp.isfinite(gradient).all()
        return step(state.learned, gradient, seen, usable, tx)

    return scalarizer("famo", scalar, init)


def shares(logits: Float[Array, " m"], mask: Bool[Array, " m"]) -> Float[Array, " m"]:
    """The softmax over the losses that are present."""
    softmax = jax.nn.softmax(jnp.where(mask, logits, -jnp.inf))
    return jnp.where(mask, softmax, 0)
