"""Regularize: any weighting, of a Gramian that is positive definite."""

from jaxjd._checks import check_number, present_only
from jaxjd._numerics import normalise_and_regularise
from jaxjd.weighting._weighting import Weighting, check_weighting


def regularize(weighting: Weighting, eps: float) -> Weighting:
    r"""A weighting that sees $G / \operatorname{tr} G + \epsilon I$ instead of $G$.

    As if every gradient had a part of its own, orthogonal to all the others: gradients
    that are nearly dependent, or opposed, no longer get huge weights. This is TorchJD's
    rule. The trace is that of the losses that are present; where it is zero, the
    weighting sees $\epsilon I$.

    **Arguments:**

    - `weighting`: it gets the mask and all extra arguments, and its state is the state.
    - `eps`: $\epsilon > 0$.

    **Raises:** `TypeError` if `weighting` is not a weighting; `TypeError` or
    `ValueError` if `eps` is not a positive number.
    """
    check_weighting(weighting)
    check_number("eps", eps, "(0, inf)")

    def update(gramian, state, /, *, mask=None, **extra_args):
        gramian, present = present_only(gramian, mask)
        regular = normalise_and_regularise(gramian, 0.0, eps)
        return weighting.update(regular, state, mask=present, **extra_args)

    return Weighting(weighting.init, update)
