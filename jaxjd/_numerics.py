"""Linear algebra on Gramians that the engine, the solvers and the weightings share.

Three rules hold everywhere. Products are accumulated in float32 or wider, whatever the
parameters are. They never use the reduced precision that accelerators take for float32
by default: a Gramian that is off by 1e-3 has no dual cone left to speak of. And NaN in
gives NaN out.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float


def accumulation_dtype(*arrays: Array) -> jnp.dtype:
    """The common dtype of the arrays and float32, even under strict promotion."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def matmul(a: Array, b: Array) -> Array:
    """`a @ b` in full precision. With TF32, KKT residuals stall at 1e-4."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def symmetric(upper: Float[Array, "m m"]) -> Float[Array, "m m"]:
    """The symmetric matrix with this upper triangle."""
    # The barrier keeps XLA from turning the transpose of a product into a product of
    # transposes, which is rounded differently. The mask is a constant of one byte per
    # entry: XLA would take minutes to fold a comparison of indices for m = 4096.
    upper = lax.optimization_barrier(upper)
    return jnp.where(np.tri(len(upper), k=-1, dtype=bool), upper.T, upper)


def symmetric_part(matrix: Float[Array, "m m"]) -> Float[Array, "m m"]:
    """The symmetric part of a matrix, such as the change of a Gramian must be."""
    return (matrix + matrix.T) / 2


def like(number: float | Array, array: Array) -> float | Array:
    """A hyperparameter in the dtype of an array. Python's numbers stay as they are."""
    return number.astype(array.dtype) if isinstance(number, jax.Array) else number


class UnitDiagonal(NamedTuple):
    """A Gramian in the coordinates in which every gradient has norm 1."""

    C: Float[Array, "m m"]  # G / (norms norms^T): a matrix of cosines.
    norms: Float[Array, " m"]  # sqrt(diag(G)), 0 where a gradient is zero.
    inverse_norms: Float[Array, " m"]  # 0 there as well.


def unit_diagonal(
    gramian: Float[Array, "m m"], *, constant_norms: bool = False
) -> UnitDiagonal:
    """Scale a Gramian to unit diagonal. A zero gradient keeps a zero row.

    **Arguments:**

    - `constant_norms`: whether the derivative treats the norms as constants. This is
      right only if the result does not depend on them, and then it saves work. The
      minimiser of a quadratic program with separable bounds is such a result, because
      its bounds are scaled, too.
    """
    diagonal = jnp.diagonal(gramian)
    zero = diagonal <= 0  # False for NaN, which must stay visible.
    norms = jnp.sqrt(jnp.where(zero, 1, diagonal))
    if constant_norms:
        norms = lax.stop_gradient(norms)
    inverse = jnp.where(zero, 0, 1 / norms)
    # One factor after the other: their product may overflow.
    C = gramian * inverse[:, None] * inverse[None, :]
    return UnitDiagonal(C, jnp.where(zero, 0, norms), inverse)


def add_noise(
    scaled: UnitDiagonal, noise_eps: float | Float[Array, ""]
) -> UnitDiagonal:
    r"""Add noise to the gradients that are below it, and scale to unit diagonal.

    With $n = \epsilon \sqrt{\mu}$, where $\mu$ is the mean of the squared norms that
    are not zero, $\|g_i\|^2$ becomes $\|g_i\|^2 + n^4 / (n^2 + \|g_i\|^2)$. It is as if
    $g_i$ had an extra component, orthogonal to all others. Its norm is n if $\|g_i\|$
    is far below n, and falls as $n^2 / \|g_i\|$ above it. Zero gradients stay zero.
    """
    norms = scaled.norms
    present = norms > 0
    largest = jnp.max(norms)
    # In units of the largest norm, as the square of the noise may underflow.
    relative = norms / jnp.where(largest > 0, largest, 1)
    squares = jnp.diagonal(scaled.C) * relative * relative
    count = jnp.maximum(jnp.sum(present), 1).astype(norms.dtype)
    noise2 = noise_eps**2 * jnp.sum(squares) / count
    total2 = noise2 + squares
    added2 = noise2 * (noise2 / jnp.where(total2 > 0, total2, 1))
    # Constant for derivatives, as the norms are in C. What is added to C is not.
    noise = largest * jnp.sqrt(lax.stop_gradient(added2))
    longer = jnp.where(present, jnp.hypot(norms, noise), 0)
    inverse = jnp.where(present, 1 / jnp.where(present, longer, 1), 0)
    shrunk = norms / jnp.where(present, longer, 1)
    added = added2 * (largest * inverse) * (largest * inverse)
    C = scaled.C * shrunk[:, None] * shrunk[None, :] + jnp.diag(added)
    return UnitDiagonal(C, longer, inverse)


def root(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The square root, 0 for negative numbers, with the derivative 0 at 0.

    At 0 `jnp.sqrt` has an infinite derivative, which becomes NaN in a `jnp.where`.
    """
    zero = x <= 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, x)))


def normalise_and_regularise(
    gramian: Float[Array, "m m"],
    norm_eps: float | Float[Array, ""],
    reg_eps: float | Float[Array, ""],
) -> Float[Array, "m m"]:
    """`G / trace(G) + reg_eps I`, with 0 for G where its trace is below `norm_eps`.

    This is TorchJD's rule.
    """
    trace = jnp.trace(gramian)
    zero = (trace < norm_eps) | (trace == 0)
    normalised = jnp.where(zero, 0, gramian / jnp.where(zero, 1, trace))
    return normalised + reg_eps * jnp.eye(gramian.shape[0], dtype=gramian.dtype)


def all_finite(array: Float[Array, "..."]) -> Bool[Array, ""]:
    """Whether no entry is NaN or infinite.

    By the largest magnitude, which NaN takes part in: XLA would keep an array of what
    `jnp.isfinite` says of each entry.
    """
    magnitudes = jnp.abs(lax.stop_gradient(array))
    return jnp.isfinite(jnp.max(magnitudes, initial=0))


def finite_or_nan(
    gramian: Float[Array, "m m"], weights: Float[Array, " m"]
) -> Float[Array, " m"]:
    """The weights, or NaN if the Gramian is not finite, for methods that lose that."""
    return jnp.where(all_finite(gramian), weights, jnp.nan)
