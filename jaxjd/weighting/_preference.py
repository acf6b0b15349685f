"""The preference vector: its default, its names, and its entries for missing losses."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxjd._checks import check_length, check_vector
from jaxjd._names import check_names, names_in
from jaxjd._typing import PerLoss


class Preference:
    """The preference that a method was made with, which its update may override.

    **Raises:** `ValueError` or `TypeError` if it is not a vector of finite nonnegative
    reals.
    """

    def __init__(self, preference: PerLoss | None) -> None:
        self._given = None
        self._names = names_in(preference)
        if preference is not None:
            self._given = check_vector("preference", preference, nonnegative=True)

    def among(
        self,
        gramian: Float[Array, "m ..."],
        mask: Bool[Array, " m"],
        preference: PerLoss | None = None,
        loss_names: tuple[str, ...] | None = None,
    ) -> Float[Array, " m"]:
        """The preference of the losses that are present: by default, all are equal.

        **Arguments:**

        - `gramian`: whatever has m entries and the dtype of the result.
        - `preference`: what the update was given.
        - `loss_names`: of the m losses, if they are known.

        **Raises:** `ValueError` if there is not one entry per loss, or entries were
        given by other names than those of the losses.
        """
        chosen = self._given
        if preference is not None:
            chosen = check_vector("preference", preference, nonnegative=True)
        else:
            check_names("preference", self._names, loss_names)
        if chosen is None:
            return mean_weights(gramian, mask)
        given = check_length("preference", chosen, gramian.shape[0])
        return jnp.where(mask, given.astype(gramian.dtype), 0)


def mean_weights(
    gramian: Float[Array, "m ..."], mask: Bool[Array, " m"]
) -> Float[Array, " m"]:
    """Equal weights of sum 1 for the losses that are present."""
    present = mask.astype(gramian.dtype)
    return present / jnp.maximum(present.sum(), 1)
