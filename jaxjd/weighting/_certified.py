"""Keep the solver's certificate in the state of a weighting, on request.

With `certificate=True`, the state of a weighting that solves a problem says how well it
was solved in the last step. `optax.tree.get(opt_state, "certificate")` finds it in the
state of a chain. Otherwise no certificate is kept or computed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxjd._checks import present_only
from jaxjd._numerics import all_finite
from jaxjd.solvers import Certificate
from jaxjd.weighting._preference import Preference
from jaxjd.weighting._weighting import Weighting, keep_unless, preferred_by, taken


class CertifiedState(NamedTuple):
    """The state of a weighting that keeps its certificate."""

    certificate: Certificate
    """Of the last step. Each field is a scalar, the worst of all rows."""
    state: Any
    """What else the weighting keeps."""


Solve = Callable[..., tuple[Float[Array, " m"], Any, Certificate | None]]


def certified(
    solve: Solve,
    *,
    init: Callable[[], Any] = optax.EmptyState,
    certificate: bool,
    preference: Preference | None = None,
) -> Weighting:
    """Make a weighting that solves a problem, and keeps the certificate on request.

    A batch that is not finite gives NaN weights and leaves the state as it was, except
    the certificate, which says that nothing was solved.

    **Arguments:**

    - `solve`: from a checked Gramian, a mask, the state and the last certificate to the
      weights, the state and the certificate, which may be None if it is not kept. It
      sees zeros in the rows and columns of the losses that are missing. With
      `preference`, the preferred weights are its last argument.
    - `init`: makes the state.
    - `certificate`: whether it is kept.
    - `preference`: that of the method, if it has one.
    """

    def update(gramian, state, /, *, mask=None, **extra_args):
        gramian, mask = present_only(gramian, mask)
        preferred = preferred_by(preference, gramian, mask, extra_args)
        last, kept = state if certificate else (unused(), state)
        weights, new, proof = solve(gramian, mask, kept, last, *preferred)
        finite = all_finite(gramian)
        weights = jnp.where(finite, weights, jnp.nan)
        new = keep_unless(finite, new, kept)
        if not certificate:
            return weights, new
        assert proof is not None
        proof = proof._replace(converged=proof.converged & finite)
        return weights, CertifiedState(_worst(proof, last), new)

    def init_with_certificate():
        return CertifiedState(unused(), init())

    first = init_with_certificate if certificate else init
    return Weighting(first, update, takes=taken(preference))


def unused() -> Certificate:
    """The certificate before the first step, in which nothing was solved."""
    return Certificate(jnp.zeros(()), jnp.zeros((), jnp.int32), jnp.array(True))


def _worst(certificate: Certificate, like: Certificate) -> Certificate:
    """The worst of the rows in every field, in the types of another certificate."""
    new = Certificate(
        jnp.max(certificate.residual),
        certificate.iterations,
        jnp.all(certificate.converged),
    )
    return jax.tree.map(lambda new, old: new.astype(old.dtype), new, like)
