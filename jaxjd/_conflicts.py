"""Which losses does the step that is taken increase?"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxjd._checks import check_mask, check_number
from jaxjd._numerics import accumulation_dtype, like, root
from jaxjd._typing import PyTree
from jaxjd.jacobian import Jacobian
from jaxjd.transform._arguments import in_order


class Conflicts(NamedTuple):
    r"""How m losses change along a step $u$ of the parameters, to first order.

    The first three are shaped like the losses, a dict of arrays for example.

    - `changes`: of each loss, $\langle g_i, u \rangle$; negative if it decreases.
    - `cosines`: between $u$ and the gradient $g_i$ of each loss, 0 if either is zero.
      The best step for a loss has -1.
    - `increases`: whether the cosine is above the tolerance. False if it is NaN.
    - `fraction`: of the losses that increase, []. NaN if a cosine is.
    - `worst`: the largest of the cosines, []. Not positive if no loss increases.
    """

    changes: PyTree[Float[Array, "..."]]
    cosines: PyTree[Float[Array, "..."]]
    increases: PyTree[Bool[Array, "..."]]
    fraction: Float[Array, ""]
    worst: Float[Array, ""]


def conflicts(
    jac: Any,  # A Jacobian, that of jaxjd.nnx too.
    updates: PyTree[Float[Array, "..."]],
    *,
    tolerance: float | Float[Array, ""] = 1e-3,
    mask: PyTree[Bool[Array, "..."]] | None = None,
) -> Conflicts:
    r"""Which losses an update increases, to first order.

    What an aggregator returns may conflict with no loss, and the step that is taken may
    still do so: momentum, scaling by coordinate and weight decay come after it. So give
    it what the whole chain returns:

    ```python
    updates, state = tx.update(jac, state, params)
    shown = jaxjd.conflicts(jac, updates)
    params = optax.apply_updates(params, updates)
    ```

    Updates are added to the parameters, so a loss increases where $\langle g_i, u
    \rangle > 0$. $J u$ takes about as long as a gradient of the sum of the losses, and
    `cosines` take [`jaxjd.Jacobian.squared_norms`][] too. Under `jit`, fields that are
    not used cost nothing.

    **Arguments:**

    - `jac`: the Jacobian at the parameters before the step. If it is restricted to some
      parameters, the others count as if they did not move.
    - `updates`: what is added to the parameters, a pytree like them. It may be the
      difference of the parameters after the step and before.
    - `tolerance`: for `increases`, a cosine in [0, 1]. A step that an aggregator leaves
      orthogonal to a gradient has a cosine of rounding, of either sign.
    - `mask`: m bools, or a pytree of them like the losses, False for the losses that
      are missing: their changes and cosines are zero, and they count for nothing.

    **Returns:** [`jaxjd.Conflicts`][], float32 or wider.

    **Raises:** `TypeError` if `jac` is not a Jacobian, or `updates` do not hold real
    numbers; `ValueError` if `updates` are not like the parameters, or `tolerance` is
    not in [0, 1]; `ValueError` or `TypeError` if `mask` is not m bools.

    **Example:**

    >>> def losses(x):
    ...     return {"far": x[0] - x[1], "near": x[0] ** 2}
    >>> params = jnp.array([1.0, 0.0])
    >>> _, jac = jaxjd.value_and_jac(losses)(params)
    >>> shown = jaxjd.conflicts(jac, jnp.array([-0.1, -0.2]))
    >>> shown.changes
    {'far': Array(0.1, dtype=float32), 'near': Array(-0.2, dtype=float32)}
    >>> shown.increases
    {'far': Array(True, dtype=bool), 'near': Array(False, dtype=bool)}
    """
    # flax.nnx holds it in a container of its own.
    held = jax.tree.leaves(jac, is_leaf=lambda x: isinstance(x, Jacobian))
    if len(held) != 1 or not isinstance(held[0], Jacobian):
        raise TypeError(
            "`jac` must be a jaxjd.Jacobian, the second value of `jaxjd.value_and_jac`."
            f" Got {type(jac).__name__}."
        )
    jac = held[0]
    least = check_number("tolerance", tolerance, "[0, 1]")
    losses = jac._losses
    present = check_mask(in_order("mask", mask, jac), losses.num_losses)
    moved = jac._parameters.flatten("updates", updates)
    squares = jac.squared_norms()
    dtype = accumulation_dtype(squares, *moved)
    wide = [x.astype(dtype) for x in moved]
    # In units of the largest entry, as the squares of a small step may underflow.
    largest = jnp.stack([jnp.max(jnp.abs(x), initial=0) for x in wide]).max()
    unit = [x / jnp.where(largest > 0, largest, 1) for x in wide]
    length = root(sum((jnp.sum(jnp.square(x)) for x in unit), jnp.zeros((), dtype)))
    change = losses.flatten("changes", jac.jvp(jac._parameters.unflatten(unit)))
    # NaN is not above zero, but must stay visible.
    scale = root(squares).astype(dtype) * length
    zero = scale == 0
    cosine = jnp.where(zero, 0, change.astype(dtype) / jnp.where(zero, 1, scale))
    cosine = jnp.where(present, cosine, 0)
    increases = cosine > like(least, cosine)
    count = jnp.maximum(present.sum(), 1).astype(dtype)
    worst = jnp.where(present, cosine, -jnp.inf).max()

    def shaped(vector: Array) -> Any:
        return losses.unflatten(vector)

    return Conflicts(
        changes=shaped(jnp.where(present, change.astype(dtype) * largest, 0)),
        cosines=shaped(cosine),
        increases=shaped(increases),
        fraction=jnp.where(increases, 1, cosine * 0).sum() / count,
        worst=jnp.where(present.any(), worst, 0),
    )
