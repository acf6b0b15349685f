"""Functions of a Gramian from its eigenvalues, without those that are only rounding."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxjd._numerics import matmul, root, symmetric_part


class Spectrum(NamedTuple):
    """The eigenvalues of a Gramian, and the products of its functions with vectors."""

    gramian: Float[Array, "m m"]
    values: Float[Array, " m"]  # Ascending.
    vectors: Float[Array, "m m"]  # In columns. Constant for derivatives.
    kept: Bool[Array, " m"]  # Which values are more than rounding.

    @property
    def rank(self):
        return self.kept.sum()

    def pinv(self, vector: Float[Array, " m"]) -> Float[Array, " m"]:
        """The product of the pseudoinverse with a vector."""
        inverse = 1 / jnp.where(self.kept, lax.stop_gradient(self.values), 1)
        # (1/a - 1/b) / (a - b) = -1 / (a b)
        slopes = -inverse[:, None] * inverse[None]
        return self._times(inverse, slopes, vector)

    def inverse_root(
        self, vector: Float[Array, " m"], scale: Float[Array, ""]
    ) -> Float[Array, " m"]:
        r"""$\sqrt{\sigma} G^{-1/2}$, over the values kept, times a vector."""
        values = jnp.where(self.kept, lax.stop_gradient(self.values), 1)
        roots = jnp.sqrt(values)
        inverse = root(scale / values)
        # With s = sqrt(a) and t = sqrt(b): (1/s - 1/t) / (a - b) = -1 / (s t (s + t)).
        slopes = -inverse[:, None] / roots[None] / (roots[:, None] + roots[None])
        return self._times(inverse, slopes, vector)

    def _times(
        self,
        of_value: Float[Array, " m"],
        slopes: Float[Array, "m m"],
        vector: Float[Array, " m"],
    ) -> Float[Array, " m"]:
        r"""$f(G) x = V \operatorname{diag}(f(\lambda)) V^\top x$ over the values kept.

        **Arguments:**

        - `of_value`: $f(\lambda_i)$.
        - `slopes`: $(f(\lambda_i) - f(\lambda_j)) / (\lambda_i - \lambda_j)$, and the
          derivative of f where the two are equal.
        """
        coordinates = matmul(self.vectors.T, vector)
        # If the vector is orthogonal to the kept eigenvectors, rounding leaves small
        # coordinates, which the inverse would otherwise blow up into a direction.
        rounding = cutoff(vector) * jnp.linalg.norm(lax.stop_gradient(vector))
        large = jnp.abs(coordinates) > rounding
        result = matmul(
            self.vectors, jnp.where(self.kept & large, of_value * coordinates, 0)
        )
        # If G is singular, f(0) = 0, and the derivative is that at constant rank.
        f = jnp.where(self.kept, of_value, 0)
        of_zero = f / jnp.where(self.kept, self.values, 1)
        both = self.kept[:, None] & self.kept[None]
        slopes = jnp.where(both, slopes, of_zero[:, None] + of_zero[None])
        return _with_derivative(
            self.gramian,
            result,
            *lax.stop_gradient(
                (self.vectors, slopes, jnp.where(large, coordinates, 0))
            ),
        )


def spectrum(gramian: Float[Array, "m m"]) -> Spectrum:
    """Decompose a Gramian, keeping eigenvalues above m eps times the largest one.

    `numpy.linalg.matrix_rank` has the same threshold. A Gramian that is not finite
    counts as zero, because an eigensolver might not stop on it.
    """
    gramian = jnp.where(jnp.isfinite(gramian).all(), gramian, 0)
    # If eigenvalues are equal, as for orthogonal gradients of equal norm, eigenvectors
    # have no derivative, but functions of the Gramian do.
    values, vectors = jnp.linalg.eigh(lax.stop_gradient(gramian))
    kept = values > cutoff(values) * values[-1]
    return Spectrum(gramian, _eigenvalues(gramian, values, vectors), vectors, kept)


def cutoff(vector: Float[Array, " m"]) -> float:
    return vector.shape[0] * float(jnp.finfo(vector.dtype).eps)


@jax.custom_jvp
def _with_derivative(gramian, product, vectors, slopes, coordinates):
    r"""Give $f(G) x$, already computed, its derivative.

    $d(f(G)) = V (S \circ V^\top dG V) V^\top$, where S are the slopes between the
    eigenvalues (Daleckii & Krein; Higham (2008), Functions of Matrices, theorem 3.11).
    """
    del gramian, vectors, slopes, coordinates
    return product


@_with_derivative.defjvp
def _derivative_of_product(primals, tangents):
    gramian, _, vectors, slopes, coordinates = primals
    change, change_of_product, *_ = tangents
    vectors = _once(gramian, vectors)
    inner = slopes * matmul(vectors.T, matmul(symmetric_part(change), vectors))
    change_of_product += matmul(vectors, matmul(inner, coordinates))
    return _with_derivative(*primals), change_of_product


@jax.custom_jvp
def _eigenvalues(gramian, values, vectors):
    """Give eigenvalues, already computed, their derivative."""
    del gramian, vectors
    return values


@_eigenvalues.defjvp
def _derivative_of_eigenvalues(primals, tangents):
    gramian, _, vectors = primals
    vectors = _once(gramian, vectors)
    change = matmul(symmetric_part(tangents[0]), vectors)
    return _eigenvalues(*primals), (vectors * change).sum(axis=0)


@jax.custom_jvp
def _once(gramian, vectors):
    """Make a second derivative by way of the eigenvectors an error."""
    del gramian
    return vectors


@_once.defjvp
def _refuse(primals, tangents):
    raise TypeError(
        "The weights of aligned_mtl, conflict_free and imtl_g can be differentiated "
        "only once: their second derivatives are not implemented."
    )
