"""Trimmed mean: in each coordinate leave out the extremes, and average the rest."""

from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float
from optax.experimental import aggregating

from jaxjd.engine import accumulation_dtype
from jaxjd.transform._as_jacobian import as_jacobian
from jaxjd.transform._rows import along_rows, by_parameter
from jaxjd.weighting._checks import check_integer, check_mask
from jaxjd.weighting._sorting import sort


def trimmed_mean(trim_number: int) -> aggregating.Aggregator:
    r"""The mean of each coordinate without its largest and smallest entries.

    In each coordinate the `trim_number` largest and as many smallest of the m entries
    are dropped, and the others averaged: with at most `trim_number` losses corrupted,
    the result stays among the entries of the others. An infinite entry is an extreme
    like others; a coordinate with a NaN becomes NaN.

    It looks at the rows of $J$ themselves, so there is no such weighting. To be sorted,
    all rows of a parameter must be in memory: a structured Jacobian forms them for one
    parameter at a time, but with a `chunk_size` or another method it is all of $J$. It
    takes a `mask` as
    [`jaxjd.aggregate`][] does, and ignores the rows of missing losses whatever they
    are. If they leave no more than `2 * trim_number` losses, as many are dropped as
    leave one or two: the median. If they leave none, the update is 0.

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
        count = present.sum()
        trimmed = jnp.minimum(trim_number, jnp.maximum(count - 1, 0) // 2)
        place = jnp.arange(len(present))
        middle = (trimmed <= place) & (place < count - trimmed)
        # What is missing comes after all numbers, and a NaN after that.
        ordered = sort(jnp.where(along_rows(present, rows), rows, jnp.inf), 0)
        dtype = accumulation_dtype(rows)
        total = jnp.where(along_rows(middle, rows), ordered, 0).sum(0, dtype=dtype)
        mean = total / jnp.maximum(middle.sum(), 1).astype(dtype)
        return jnp.where(jnp.isnan(ordered[-1]), jnp.nan, mean).astype(rows.dtype)

    return aggregating.Aggregator(optax.init_empty_state, update_fn)
