"""GradVac: turn every gradient until its cosines reach their averages so far."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from jaxjd._checks import (
    check_integer,
    check_key,
    check_num_losses,
    check_number,
    known,
)
from jaxjd._numerics import like, matmul, root, unit_diagonal
from jaxjd._sharding import on_every_device, varying
from jaxjd.weighting._permutations import row_permutations
from jaxjd.weighting._weighting import Weighting, stateful


class GradVacState(NamedTuple):
    r"""The state of [`jaxjd.weighting.gradvac`][].

    - `targets`: $\hat\phi$ [m, m], the averages of the cosines seen so far. Row i are
      those of $g_i^{PC}$ with each gradient. Zero at first.
    - `key`: of `jax.random`, split at each step.
    """

    targets: Float[Array, "m m"]
    key: Key[Array, ""]


def gradvac(
    *,
    num_losses: int,
    decay: float | Float[Array, ""] = 0.5,
    eps: float | Float[Array, ""] = 1e-8,
    key: int | Key[Array, ""] = 0,
) -> Weighting:
    r"""Weights of GradVac, gradient vaccine: PCGrad with targets other than zero.

    Each gradient $g_i^{PC}$ starts as $g_i$ and meets the others in a random order.
    Where its cosine $\phi$ with $g_j$ is below the target $\hat\phi_{ij}$, as much of
    $g_j$ is added as brings it there, the multiple

    $$ \frac{\|g_i^{PC}\| (\hat\phi \sqrt{1 - \phi^2} - \phi \sqrt{1 - \hat\phi^2})}
       {\|g_j\| \sqrt{1 - \hat\phi^2}}. $$

    Then $\hat\phi_{ij} \leftarrow (1 - \beta) \hat\phi_{ij} + \beta \phi$. The update
    is $\sum_i g_i^{PC}$. A zero gradient has no cosines: it turns no other gradient,
    and its targets stay as they were.

    **Arguments:**

    - `num_losses`: m.
    - `decay`: $1 - \beta$, how much of a target stays, in [0, 1].
    - `eps`: is added to the denominators of the cosine and of the multiple, and bounds
      the multiple where the target is 1. It is relative to the norms of the gradients,
      so the weights are the same at all scales. TorchJD adds it to products of norms,
      and turns no gradient where norms are below 1e-4.
    - `key`: an integer seed or a key of `jax.random`. It lives in the state. Under
      `jax.vmap`, make the key in the mapped function, or all runs draw the same: see
      [`jaxjd.weighting.random`][].

    **Raises:** `TypeError` or `ValueError` if an argument is not a number, or is out of
    range. When used, `ValueError` if there are not `num_losses` losses.

    **Reference:** Wang et al. (2021), arXiv:2010.05874, Algorithm 1.

    **Example:**

    >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    >>> weighting = jaxjd.weighting.gradvac(num_losses=2)
    >>> weights, state = weighting.update(J @ J.T, weighting.init())
    >>> weights
    Array([2.2222, 1.5789], dtype=float32)
    """
    size = check_integer("num_losses", num_losses, least=1)
    numbers = (
        check_number("decay", decay, "[0, 1]"),
        check_number("eps", eps, "[0, inf)"),
    )
    start = check_key(key)

    def init():
        m = known("num_losses", size)
        return GradVacState(jnp.zeros((m, m)), start)

    def weights(gramian, mask, state):
        m = check_num_losses(len(state.targets), gramian)
        key, now = jax.random.split(state.key)
        orders = row_permutations(now, m)
        targets = state.targets.astype(gramian.dtype)
        decay, eps = (like(number, gramian) for number in numbers)
        chosen, targets = gradvac_weights(
            gramian, mask, orders, targets, decay=decay, eps=eps
        )
        return chosen, GradVacState(targets, key)

    return stateful(init, on_every_device(weights))


@jax.jit
def gradvac_weights(
    gramian: Float[Array, "m m"],
    mask: Bool[Array, " m"],
    permutations: Int[Array, "m m"],
    targets: Float[Array, "m m"],
    *,
    decay: float | Float[Array, ""],
    eps: float | Float[Array, ""],
) -> tuple[Float[Array, " m"], Float[Array, "m m"]]:
    """The weights and the new targets for given orders.

    Gradient i meets the others in the order of row i of `permutations`.
    """
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
            # Each pair meets once, so this entry has not changed before.
            targets.at[own, others].set(followed),
        ), None

    start = jnp.eye(gramian.shape[0], dtype=gramian.dtype), scaled.C, targets
    (coefficients, _, targets), _ = lax.scan(
        meet, varying(start, gramian), permutations.T
    )
    # Back from unit gradients. A zero gradient keeps the weight 1.
    norms = jnp.where(nonzero, scaled.norms, 1)
    weights = matmul(norms, coefficients) / norms
    return jnp.where(mask, weights, 0), targets


def ratio(numerator: Float[Array, " m"], denominator: Float[Array, " m"]):
    """The quotient, 0 where the denominator is 0, which needs an `eps` of 0."""
    zero = denominator == 0
    return jnp.where(zero, 0, numerator / jnp.where(zero, 1, denominator))


def sine(cosine: Float[Array, " m"]) -> Float[Array, " m"]:
    """The sine of the angle with a given cosine."""
    # Not 1 - cosine^2, which cannot tell a cosine near 1 from 1.
    return root((1 - cosine) * (1 + cosine))
