"""SDMGrad: approach MGDA's weights by projected steps, near a preference."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxjd._checks import (
    check_integer,
    check_num_losses,
    check_number,
    known,
)
from jaxjd._numerics import like, matmul, root
from jaxjd._sharding import on_every_device, varying
from jaxjd._typing import PerLoss
from jaxjd.weighting._cross_gramian import of_cross_gramian
from jaxjd.weighting._preference import Preference, mean_weights
from jaxjd.weighting._simplex import project_onto_simplex, share_of_present
from jaxjd.weighting._weighting import Weighting, stateful


class SDMGradState(NamedTuple):
    """`weights`: where the next steps start from, on the simplex [m]."""

    weights: Float[Array, " m"]


def sdmgrad(
    *,
    num_losses: int,
    step_size: float | Float[Array, ""] = 10.0,
    momentum: float | Float[Array, ""] = 0.5,
    inner_steps: int | Int[Array, ""] = 20,
    regularization: float | Float[Array, ""] = 0.3,
    preference: PerLoss | None = None,
) -> Weighting:
    r"""Weights of SDMGrad, stochastic direction-oriented multi-objective descent.

    $(w + \lambda u) / (1 + \lambda)$ with the preference $u$, where $w$ is kept from
    step to step and moved by `inner_steps` steps
    $w \leftarrow \Pi(w - \eta A (w + \lambda u))$, with momentum. $\Pi$ is the
    projection onto the simplex. $A$ is $J_1 J_2^\top$ divided by the square of the mean
    of $\sqrt{\max(a, 0)}$ over the entries $a$ of its diagonal. If that is zero, $w$
    stays as it was. A missing loss keeps its part of $w$, and the others divide the
    rest.

    $J_1$ and $J_2$ must come from independent batches. `update` takes the extra
    argument `cross_gramian`, [m, m], and uses it in place of the Gramian. With a third
    batch for the update itself, as in the paper:

    ```python
    tx = optax.chain(jaxjd.sdmgrad(num_losses=2), optax.sgd(0.1))
    jac1, jac2, jac3 = (jaxjd.jac(losses)(params, batch) for batch in batches)
    cross_gramian = jac1.cross_gramian(jac2)
    updates, state = tx.update(jac3, state, params, cross_gramian=cross_gramian)
    ```

    **Arguments:**

    - `num_losses`: m.
    - `step_size`: $\eta > 0$.
    - `momentum`: in [0, 1).
    - `inner_steps`: how many steps, at least 1.
    - `regularization`: $\lambda \geq 0$, how strongly the weights are pulled towards
      the preference.
    - `preference`: $u \succeq 0$, m numbers. By default $1/m$ for each loss.

    **Raises:** `TypeError` or `ValueError` if an argument is not a number, or is out of
    range, or `preference` is not a vector of finite nonnegative reals. When used,
    `ValueError` if `cross_gramian` is not given, or there are not `num_losses` losses.

    **Reference:** Xiao et al. (2023), arXiv:2305.18409, Algorithm 1, scaled as in
    section 6.1.

    **Example:**

    >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    >>> weighting = jaxjd.weighting.sdmgrad(num_losses=2)
    >>> weights, state = weighting.update(
    ...     J @ J.T, weighting.init(), cross_gramian=J @ J.T
    ... )
    >>> weights
    Array([0.1154, 0.8846], dtype=float32)
    """
    size = check_integer("num_losses", num_losses, least=1)
    numbers = (
        check_number("step_size", step_size, "(0, inf)"),
        check_number("momentum", momentum, "[0, 1)"),
        check_number("regularization", regularization, "[0, inf)"),
    )
    steps = check_integer("inner_steps", inner_steps, least=1)
    chosen = Preference(preference)

    def init():
        m = known("num_losses", size)
        return SDMGradState(jnp.full(m, 1 / m, float))

    def weights(cross_gramian, mask, state, preferred):
        check_num_losses(len(state.weights), cross_gramian)
        eta, momentum, pull = (like(number, cross_gramian) for number in numbers)
        roots = root(jnp.diagonal(cross_gramian))
        scale = matmul(roots, mean_weights(cross_gramian, mask))
        # One factor after the other: their product may overflow.
        inverse = jnp.where(scale == 0, 0, 1 / jnp.where(scale == 0, 1, scale))
        A = cross_gramian * inverse * inverse

        def step(_, carry):
            w, velocity = carry
            velocity = momentum * velocity + matmul(A, w + pull * preferred)
            return project_onto_simplex(w - eta * velocity, mask), velocity

        old = state.weights.astype(A.dtype)
        w, share = share_of_present(old, mask)
        start = varying((w, jnp.zeros_like(w)), A)
        w, _ = lax.fori_loop(0, steps, step, start)
        kept = SDMGradState(jnp.where(mask, share * w, old))
        return (w + pull * preferred) / (1 + pull), kept

    # Outside of any `jit`, the loop would be compiled anew at each step.
    compiled = on_every_device(jax.jit(weights))
    return of_cross_gramian("sdmgrad", stateful(init, compiled, preference=chosen))
