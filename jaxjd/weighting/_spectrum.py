"""Which eigenvalues of a Gramian are more than rounding?"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxjd._numerics import matmul


class Spectrum(NamedTuple):
    """`values` ascend, `vectors` are columns; `kept` are those above rounding."""

    values: Float[Array, " m"]
    vectors: Float[Array, "m m"]
    kept: Bool[Array, " m"]

    @property
    def rank(self):
        return self.kept.sum()

    def function(
        self, of_value: Float[Array, " m"], vector: Float[Array, " m"]
    ) -> Float[Array, " m"]:
        r"""$f(G) x$: $V \operatorname{diag}(f(\lambda)) V^\top x$ over those kept."""
        coordinates = matmul(self.vectors.T, vector)
        # What rounding leaves of a vector that is orthogonal to all that is kept would
        # otherwise be blown up by the inverse, and pass for a direction.
        rounding = cutoff(vector) * jnp.linalg.norm(vector)
        kept = self.kept & (jnp.abs(coordinates) > rounding)
        return matmul(self.vectors, jnp.where(kept, of_value * coordinates, 0))

    def pinv(self, vector: Float[Array, " m"]) -> Float[Array, " m"]:
        """The product of the pseudoinverse with a vector."""
        return self.function(1 / jnp.where(self.kept, self.values, 1), vector)


def spectrum(gramian: Float[Array, "m m"]) -> Spectrum:
    """Eigenvalues above m eps times the largest one, as `numpy.linalg.matrix_rank`.

    Of zeros where the Gramian is not finite, on which an eigensolver may not end.
    """
    values, vectors = jnp.linalg.eigh(
        jnp.where(jnp.isfinite(gramian).all(), gramian, 0)
    )
    return Spectrum(values, vectors, values > cutoff(values) * values[-1])


def cutoff(vector: Float[Array, " m"]) -> float:
    return vector.shape[0] * float(jnp.finfo(vector.dtype).eps)
