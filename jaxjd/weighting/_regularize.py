"""Regularize: give any weighting a positive definite Gramian."""

from jaxtyping import Array, Float

from jaxjd._checks import check_number, present_only
from jaxjd._numerics import like, normalise_and_regularise
from jaxjd.weighting._weighting import Weighting, check_weighting


def regularize(weighting: Weighting, eps: float | Float[Array, ""]) -> Weighting:
    r"""A weighting that sees $G / \operatorname{tr} G + \epsilon I$ instead of $G$.

    It is as if every gradient had an extra component, orthogonal to all the others.
    Gradients that are nearly dependent, or opposed, no longer get huge weights. This is
    TorchJD's rule. The trace is that of the losses that are present. If it is zero, the
    weighting sees $\epsilon I$.

    **Arguments:**

    - `weighting`: gets the mask and all extra arguments. Its state is the state.
    - `eps`: $\epsilon > 0$, relative to the trace.

    **Raises:** `TypeError` if `weighting` is not a weighting; `TypeError` or
    `ValueError` if `eps` is not a positive number.

    **Example:**

    >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    >>> weighting = jaxjd.weighting.regularize(jaxjd.weighting.upgrad(), 0.1)
    >>> weighting(J @ J.T)
    Array([0.9661, 0.7523], dtype=float32)
    """
    check_weighting(weighting)
    number = check_number("eps", eps, "(0, inf)")

    def update(gramian, state, /, *, mask=None, **extra_args):
        gramian, present = present_only(gramian, mask)
        regular = normalise_and_regularise(gramian, 0.0, like(number, gramian))
        return weighting.update(regular, state, mask=present, **extra_args)

    return Weighting(weighting.init, update, takes=weighting.takes)
