"""Where does a user read whether the solver behind a weighting has converged?

In the state. Made with `certificate=True`, a weighting that solves a problem keeps
there how well it solved it in the last step. `optax.tree.get(opt_state, "certificate")`
finds it in the state of a chain. By default nothing is kept and nothing is computed.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxjd._checks import present_only
from jaxjd.solvers import Certificate
from jaxjd.weighting._weighting import Weighting, stateless


class CertifiedState(NamedTuple):
    """The state of a weighting that keeps its certificate."""

    certificate: Certificate
    """Of the last step: the worst of all rows in every field, each a scalar."""


def certified(
    solve: Callable[
        [Float[Array, "m m"], Bool[Array, " m"]], tuple[Float[Array, " m"], Certificate]
    ],
    *,
    certificate: bool,
) -> Weighting:
    """A weighting from a function of a checked Gramian and a mask that certifies.

    The function sees zeros in the rows and columns of the losses that are missing.
    """
    if not certificate:
        return stateless(lambda gramian, mask: solve(gramian, mask)[0])

    def update(gramian, state, /, *, mask=None, **extra_args):
        del extra_args  # For other links of the chain.
        weights, of_rows = solve(*present_only(gramian, mask))
        return weights, CertifiedState(worst(of_rows, state.certificate))

    return Weighting(lambda: CertifiedState(unused()), update)


def unused() -> Certificate:
    """The certificate before the first step, in which nothing was solved."""
    zero = jnp.zeros(())
    return Certificate(zero, zero, zero, jnp.zeros((), jnp.int32), jnp.array(True))


def worst(certificate: Certificate, like: Certificate) -> Certificate:
    """The worst of the rows in every field, in the types of another certificate."""
    new = Certificate(
        jnp.max(certificate.primal),
        jnp.max(certificate.dual),
        jnp.max(certificate.complementarity),
        certificate.iterations,
        jnp.all(certificate.converged),
    )
    return jax.tree.map(lambda new, old: new.astype(old.dtype), new, like)
