"""MoDo: approach MGDA's weights by one projected step from two batches."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxjd._checks import check_integer, check_num_losses, check_number, known
from jaxjd._numerics import like, matmul
from jaxjd._sharding import on_every_device
from jaxjd.weighting._cross_gramian import of_cross_gramian
from jaxjd.weighting._simplex import project_onto_simplex, share_of_present
from jaxjd.weighting._weighting import Weighting, stateful


class MoDoState(NamedTuple):
    """`weights`: those of the last step, on the simplex [m]."""

    weights: Float[Array, " m"]


def modo(
    *,
    num_losses: int,
    step_size: float | Float[Array, ""] = 0.1,
    regularization: float | Float[Array, ""] = 0.1,
) -> Weighting:
    r"""Weights of MoDo, multi-objective gradient with double sampling.

    $w \leftarrow \Pi(w - \gamma (J_1 J_2^\top w + \rho w))$, where $\Pi$ is the
    projection onto the simplex. $w$ starts from $1/m$ and is kept from step to step. A
    missing loss keeps its part of $w$, and the others divide the rest.

    $J_1$ and $J_2$ must come from independent batches. `update` takes the extra
    argument `cross_gramian`, [m, m], and uses it in place of the Gramian. The update
    itself is that of both batches, as in the paper, or of a third one:

    ```python
    tx = optax.chain(jaxjd.modo(num_losses=2), optax.sgd(0.1))
    jac1, jac2 = (jaxjd.jac(losses)(params, batch) for batch in batches)
    both = jaxjd.jac(lambda p: (losses(p, batches[0]) + losses(p, batches[1])) / 2)
    cross_gramian = jac1.cross_gramian(jac2)
    updates, state = tx.update(
        both(params), state, params, cross_gramian=cross_gramian
    )
    ```

    **Arguments:**

    - `num_losses`: m.
    - `step_size`: $\gamma > 0$, in units of one over the Gramian.
    - `regularization`: $\rho \geq 0$, how strongly the weights are pulled towards equal
      ones.

    **Raises:** `TypeError` or `ValueError` if an argument is not a number, or is out of
    range. When used, `ValueError` if `cross_gramian` is not given, or there are not
    `num_losses` losses.

    **Reference:** Chen et al. (2024), Three-Way Trade-Off in Multi-Objective Learning,
    JMLR 25, equation 2.9.

    **Example:**

    >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    >>> weighting = jaxjd.weighting.modo(num_losses=2)
    >>> weights, state = weighting.update(
    ...     J @ J.T, weighting.init(), cross_gramian=J @ J.T
    ... )
    >>> weights
    Array([1., 0.], dtype=float32)
    """
    size = check_integer("num_losses", num_losses, least=1)
    gamma = check_number("step_size", step_size, "(0, inf)")
    rho = check_number("regularization", regularization, "[0, inf)")

    def init():
        m = known("num_losses", size)
        return MoDoState(jnp.full(m, 1 / m, float))

    def weights(cross_gramian, mask, state):
        check_num_losses(len(state.weights), cross_gramian)
        old = state.weights.astype(cross_gramian.dtype)
        w, share = share_of_present(old, mask)
        gradient = matmul(cross_gramian, w) + like(rho, w) * w
        w = project_onto_simplex(w - like(gamma, w) * gradient, mask)
        return w, MoDoState(jnp.where(mask, share * w, old))

    return of_cross_gramian("modo", stateful(init, on_every_device(weights)))
