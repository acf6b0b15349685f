"""Trimmed mean: in each coordinate drop the extremes and average the rest."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int
from optax.experimental import aggregating

from jaxjd._checks import check_integer, check_mask
from jaxjd._numerics import accumulation_dtype
from jaxjd._sorting import sort
from jaxjd.transform._arguments import (
    check_extra_args,
    in_order,
    preference_in,
)
from jaxjd.transform._as_jacobian import as_jacobian
from jaxjd.transform._rows import along_rows, by_parameter, fold

# On a CPU, a pass for each dropped entry takes at most a twelfth of the time of a sort.
MAX_PASSES = 12


def trimmed_mean(num_trimmed: int | Int[Array, ""]) -> aggregating.Aggregator:
    r"""The aggregator that averages each coordinate without its extreme entries.

    In each coordinate the `num_trimmed` largest and as many smallest of the m entries
    are dropped, and the others averaged. If at most `num_trimmed` losses are corrupted,
    the result stays among the entries of the others. An infinite entry is an extreme
    like others. A coordinate with a NaN becomes NaN.

    It looks at the rows of $J$ themselves, so there is no such weighting. All rows of a
    parameter must be in memory, to be compared. A structured Jacobian forms them for
    one parameter at a time. With a `chunk_size` or another method, all of $J$ is formed
    at once. `update` takes a `mask` as that of [`jaxjd.aggregate`][] does, and ignores
    the rows of missing losses, whatever they are. If no more than `2 * num_trimmed`
    losses are present, the update is the median of each coordinate. If no loss is
    present, it is 0.

    **Arguments:**

    - `num_trimmed`: how many entries to drop at either end, at least 0.

    **Raises:** `ValueError` or `TypeError` if `num_trimmed` is not an integer, or is
    negative. When `update` is traced, `ValueError` if there are not at least
    `2 * num_trimmed + 1` losses, unless this number is traced too, and as
    [`jaxjd.aggregate`][].

    **Reference:** Yin et al. (2018), arXiv:1803.01498, Definition 2.

    **Example:**

    >>> params = jnp.zeros(2)
    >>> tx = jaxjd.trimmed_mean(num_trimmed=1)
    >>> J = jnp.array([[1.0, 0.0], [2.0, 9.0], [90.0, 1.0]])
    >>> tx.update(J, tx.init(params), params)[0]
    Array([2., 1.], dtype=float32)
    """
    dropped = check_integer("num_trimmed", num_trimmed, least=0)

    def update_fn(
        updates: Any,
        state: Any,
        params: optax.Params | None = None,
        *,
        mask: Bool[Array, " m"] | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        check_extra_args(extra_args)
        jacobian = as_jacobian(updates, params)
        preference_in(extra_args, jacobian, has_one=False)
        m = jacobian.num_losses
        if isinstance(dropped, int) and m < 2 * dropped + 1:
            raise ValueError(
                f"`num_trimmed` must leave at least one of the {m} losses, so be at "
                f"most {(m - 1) // 2}. Got {dropped}."
            )
        present = check_mask(in_order("mask", mask, jacobian), m)
        means = by_parameter(jacobian, lambda rows: mean_of_middle(rows, present))
        return jacobian._parameters.unflatten(means), state

    def mean_of_middle(
        rows: Float[Array, "m ..."], present: Bool[Array, " m"]
    ) -> Float[Array, "..."]:
        count = present.sum(dtype=jnp.int32)
        trimmed = jnp.minimum(dropped, jnp.maximum(count - 1, 0) // 2)
        if isinstance(dropped, int) and dropped > MAX_PASSES:
            total = sum_by_sorting(rows, present, trimmed)
        else:
            total = sum_by_passes(rows, present, trimmed)
        kept = jnp.maximum(count - 2 * trimmed, 1)
        return (total / kept.astype(total.dtype)).astype(rows.dtype)

    return aggregating.Aggregator(optax.init_empty_state, update_fn)


def sum_by_sorting(
    rows: Float[Array, "m ..."], present: Bool[Array, " m"], trimmed: Int[Array, ""]
) -> Float[Array, "..."]:
    """The sum of each coordinate without `trimmed` largest and smallest entries."""
    place = jnp.arange(len(present), dtype=jnp.int32)
    count = present.sum(dtype=jnp.int32)
    middle = (trimmed <= place) & (place < count - trimmed)
    # Missing entries come after all numbers, and NaN comes last.
    ordered = sort(jnp.where(along_rows(present, rows), rows, jnp.inf), 0)
    total = jnp.where(along_rows(middle, rows), ordered, 0).sum(
        0, dtype=accumulation_dtype(rows)
    )
    return jnp.where(jnp.isnan(ordered[-1]), jnp.nan, total)


@jax.jit
def sum_by_passes(
    rows: Float[Array, "m ..."], present: Bool[Array, " m"], trimmed: Int[Array, ""]
) -> Float[Array, "..."]:
    """The same as `sum_by_sorting`, from the values of the last entries dropped."""
    kept = present.sum(dtype=jnp.int32) - 2 * trimmed
    present = along_rows(present, rows)
    numbers = jax.lax.stop_gradient(rows)
    high, above, at_high = last_trimmed(numbers, present, trimmed, jnp.maximum, jnp.inf)
    low, below, at_low = last_trimmed(numbers, present, trimmed, jnp.minimum, -jnp.inf)

    # If several entries are equal to the last one dropped, a fraction of each is kept.
    dtype = accumulation_dtype(rows)
    of_high = fraction(above + at_high - trimmed, at_high, dtype)
    of_high = jnp.where(high == low, fraction(kept, at_high, dtype), of_high)
    of_low = fraction(below + at_low - trimmed, at_low, dtype)

    def share_of(rows, present):
        numbers = jax.lax.stop_gradient(rows)
        share = jnp.where(numbers == low, of_low, 1)
        share = jnp.where(numbers == high, of_high, share)
        taken = present & (low <= numbers) & (numbers <= high) & (share > 0)
        return jnp.where(taken, share * rows.astype(dtype), 0)

    def is_nan(numbers, present):
        return present & jnp.isnan(numbers)

    total = fold(jnp.add, share_of, rows, present)
    spoilt = fold(jnp.logical_or, is_nan, numbers, present)
    return jnp.where(spoilt, jnp.nan, total)


def last_trimmed(
    rows: Float[Array, "m ..."],
    present: Bool[Array, "m ..."],
    trimmed: Int[Array, ""],
    further: Callable[[Array, Array], Array],
    limit: float,
) -> tuple[Float[Array, "1 ..."], Int[Array, "1 ..."], Int[Array, "1 ..."]]:
    """The `trimmed`-th extreme, how many entries are beyond it, how many equal to it.

    `further` is `jnp.maximum` or `jnp.minimum`, `limit` the infinity on that side. It
    takes a pass over the rows for each distinct entry that is dropped. There are few.
    """

    def unfinished(found):
        return jnp.any(found[-1])

    def next_extreme(found):
        # Each reduction reads what is in memory already, and needs no more itself.
        value, beyond, _, _ = found

        def is_equal(rows, present):
            return (present & (rows == value)).astype(jnp.int32)

        # Where another extreme must exist, only numbers are left.
        def candidate(rows, present):
            rest = present & (rows != value) & (further(rows, value) == value)
            return jnp.where(rest, rows, -limit)

        equal = fold(jnp.add, is_equal, rows, present)[None]
        following = fold(further, candidate, rows, present)[None]
        # NaN is not an extreme. If many entries are NaN, there may be too few numbers.
        more = (beyond + equal < trimmed) & (value != -limit)
        return (
            jnp.where(more, following, value),
            jnp.where(more, beyond + equal, beyond),
            equal,
            more,
        )

    shape = (1, *rows.shape[1:])
    value, none = jnp.full(shape, limit, rows.dtype), jnp.zeros(shape, jnp.int32)
    start = value, none, none, jnp.ones(shape, bool)
    return jax.lax.while_loop(unfinished, next_extreme, start)[:3]


def fraction(part: Int[Array, "..."], whole: Int[Array, "..."], dtype) -> Array:
    """The quotient, with 1 in place of a denominator of 0."""
    return part.astype(dtype) / jnp.maximum(whole, 1).astype(dtype)
