"""SDMGrad: MGDA's weights by projected steps, near those of a preference."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxjd._checks import check_integer, check_num_losses, check_number, check_vector
from jaxjd._numerics import matmul, root
from jaxjd.weighting._cross_gramian import of_cross_gramian
from jaxjd.weighting._preference import preference_or_mean
from jaxjd.weighting._simplex import project_onto_simplex, share_of_present
from jaxjd.weighting._weighting import Weighting, stateful


class SDMGradState(NamedTuple):
    """`weights`: where the next steps start from, on the simplex [m]."""

    weights: Float[Array, " m"]


def sdmgrad(
    *,
    num_losses: int,
    step_size: float = 10.0,
    momentum: float = 0.5,
    inner_steps: int = 20,
    regularization: float = 0.3,
    preference: Float[Array, " m"] | Sequence[float] | None = None,
) -> Weighting:
    r"""Weights of SDMGrad, stochastic direction-oriented multi-objective descent.

    $(w + \lambda u) / (1 + \lambda)$ with the preference $u$, where $w$ is kept from
    step to step and moved by `inner_steps` steps
    $w \leftarrow \Pi(w - \eta A (w + \lambda u))$, with momentum. $\Pi$ is the
    projection onto the simplex and $A$ is $J_1 J_2^\top$ over the square of the mean of
    the roots of its diagonal (0 for negative entries; where there is no other, $w$
    stays).

    $J_1$ and $J_2$ must be of independent batches: the update takes the extra argument
    `cross_gramian`, [m, m], and uses it instead of the Gramian. With a third batch for
    the update itself, as in the paper:

    ```python
    tx = optax.chain(jaxjd.sdmgrad(num_losses=2), optax.sgd(0.1))
    jac1, jac2, jac3 = (jaxjd.jac(losses)(params, batch) for batch in batches)
    cross_gramian = jac1.cross_gramian(jac2)
    updates, state = tx.update(jac3, state, params, cross_gramian=cross_gramian)
    ```

    **Arguments:**

    - `num_losses`: m.
    - `step_size`, `momentum`, `inner_steps`: $\eta > 0$, in [0, 1), and at least 1.
    - `regularization`: $\lambda \geq 0$, how strongly the preference pulls.
    - `preference`: $u \succeq 0$, m numbers. By default $1/m$ for each loss.

    A loss that is missing keeps its part of $w$, and the others share what is left.

    **Raises:** `TypeError` or `ValueError` if a number is none or out of its range, or
    `preference` is not a vector of finite nonnegative reals, and, when used,
    `ValueError` if there is no `cross_gramian`, or there are not `num_losses` losses.

    **Reference:** Xiao et al. (2023), arXiv:2305.18409, Algorithm 1, scaled as in
    section 6.1.
    """
    check_integer("num_losses", num_losses, least=1)
    check_number("step_size", step_size, "(0, inf)")
    check_number("momentum", momentum, "[0, 1)")
    check_integer("inner_steps", inner_steps, least=1)
    check_number("regularization", regularization, "[0, inf)")
    checked = None
    if preference is not None:
        checked = check_vector("preference", preference, nonnegative=True)

    def init():
        return SDMGradState(jnp.full(num_losses, 1 / num_losses))

    def weights(cross_gramian, mask, state):
        check_num_losses(num_losses, cross_gramian)
        preferred = preference_or_mean(checked, cross_gramian, mask)
        roots = root(jnp.diagonal(cross_gramian))
        scale = matmul(roots, preference_or_mean(None, cross_gramian, mask))
        # One factor after the other: their product may overflow.
        inverse = jnp.where(scale == 0, 0, 1 / jnp.where(scale == 0, 1, scale))
        A = cross_gramian * inverse * inverse

        def step(_, carry):
            w, velocity = carry
            velocity = momentum * velocity + matmul(A, w + regularization * preferred)
            return project_onto_simplex(w - step_size * velocity, mask), velocity

        old = state.weights.astype(A.dtype)
        w, share = share_of_present(old, mask)
        w, _ = lax.fori_loop(0, inner_steps, step, (w, jnp.zeros_like(w)))
        kept = SDMGradState(jnp.where(mask, share * w, old))
        return (w + regularization * preferred) / (1 + regularization), kept

    # Called outside of any `jit`, its loop would be compiled anew at each step.
    return of_cross_gramian("sdmgrad", stateful(init, jax.jit(weights)))
