"""ConFIG: take the update that has chosen cosines with all gradients."""

from typing import Literal

import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from jaxjd._checks import check_choice, check_integer
from jaxjd._numerics import finite_or_nan, matmul, unit_diagonal
from jaxjd._sharding import on_every_device
from jaxjd._typing import PerLoss
from jaxjd.weighting._preference import Preference
from jaxjd.weighting._spectrum import spectrum
from jaxjd.weighting._weighting import Weighting, stateless

LENGTHS = ("projection", "min", "max", "arithmetic", "harmonic", "geometric")


def conflict_free(
    preference: PerLoss | None = None,
    *,
    length: Literal["projection", "min", "max", "arithmetic", "harmonic", "geometric"]
    | int
    | Int[Array, ""] = "projection",
) -> Weighting:
    r"""Weights of ConFIG, conflict-free inverse gradients.

    The update has the direction $x = \hat J^+ u$, where $\hat J$ are the unit gradients
    and $u$ the preference. If the gradients are independent, its cosines with them are
    in the proportions of $u$. In terms of the Gramian, $x = J^\top v$ with
    $v = D^{-1} C^+ u$, $d = \sqrt{\operatorname{diag} G}$, $D = \operatorname{diag} d$
    and $C = D^{-1} G D^{-1}$. The length of the update is $\sum_i \ell_i \cos(g_i, x)$.

    Zero gradients are left out. If $x$ is zero, as for two opposed gradients, the
    weights are zero.

    **Arguments:**

    - `preference`: $u \succeq 0$, m numbers, of which only the proportions count. By
      default all are equal.
    - `length`: what $\ell_i$ is. With `"projection"` it is the norm of $g_i$. Otherwise
      it is the same for all: the least norm (`"min"`), the largest (`"max"`), their
      arithmetic, harmonic or geometric mean, or the norm of the gradient with the given
      index.

    **Raises:** `ValueError` or `TypeError` if `preference` is not a vector of finite
    nonnegative reals, or `length` is not one of these. When used, `ValueError` if the
    preference does not have m entries, or the index is not below m.

    **Reference:** Liu et al. (2025), arXiv:2408.11104, equations 2 and 3; the package
    `conflictfree` for the other lengths. Both compute $\hat J^+$ from the Jacobian.
    From the Gramian, singular values of $\hat J$ below the root of m times the
    precision cannot be told from zero.

    **Example:**

    >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    >>> jaxjd.weighting.conflict_free()(J @ J.T)
    Array([1.2265, 0.8441], dtype=float32)
    """
    chosen = Preference(preference)
    if isinstance(length, str):
        of = check_choice("length", length, LENGTHS)
    else:
        of = check_integer("length", length, least=0)

    def conflict_free_weights(gramian, mask, preferred):
        del mask  # The gradients of missing losses are zero.
        scaled = unit_diagonal(gramian)
        nonzero = scaled.norms > 0
        lengths = jnp.where(nonzero, lengths_of(scaled.norms, of), 0)
        v = spectrum(scaled.C).pinv(jnp.where(nonzero, preferred, 0))
        # The inner products of x with the unit gradients, and with itself.
        inner = matmul(scaled.C, v)
        square = matmul(v, inner)
        zero = square <= 0
        multiple = matmul(lengths, inner) / jnp.where(zero, 1, square)
        weights = jnp.where(zero, 0, multiple * v * scaled.inverse_norms)
        return finite_or_nan(gramian, weights)

    return stateless(on_every_device(conflict_free_weights), preference=chosen)


def lengths_of(
    norms: Float[Array, " m"], length: str | int | Int[Array, ""]
) -> Float[Array, " m"] | Float[Array, " 1"]:
    """The norms, or one number: one of the norms, or a mean of the nonzero ones."""
    if not isinstance(length, str):
        if not isinstance(length, Tracer) and length >= norms.shape[0]:
            raise ValueError(
                f"`length` must be the index of one of the {norms.shape[0]} losses. "
                f"Got {length}."
            )
        return norms[length][None]
    if length == "projection":
        return norms
    nonzero = (norms > 0) | ~(norms > 0).any()  # An empty mean is NaN.
    if length == "min":
        return jnp.min(norms, where=nonzero, initial=jnp.inf, keepdims=True)
    if length == "max":
        return jnp.max(norms, keepdims=True)
    if length == "arithmetic":
        return jnp.mean(norms, where=nonzero, keepdims=True)
    if length == "harmonic":
        inverses = 1 / jnp.where(nonzero, norms, 1)
        return 1 / jnp.mean(inverses, where=nonzero, keepdims=True)
    logarithms = jnp.log(jnp.where(nonzero, norms, 1))
    return jnp.exp(jnp.mean(logarithms, where=nonzero, keepdims=True))
