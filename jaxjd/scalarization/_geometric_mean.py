"""Geometric mean: let the same percentage of any loss count the same."""

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

from jaxjd.scalarization._scalarizer import Scalarizer, stateless, sum_of_present


def geometric_mean() -> Scalarizer:
    r"""The geometric mean of the losses, $(\prod_i \ell_i)^{1/m}$.

    Also known as GLS, the geometric loss strategy. Its weights are $s / (m \ell_i)$: a
    loss in another unit has the same part in the update. A loss of zero makes them NaN.
    With a mask, m is the number of losses that are present.

    **Raises:** when used, `ValueError` if a loss is negative. If it is traced, which it
    is under `jit` and `grad`, the scalar is NaN instead.

    **Reference:** Chennupati et al. (2019), MultiNet++: Multi-Stream Feature
    Aggregation and Geometric Loss Strategy for Multi-Task Learning.

    **Example:**

    >>> scalarizer = jaxjd.scalarization.geometric_mean()
    >>> jax.value_and_grad(scalarizer)(jnp.array([1.0, 4.0]))
    (Array(2., dtype=float32), Array([1.  , 0.25], dtype=float32))
    """
    return stateless("geometric_mean", of_present, check=check_not_negative)


def of_present(values: Float[Array, " m"], mask: Bool[Array, " m"]) -> Float[Array, ""]:
    count = jnp.maximum(mask.sum(), 1).astype(values.dtype)
    return jnp.exp(sum_of_present(jnp.log(values), mask) / count)


def check_not_negative(values: Float[Array, " m"], mask: Bool[Array, " m"]) -> None:
    """**Raises:** `ValueError` if a loss that is present is known to be negative."""
    if isinstance(values, Tracer) or isinstance(mask, Tracer):
        return
    present = np.asarray(values)[np.asarray(mask)]
    if (present < 0).any():
        raise ValueError(
            "`losses` must not be negative: geometric_mean takes their logarithms. "
            f"Got {present.min()}."
        )
