"""Trimmed mean: in each coordinate leave out the extremes, and average the rest."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int
from optax.experimental import aggregating

from jaxjd.engine import accumulation_dtype
from jaxjd.transform._as_jacobian import as_jacobian
from jaxjd.transform._rows import along_rows, by_parameter, fold
from jaxjd.weighting._checks import check_integer, check_mask
from jaxjd.weighting._sorting import sort

# A pass for each entry that is dropped takes a twelfth of sorting, or less, on a CPU.
MAX_PASSES = 12


def trimmed_mean(trim_number: int) -> aggregating.Aggregator:
    r"""The mean of each coordinate without its largest and smallest entries.

    In each coordinate the `trim_number` largest and as many smallest of the m entries
    are dropped, and the others averaged: with at most `trim_number` losses corrupted,
    the result stays among the entries of the others. An infinite entry is an extreme
    like others; a coordinate with a NaN becomes NaN.

    It looks at the rows of $J$ themselves, so there is no such weighting. All rows of a
    parameter must be in memory, to be compared: a structured Jacobian forms them for
    one parameter at a time, but with a `chunk_size` or another method it is all of $J$.
    It takes a `mask` as [`jaxjd.aggregate`][] does, and ignores the rows of missing
    losses whatever they are. If they leave no more than `2 * trim_number` losses, as
    many are dropped as leave one or two: the median. If they leave none, the update
    is 0.

    **Arguments:**

    - `trim_number`: how many entries to drop at either end, at least 0.

    **Raises:** `ValueError` or `TypeError` if `trim_number` is no such integer; when
    `update` is traced, `ValueError` if there are not at least `2 * trim_number + 1`
    losses, and as [`jaxjd.aggregate`][].

    **Reference:** Yin et al. (2018), arXiv:1803.01498, Definition 2.
    """
    trim_number = check_integer("trim_number", trim_number, least=0)

    def update_fn(
        updates: Any,
        state: Any,
        params: optax.Params | None = None,
        *,
        mask: Bool[Array, " m"] | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        del extra_args  # For other links of the chain.
        jacobian = as_jacobian(updates, params)
        m = jacobian.num_losses
        if m < 2 * trim_number + 1:
            raise ValueError(
                f"`trim_number` must leave at least one of the {m} losses, so be at "
                f"most {(m - 1) // 2}. Got {trim_number}."
            )
        present = check_mask(mask, m)
        means = by_parameter(jacobian, lambda rows: mean_of_middle(rows, present))
        return jacobian.parameters.unflatten(means), state

    def mean_of_middle(
        rows: Float[Array, "m ..."], present: Bool[Array, " m"]
    ) -> Float[Array, "..."]:
        count = present.sum(dtype=jnp.int32)
        trimmed = jnp.minimum(trim_number, jnp.maximum(count - 1, 0) // 2)
        if trim_number <= MAX_PASSES:
            total = sum_by_passes(rows, present, trimmed)
        else:
            total = sum_by_sorting(rows, present, trimmed)
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
    # What is missing comes after all numbers, and a NaN after that.
    ordered = sort(jnp.where(along_rows(present, rows), rows, jnp.inf), 0)
    total = jnp.where(along_rows(middle, rows), ordered, 0).sum(
        0, dtype=accumulation_dtype(rows)
    )
    return jnp.where(jnp.isnan(ordered[-1]), jnp.nan, total)


@jax.jit
def sum_by_passes(
    rows: Float[Array, "m ..."], present: Bool[Array, " m"], trimmed: Int[Array, ""]
) -> Float[Array, "..."]:
    """The same, from the values of the last ones that are dropped."""
    kept = present.sum(dtype=jnp.int32) - 2 * trimmed
    present = along_rows(present, rows)
    numbers = jax.lax.stop_gradient(rows)
    high, above, at_high = last_trimmed(numbers, present, trimmed)
    low, below, at_low = last_trimmed(-numbers, present, trimmed)
    low = -low

    # Of several that are as large as the last one that is dropped, each is dropped in
    # part.
    dtype = accumulation_dtype(rows)
    shares = jnp.ones((), dtype)
    for at, beyond, equal in ((high, above, at_high), (low, below, at_low)):
        left = fraction(beyond + equal - trimmed, equal, dtype)
        shares = jnp.where(numbers == at, left, shares)
    shares = jnp.where(high == low, fraction(kept, at_high, dtype), shares)
    taken = present & (low <= numbers) & (numbers <= high) & (shares > 0)
    total = fold(jnp.add, jnp.where(taken, shares * rows.astype(dtype), 0))
    is_nan = fold(jnp.logical_or, present & jnp.isnan(numbers))
    return jnp.where(is_nan, jnp.nan, total)


def last_trimmed(
    rows: Float[Array, "m ..."], present: Bool[Array, "m ..."], trimmed: Int[Array, ""]
) -> tuple[Float[Array, "1 ..."], Int[Array, "1 ..."], Int[Array, "1 ..."]]:
    """The `trimmed`-th largest entry, how many are above it, and how many equal to it.

    A pass over the rows for each different entry that is dropped, which are few. They
    end at infinity without any.
    """

    def unfinished(found):
        _, above, equal = found
        return jnp.any(above + equal < trimmed)

    def next_largest(found):
        value, above, equal = found
        smaller = present & (rows < value)
        # Only numbers are left where there must be another one.
        candidates = jnp.where(smaller, rows, -jnp.inf), smaller.astype(jnp.int32)
        following, as_large = (x[None] for x in fold(larger_of, candidates))
        more = above + equal < trimmed
        return (
            jnp.where(more, following, value),
            jnp.where(more, above + equal, above),
            jnp.where(more, as_large, equal),
        )

    infinite = fold(jnp.add, (present & (rows == jnp.inf)).astype(jnp.int32))[None]
    start = jnp.full(infinite.shape, jnp.inf, rows.dtype), 0 * infinite, infinite
    return jax.lax.while_loop(unfinished, next_largest, start)


def larger_of(one: tuple[Array, Array], other: tuple[Array, Array]):
    """The larger of two entries, each with a number of losses that have it."""
    (x, of_x), (y, of_y) = one, other
    numbers = jnp.where(x >= y, of_x, 0) + jnp.where(x <= y, of_y, 0)
    return jnp.maximum(x, y), numbers


def fraction(part: Int[Array, "..."], whole: Int[Array, "..."], dtype) -> Array:
    return part.astype(dtype) / jnp.maximum(whole, 1).astype(dtype)
