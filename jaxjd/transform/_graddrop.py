"""GradDrop: in each coordinate keep the gradients of one sign, chosen at random."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Key, PyTree
from optax.experimental import aggregating

from jaxjd._checks import check_key, check_length, check_mask, check_vector
from jaxjd._numerics import accumulation_dtype
from jaxjd.jacobian import Jacobian
from jaxjd.transform._arguments import (
    check_extra_args,
    in_order,
    preference_in,
)
from jaxjd.transform._as_jacobian import as_jacobian
from jaxjd.transform._rows import along_rows, sum_over_rows


class GradDropState(NamedTuple):
    """`key`: of `jax.random`, split at each step."""

    key: Key[Array, ""]


def graddrop(
    leak: Float[Array, " m"] | Sequence[float] | None = None,
    *,
    key: int | Array = 0,
    keep_probability: Callable[[Float[Array, "..."]], Float[Array, "..."]]
    | None = None,
) -> aggregating.Aggregator:
    r"""The aggregator of gradient sign dropout: each coordinate follows one sign.

    In each coordinate, with $\mathcal{P} = \frac12 (1 + \sum_i g_i / \sum_i |g_i|)$ and
    $U$ uniform in $[0, 1)$, the update is
    $\sum_i (\ell_i + (1 - \ell_i) M_i) g_i$, where $M_i$ is 1 if $f(\mathcal{P}) > U$
    and $g_i > 0$, or if $f(\mathcal{P}) < U$ and $g_i < 0$, and else 0. The update is 0
    in a coordinate in which all gradients are 0, and NaN in one in which any gradient
    is not finite.

    It looks at the rows of $J$ themselves, so there is no such weighting. All of $J$ is
    in memory at once only with `method="dense"`, or with `method="chunked"` and no
    `chunk_size`. `update` takes a `mask` as that of [`jaxjd.aggregate`][] does, and
    ignores the rows of missing losses, whatever they are.

    **Arguments:**

    - `leak`: $\ell$, m numbers in $[0, 1]$, how much of each loss's gradient is never
      dropped. By default 0.
    - `key`: an integer seed or a key of `jax.random`. It lives in the state. Under
      `jax.vmap`, make the key in the mapped function, or all runs draw the same: see
      [`jaxjd.weighting.random`][].
    - `keep_probability`: $f$, a function of arrays, increasing, from $[0, 1]$ to
      $[0, 1]$. By default the identity.

    **Raises:** `ValueError` or `TypeError` if `leak` is not a vector of numbers in
    $[0, 1]$, `key` is not a seed or a key, or `keep_probability` is not a function.
    When `update` is traced, `ValueError` if `leak` does not have m entries, and as
    [`jaxjd.aggregate`][].

    **Reference:** Chen et al. (2020), arXiv:2010.06808, Algorithm 1, lines 10 to 15.

    **Example:**

    >>> params = jnp.zeros(3)
    >>> tx = jaxjd.graddrop(key=0)
    >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    >>> update, state = tx.update(J, tx.init(params), params)
    >>> update
    Array([6., 2., 2.], dtype=float32)
    """
    checked = None if leak is None else check_leak(leak)
    first_key = check_key(key)
    if not (keep_probability is None or callable(keep_probability)):
        raise TypeError(
            "`keep_probability` must be a function of arrays. Got "
            f"{keep_probability!r}. In optax.inject_hyperparams, which takes functions "
            "for schedules, say `static_args='keep_probability'`."
        )

    def init_fn(params: optax.Params) -> GradDropState:
        del params
        return GradDropState(first_key)

    def update_fn(
        updates: Any,
        state: Any,
        params: optax.Params | None = None,
        *,
        mask: Bool[Array, " m"] | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, GradDropState]:
        check_extra_args(extra_args)
        jacobian = as_jacobian(updates, params)
        preference_in(extra_args, jacobian, has_one=False)
        following, now = jax.random.split(state.key)
        parameters, dtypes = jacobian._parameters, jacobian._operator.dtypes
        drawn = []
        keys = jax.random.split(now, len(dtypes))
        for key, i, dtype in zip(keys, parameters.kept, dtypes, strict=True):
            wide = accumulation_dtype(jnp.zeros((), dtype))
            drawn.append(jax.random.uniform(key, parameters.shapes[i], wide))
        uniforms = parameters.unflatten(drawn)
        present = in_order("mask", mask, jacobian)
        update = drop_signs(jacobian, uniforms, checked, keep_probability, present)
        return update, GradDropState(following)

    return aggregating.Aggregator(init_fn, update_fn)


class Signed(NamedTuple):
    """Sums over the positive and over the negative entries of a coordinate."""

    positive: Float[Array, "..."]
    negative: Float[Array, "..."]


def drop_signs(
    jacobian: Jacobian,
    uniforms: PyTree[Float[Array, "..."]],
    leak: Float[Array, " m"] | None = None,
    keep_probability: Callable[[Float[Array, "..."]], Float[Array, "..."]]
    | None = None,
    mask: Bool[Array, " m"] | None = None,
) -> PyTree[Float[Array, "..."]]:
    """The update of GradDrop for given `uniforms`, a pytree like the parameters."""
    m = jacobian.num_losses
    mask = check_mask(mask, m)
    if leak is not None:
        leak = check_length("leak", leak, m)

    # M is the same for all entries of one sign in a coordinate. So the sums over each
    # sign are enough, and the rows need not be formed a second time.
    def term(rows: Array, leak: Array | None) -> Any:
        rows = rows.astype(accumulation_dtype(rows))
        everything = signed(rows)
        if leak is None:
            return everything, everything, None
        leaked = along_rows(leak, rows).astype(rows.dtype)
        return everything, signed((1 - leaked) * rows), (leaked * rows).sum(0)

    def signed(rows: Array) -> Signed:
        return Signed(jnp.maximum(rows, 0).sum(0), jnp.minimum(rows, 0).sum(0))

    def combined(sums: Any, uniform: Array) -> Array:
        everything, droppable, leaked = sums
        total = everything.positive - everything.negative
        purity = everything.positive / jnp.where(total > 0, total, 1)
        if keep_probability is not None:
            purity = keep_probability(purity)
        uniform = uniform.astype(total.dtype)
        update = jnp.where(purity > uniform, droppable.positive, 0)
        update += jnp.where(purity < uniform, droppable.negative, 0)
        if leaked is not None:
            update += leaked
        return jnp.where(jnp.isfinite(total), update, jnp.nan)

    parameters, dtypes = jacobian._parameters, jacobian._operator.dtypes
    sums = sum_over_rows(jacobian, mask, leak, term)
    uniform = parameters.flatten("uniforms", uniforms)
    return parameters.unflatten(
        [
            combined(*arguments).astype(dtype)
            for *arguments, dtype in zip(sums, uniform, dtypes, strict=True)
        ]
    )


def check_leak(leak: Float[Array, " m"] | Sequence[float]) -> Float[Array, " m"]:
    """A vector of numbers in [0, 1].

    **Raises:** `ValueError` or `TypeError` if it is anything else.
    """
    vector = check_vector("leak", leak, nonnegative=True)
    if not isinstance(vector, Tracer) and (np.asarray(vector) > 1).any():
        raise ValueError(f"`leak` must be in [0, 1]. Got {np.asarray(vector)}.")
    return vector
