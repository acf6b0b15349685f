"""The reference point: what the losses are counted from."""

from jaxtyping import Array, Float

from jaxjd._checks import check_length, check_vector
from jaxjd._typing import PerLoss


def check_reference(
    reference: PerLoss | None,
) -> Float[Array, " m"] | None:
    """**Raises:** `TypeError` or `ValueError` if it is not a vector of finite reals."""
    if reference is None:
        return None
    return check_vector("reference", reference, nonnegative=False)


def above(
    reference: Float[Array, " m"] | None, values: Float[Array, " m"]
) -> Float[Array, " m"]:
    """How far the losses are above the reference point, by default the origin.

    **Raises:** `ValueError` if it does not have an entry for each loss.
    """
    if reference is None:
        return values
    given = check_length("reference", reference, values.shape[0])
    return values - given.astype(values.dtype)
