"""M-ConFIG: the conflict-free direction of moments, for one gradient per step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, PyTree
from optax.experimental import aggregating

from jaxjd._checks import check_integer, check_mask, check_number, known
from jaxjd._numerics import accumulation_dtype, like
from jaxjd.jacobian import Jacobian
from jaxjd.transform._arguments import (
    check_extra_args,
    in_order,
    preference_in,
)
from jaxjd.transform._as_jacobian import as_jacobian, stacked
from jaxjd.transform._rows import along_rows
from jaxjd.weighting import conflict_free
from jaxjd.weighting._weighting import keep_unless


class MomentumConflictFreeState(NamedTuple):
    """The state of M-ConFIG for m losses.

    - `steps`: how many updates there were since each loss had been seen, [].
    - `counts`: how many gradients of each loss there were, [m].
    - `moments`: their moving averages, not debiased, a pytree like the parameters with
      a leading axis of losses, float32 or wider.
    - `direction`, `squares`: the first and second moment of the pseudo-gradient whose
      average is the direction taken, pytrees like the parameters.
    """

    steps: Int[Array, ""]
    counts: Int[Array, " m"]
    moments: PyTree[Float[Array, "m ..."]]
    direction: PyTree[Float[Array, "..."]]
    squares: PyTree[Float[Array, "..."]]


def momentum_conflict_free(
    *,
    num_losses: int,
    b1: float | Float[Array, ""] = 0.9,
    b2: float | Float[Array, ""] = 0.999,
    eps: float | Float[Array, ""] = 1e-8,
) -> aggregating.Aggregator:
    r"""M-ConFIG: ConFIG of the moments of the gradients, scaled as by Adam.

    Each loss has a moving average of its gradients, $m_i \leftarrow \beta_1 m_i + (1 -
    \beta_1) g_i$. The direction is that of [`jaxjd.weighting.conflict_free`][] for the
    debiased averages. It is divided, in each coordinate, by the root of the second
    moment of the gradient whose first moment it would be, plus $\epsilon$. So it
    replaces Adam: follow it by `optax.sgd`.

    With the extra argument `index`, a step takes the gradient of that loss only, for
    one backward pass, and the averages of the others stay:

    ```python
    tx = optax.chain(jaxjd.momentum_conflict_free(num_losses=2), optax.sgd(1e-3))
    updates, state = tx.update(jac, state, params, index=step % 2)
    ```

    The Jacobian is then of all the losses, or of that one alone, which saves the
    forward passes of the others. Until each loss has been seen the update is zero.
    Without `index` a step takes all gradients, for a backward pass each.

    The state holds m averages, as large as $J$. `update` takes a `mask` as that of
    [`jaxjd.aggregate`][] does: a missing loss keeps its average, which has no part in
    the direction of this step. A batch that is not finite gives NaN and leaves the
    state as it was.

    **Arguments:**

    - `num_losses`: m, for which the state is made.
    - `b1`, `b2`: $\beta_1$ and $\beta_2$, in [0, 1).
    - `eps`: $\epsilon$, in [0, inf).

    **Raises:** `TypeError` or `ValueError` if an argument is not a number, or is out of
    range. When `update` is traced, `TypeError` or `ValueError` if `index` is not that
    of a loss; `ValueError` if there are not `num_losses` losses, or one with an
    `index`, or the parameters are not those of `init`; and as [`jaxjd.aggregate`][].

    **Reference:** Liu et al. (2025), arXiv:2408.11104, Algorithm 1.

    **Example:**

    >>> params = jnp.zeros(3)
    >>> tx = jaxjd.momentum_conflict_free(num_losses=2)
    >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    >>> update, state = tx.update(J, tx.init(params), params)
    >>> update
    Array([1., 1., 1.], dtype=float32)
    """
    size = check_integer("num_losses", num_losses, least=1)
    decays = check_number("b1", b1, "[0, 1)"), check_number("b2", b2, "[0, 1)")
    small = check_number("eps", eps, "[0, inf)")
    weighting = conflict_free()

    def init_fn(params: optax.Params) -> MomentumConflictFreeState:
        m = known("num_losses", size)

        def zeros(*leading: int) -> Any:
            return jax.tree.map(
                lambda p: jnp.zeros((*leading, *jnp.shape(p)), accumulation_dtype(p)),
                params,
            )

        count = jnp.zeros((), jnp.int32)
        counts = jnp.zeros(m, jnp.int32)
        return MomentumConflictFreeState(count, counts, zeros(m), zeros(), zeros())

    def update_fn(
        updates: Any,
        state: Any,
        params: optax.Params | None = None,
        *,
        mask: Bool[Array, " m"] | None = None,
        index: int | Int[Array, ""] | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, MomentumConflictFreeState]:
        check_extra_args(extra_args)
        jacobian = as_jacobian(updates, params)
        preference_in(extra_args, jacobian, has_one=False)
        m = len(state.counts)
        mask = check_mask(in_order("mask", mask, jacobian), m)
        check_index(index, jacobian, m)
        which = None if index is None else jnp.asarray(index, jnp.int32)
        parameters = jacobian._parameters
        moments, structure = jax.tree.flatten(state.moments)
        shapes = [parameters.shapes[i] for i in parameters.kept]
        if [x.shape[1:] for x in moments] != shapes:
            raise ValueError(
                "`updates` must be with respect to the parameters that `init` was "
                f"given, {[x.shape[1:] for x in moments]}. Got {shapes}."
            )
        every = jnp.arange(m, dtype=jnp.int32)
        taken = mask if which is None else mask & (every == which)
        gradients = jax.tree.leaves(rows_of(jacobian, which))
        wide = accumulation_dtype(*moments)
        beta1, beta2 = (like(b, jnp.zeros((), wide)) for b in decays)

        def averaged(old: Array, rows: Array) -> Array:
            rows = rows.astype(old.dtype)
            moved = beta1 * old + (1 - beta1) * rows
            return jnp.where(along_rows(taken, old), moved, old)

        moments = [averaged(*pair) for pair in zip(moments, gradients, strict=True)]
        counts = state.counts + taken.astype(jnp.int32)
        seen = counts > 0
        ready = (seen | ~mask).all()
        steps = jnp.where(
            ready, jnp.asarray(optax.safe_increment(state.steps)), state.steps
        )

        # Debiased, an average is the same with a factor.
        debias = 1 / jnp.where(seen, 1 - beta1 ** counts.astype(wide), 1)
        directions = jax.tree.leaves(state.direction)
        of_moments = stacked(moments, directions)
        gramian = of_moments.gramian()
        finite = jnp.isfinite(gramian).all()
        scaled = gramian * debias[:, None] * debias[None]
        weights = weighting(scaled, mask=mask & seen) * debias
        found = jax.tree.leaves(of_moments.vjp(weights))

        power = jnp.maximum(steps, 1).astype(wide)
        first, second = 1 - beta1**power, 1 - beta2**power
        new_directions, squares, result = [], [], []
        for d, old, square in zip(
            found, directions, jax.tree.leaves(state.squares), strict=True
        ):
            average = d * first.astype(d.dtype)
            pseudo = (average - beta1 * old) / (1 - beta1)
            total = beta2 * square + (1 - beta2) * pseudo**2
            root = jnp.sqrt(total / second.astype(d.dtype))
            scaled_down = d / jnp.where(root > 0, root + like(small, d), 1)
            new_directions.append(jnp.where(ready, average, old))
            squares.append(jnp.where(ready, total, square))
            result.append(jnp.where(ready, scaled_down, 0))

        new = MomentumConflictFreeState(
            steps,
            counts,
            jax.tree.unflatten(structure, moments),
            jax.tree.unflatten(structure, new_directions),
            jax.tree.unflatten(structure, squares),
        )
        dtypes = jacobian._operator.dtypes
        update = [
            jnp.where(finite, x, jnp.nan).astype(dtype)
            for x, dtype in zip(result, dtypes, strict=True)
        ]
        return parameters.unflatten(update), keep_unless(finite, new, state)

    return aggregating.Aggregator(init_fn, update_fn)


def rows_of(jacobian: Jacobian, index: Int[Array, ""] | None) -> Any:
    """All rows [m, ...], or the row of one loss [1, ...], by one backward pass."""
    if index is None:
        return jacobian.dense()
    rows = jacobian.num_losses
    like = [jnp.zeros((), dtype) for dtype in jacobian._operator.dtypes]
    own = jnp.zeros_like(index) if rows == 1 else index
    one_hot = jnp.arange(rows, dtype=jnp.int32) == own
    gradient = jacobian._backward()(one_hot.astype(accumulation_dtype(*like)))
    return jax.tree.map(lambda x: x[None], gradient)


def check_index(index: int | Int[Array, ""] | None, jacobian: Jacobian, m: int) -> None:
    """**Raises:** `TypeError` or `ValueError`, see [`momentum_conflict_free`][]."""
    rows = jacobian.num_losses
    if index is None:
        if rows != m:
            raise ValueError(
                f"`updates` must be of num_losses={m} losses, for which the state was "
                f"made. Got {rows}. For the gradient of one loss, give its `index`."
            )
        return
    check_integer("index", index, least=0)
    if not isinstance(index, Tracer) and index >= m:
        raise ValueError(f"`index` must be that of one of the {m} losses. Got {index}.")
    if rows not in (1, m):
        raise ValueError(
            f"`updates` must be of num_losses={m} losses, or of the one with `index`. "
            f"Got {rows}."
        )
