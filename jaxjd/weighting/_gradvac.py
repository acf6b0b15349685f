"""GradVac: turn every gradient until its cosines are what they were on average."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from jaxjd._checks import check_integer, check_key, check_num_losses, check_number
from jaxjd._numerics import matmul, root, unit_diagonal
from jaxjd.weighting._permutations import row_permutations
from jaxjd.weighting._weighting import Weighting, stateful


class GradVacState(NamedTuple):
    r"""The state of [`jaxjd.weighting.gradvac`][].

    - `targets`: $\hat\phi$ [m, m], the averages of the cosines seen so far, where
      row i is what $g_i^{PC}$ had with each gradient. Zero at first.
    - `key`: of `jax.random`, split at each step.
    """

    targets: Float[Array, "m m"]
    key: Key[Array, ""]


def gradvac(
    *,
    num_losses: int,
    decay: float = 0.5,
    eps: float = 1e-8,
    key: int | Key[Array, ""] = 0,
) -> Weighting:
    r"""Weights of GradVac, gradient vaccine: PCGrad with a target other than zero.

    Each gradient $g_i^{PC}$ starts as $g_i$ and meets the others in a random order.
    Where its cosine $\phi$ with $g_j$ is below the target $\hat\phi_{ij}$, it gets as
    much of $g_j$ as brings it there, the multiple

    $$ \frac{\|g_i^{PC}\| (\hat\phi \sqrt{1 - \phi^2} - \phi \sqrt{1 - \hat\phi^2})}
       {\|g_j\| \sqrt{1 - \hat\phi^2}}. $$

    Then $\hat\phi_{ij} \leftarrow (1 - \beta) \hat\phi_{ij} + \beta \phi$. The update
    is $\sum_i g_i^{PC}$. A gradient that is zero has no cosines: it turns nobody, and
    its targets stay as they were.

    **Arguments:**

    - `num_losses`: m.
    - `decay`: $1 - \beta$, how much of a target stays, in [0, 1].
    - `eps`: is added to the denominators of the cosine and of the multiple, and bounds
      the multiple where the target is 1. Gradients count in units of their norms here:
      `eps` means the same at all scales, and so do the weights. TorchJD adds it to
      products of norms, with which it turns nobody where norms are below 1e-4.
    - `key`: an integer seed or a key of `jax.random`. It lives in the state.

    **Raises:** `TypeError` or `ValueError` if a number is none or out of its range,
    and, when used, `ValueError` if there are not `num_losses` losses.

    **Reference:** Wang et al. (2021), arXiv:2010.05874, Algorithm 1.
    """
    check_integer("num_losses", num_losses, least=1)
    check_number("decay", decay, "[0, 1]")
    check_number("eps", eps, "[0, inf)")
    start = check_key(key)

    def init():
        return GradVacState(jnp.zeros((num_losses, num_losses)), start)

    def weights(gramian, mask, state):
        check_num_losses(num_losses, gramian)
        key, now = jax.random.split(state.key)
        orders = row_permutations(now, num_losses)
        targets = state.targets.astype(gramian.dtype)
        chosen, targets = gradvac_weights(
            gramian, mask, orders, targets, decay=decay, eps=eps
        )
        return chosen, GradVacState(targets, key)

    return stateful(init, weights)


@functools.partial(jax.jit, static_argnames=("decay", "eps"))
def gradvac_weights(
    gramian: Float[Array, "m m"],
    mask: Bool[Array, " m"],
    permutations: Int[Array, "m m"],
    targets: Float[Array, "m m"],
    *,
    decay: float,
    eps: float,
) -> tuple[Float[Array, " m"], Float[Array, "m m"]]:
    """The weights where gradient i meets the others in the order of row i; targets."""
    own = jnp.arange(gramian.shape[0])
    scaled = unit_diagonal(gramian)
    nonzero = scaled.norms > 0

    def meet(carry, others):
        # Row i of `coefficients` is g_i^PC / |g_i| in terms of the unit gradients, and
        # row i of `cosines` is the inner products of that with the unit gradients.
        coefficients, cosines, targets = carry
        norms = root((coefficients * cosines).sum(axis=1))
        phi = jnp.clip(ratio(cosines[own, others], norms + eps), -1, 1)
        target = targets[own, others]
        turn = norms * ratio(
            target * sine(phi) - phi * sine(target), sine(target) + eps
        )
        meets = (others != own) & nonzero & nonzero[others]
        turn = jnp.where(meets & (phi < target), turn, 0)
        followed = jnp.where(meets, decay * target + (1 - decay) * phi, target)
        return (
            coefficients.at[own, others].add(turn),
            cosines + turn[:, None] * scaled.C[others],
            # Each pair meets once: nobody has changed this entry before.
            targets.at[own, others].set(followed),
        ), None

    start = jnp.eye(gramian.shape[0], dtype=gramian.dtype), scaled.C, targets
    (coefficients, _, targets), _ = lax.scan(meet, start, permutations.T)
    # Back from unit gradients, where a gradient of zero keeps the weight 1.
    norms = jnp.where(nonzero, scaled.norms, 1)
    weights = matmul(norms, coefficients) / norms
    return jnp.where(mask, weights, 0), targets


def ratio(numerator: Float[Array, " m"], denominator: Float[Array, " m"]):
    """0 where the denominator is: only with an `eps` of 0."""
    zero = denominator == 0
    return jnp.where(zero, 0, numerator / jnp.where(zero, 1, denominator))


def sine(cosine: Float[Array, " m"]) -> Float[Array, " m"]:
    # Not 1 - cosine^2, which loses what distinguishes a cosine near 1 from 1.
    return root((1 - cosine) * (1 + cosine))
