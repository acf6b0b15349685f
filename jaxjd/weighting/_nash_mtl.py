"""Nash-MTL: take the update that the losses would agree on by bargaining."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxjd._checks import check_integer, check_num_losses, check_number, known
from jaxjd._numerics import like, matmul, root
from jaxjd._sharding import on_every_device, varying
from jaxjd.solvers import bargain
from jaxjd.weighting._certified import certified
from jaxjd.weighting._weighting import Weighting


class NashMTLState(NamedTuple):
    """The state of Nash-MTL."""

    weights: Float[Array, " m"]
    """The last weights that were solved for, before their norm was limited."""
    count: Int[Array, ""]
    """How many steps there were."""


def nash_mtl(
    *,
    num_losses: int,
    max_norm: float | Float[Array, ""] = 1.0,
    update_every: int | Int[Array, ""] = 1,
    certificate: bool = False,
) -> Weighting:
    r"""Weights of the Nash bargaining solution, $Gw = 1/w$, entry by entry.

    Among updates $d$ of equal norm, this one maximises $\prod_i g_i^\top d$: no loss
    can gain a percentage that costs the others less. Its norm is $\sqrt m$, which
    `max_norm` limits. A loss whose gradient is zero gets the weight zero. At a
    Pareto-stationary point there is no solution. The weights are finite there, and the
    update is nearly zero beside them.

    The equations are solved by Newton's method, [`jaxjd.solvers.bargain`][]. TorchJD
    takes J, solves a sequence of linearised problems with ECOS, and keeps its last
    weights where ECOS fails.

    **Arguments:**

    - `num_losses`: m.
    - `max_norm`: the largest norm of the update $J^\top w$, or 0 for no limit.
    - `update_every`: for how many steps the same weights are used. A loss that is
      missing when they are chosen has the weight zero until they are chosen again.
    - `certificate`: whether the state keeps the [`jaxjd.solvers.Certificate`][] of the
      weights. `optax.tree.get(opt_state, "certificate")` finds it.

    **Raises:** `ValueError` or `TypeError` if `num_losses` or `update_every` is not a
    positive integer, or `max_norm` is not a number in [0, inf). When used, `ValueError`
    if there are not `num_losses` losses.

    **Reference:** Navon et al. (2022), arXiv:2202.01017, equation 2 and algorithm 1.

    **Example:**

    >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    >>> weighting = jaxjd.weighting.nash_mtl(num_losses=2)
    >>> weights, state = weighting.update(J @ J.T, weighting.init())
    >>> weights
    Array([0.4182, 0.2878], dtype=float32)
    """
    size = check_integer("num_losses", num_losses, least=1)
    period = check_integer("update_every", update_every, least=1)
    checked = check_number("max_norm", max_norm, "[0, inf)")

    def init():
        m = known("num_losses", size)
        return NashMTLState(jnp.ones(m), jnp.zeros((), jnp.int32))

    def nash_mtl_weights(gramian, mask, state, last):
        check_num_losses(len(state.weights), gramian)

        def solve():
            solved = bargain(gramian, alpha=1.0, mask=mask)
            found = solved.solution, solved.certificate
            return jax.tree.map(like, found, (state.weights, last))

        due = state.count % period == 0
        chosen, proof = lax.cond(
            due, solve, lambda: varying((state.weights, last), gramian)
        )
        weights = jnp.where(mask, chosen.astype(gramian.dtype), 0)
        limit = like(checked, gramian)
        norm = root(jnp.vdot(weights, matmul(gramian, weights)))
        over = (norm > limit) & (limit > 0)
        weights = jnp.where(over, weights / jnp.where(over, norm, 1), weights)
        weights = jnp.where(over, weights * limit, weights)
        return weights, NashMTLState(chosen, state.count + 1), proof

    # Outside of any `jit`, the `cond` would be compiled anew at each step.
    return certified(
        on_every_device(jax.jit(nash_mtl_weights)), init=init, certificate=certificate
    )
