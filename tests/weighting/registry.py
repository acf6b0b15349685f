"""What is claimed of each aggregator, one row each, and nowhere else.

The tests of all weightings and the tables of the documentation use this registry.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxjd


class Counterexample(NamedTuple):
    rows: list[list[float]]
    """The Jacobian."""
    value: float
    """What `test_properties` measures on this Jacobian."""
    before: list[list[float]] | None = None
    """The Jacobian of the step before. None for a first step."""


class Row(NamedTuple):
    """The claims about one aggregator. The defaults hold for most."""

    unusual: str
    """The first step with unusual gradients, in the words of `docs/aggregators.md`."""

    conflicts: Counterexample | None = None
    """None if it is non-conflicting: no component of J A(J) is negative."""
    not_linear: Counterexample | None = None
    """None if c -> A(diag(c) J) is linear in the scales c > 0 of the rows."""
    not_weighted: Counterexample | None = None
    """None if A(J) is a combination of the rows of J."""
    not_rotated: Counterexample | None = None
    """None if A(J Q) = A(J) Q for rotations Q. Otherwise it has no weighting."""

    arguments: Callable[[int], tuple] = lambda m: ()
    """The arguments that it needs, besides `num_losses`."""
    options: dict[str, Any] = {}  # noqa: RUF012
    """Those that it needs by name."""
    exact: dict[str, Any] = {}  # noqa: RUF012
    """Options that make the claims hold exactly, if they do not by default."""
    of_two_batches: bool = False
    """`update` needs a cross Gramian."""
    of_losses: bool = False
    """`update` needs the losses: the method is in `jaxjd.scalarization`."""
    blind: bool = False
    """The weights read no more of the Gramian than its shape: it may be NaN."""
    ordered: bool = False
    """The order of the losses matters."""
    drawn: bool = False
    """It draws random numbers."""
    least: int = 1
    """The smallest number of losses."""
    scale_free: bool = True
    """The weights are the same for gradients in another unit."""
    bargaining: bool = False
    """It has no solution at a Pareto-stationary point."""
    zero_at: str = "neither"
    """Where its update is zero: at all "stationary" points (0 = J^T w for some nonzero
    w >= 0), only at "strongly" stationary ones (w > 0), or at "neither"."""


# One entry for each column of the table "Unusual gradients".
KINDS = (
    "a NaN or an infinity",
    "one is zero",
    "all are zero",
    "two are equal",
    "all are equal",
    "two are opposed",
    "norms from 1e-6 to 1e6",
)

# The values of counterexamples. `conflicts`: the smallest cosine of the update with a
# gradient, at points that are not Pareto-stationary, so that a non-conflicting update
# exists. `not_linear`: the norm of A((I + C) J) - A(J) - A(C J) relative to that of
# A((I + C) J), for C = diag(3, 1, ..., 1). `not_weighted`: the part of the update
# outside of the span of the rows. `not_rotated`: the norm of A(J Q) - A(J) Q relative
# to that of A(J), where Q rotates by 45 degrees.
AGGREGATORS = {
    "aligned_mtl": Row(
        "NaN | mean decreases, left out | mean | mean decreases | mean"
        " | mean decreases | mean decreases",
        conflicts=Counterexample([[0, -1], [1, 3]], -0.1961),
        not_linear=Counterexample([[0, -1], [2, 0]], 0.25),
    ),
    "cagrad": Row(  # With c < 1.
        "NaN | none ⁶ | mean | nonnegative, mean decreases | (1 + c) mean"
        " | nonnegative | nonnegative, mean decreases",
        conflicts=Counterexample([[0, -1], [1, 3]], -0.6615),
        not_linear=Counterexample([[0, 1], [1, -1]], 0.2339),
    ),
    "conflict_free": Row(
        "NaN | equal projections, no conflict, left out | none"
        " | equal projections, no conflict, as one | sum"
        " | equal projections, no conflict | equal projections, no conflict",
        # It is non-conflicting if the gradients are linearly independent. It is linear
        # with `length="projection"`.
        conflicts=Counterexample(
            [[-3, 2, -3], [-1, -2, 1], [-3, 3, 2], [2, -2, 1]], -0.1334
        ),
    ),
    "constant": Row(
        "blind | fixed | fixed | fixed | fixed | fixed | fixed",
        conflicts=Counterexample([[-1, 0], [2, -1]], -0.3714),
        arguments=lambda m: (np.linspace(2.0, -1.0, m),),
        blind=True,
        ordered=True,
    ),
    "cosmos": Row(
        "blind | fixed | fixed | fixed | fixed | fixed | fixed",
        conflicts=Counterexample([[1, 2], [0, -1]], -0.6013),
        arguments=lambda m: (0.3,),
        blind=True,
        of_losses=True,
    ),
    "cr_mogm": Row(
        "NaN | as the other | as the other | as the other | as the other"
        " | as the other | as the other",
        # It is linear because UPGrad is. The first weights are UPGrad's.
        conflicts=Counterexample([[1, 2], [0, -1]], -0.6459, [[-2, 0], [-2, -1]]),
        arguments=lambda m: (jaxjd.weighting.upgrad(noise_eps=0),),
    ),
    "dualproj": Row(
        "NaN | no conflict, left out | mean | no conflict, as twice one | mean"
        " | no conflict | mean decreases",
        exact={"noise_eps": 0},
        not_linear=Counterexample([[0, 1], [1, -1]], 0.25),
        zero_at="strongly",
    ),
    "dwa": Row(
        "blind | fixed | fixed | fixed | fixed | fixed | fixed",
        conflicts=Counterexample([[1, 2], [0, -1]], -0.7071),
        options={"epoch_steps": 2},
        blind=True,
        of_losses=True,
    ),
    "excess_mtl": Row(
        "NaN | convex, left out | mean | convex | mean | convex | convex, longest",
        conflicts=Counterexample([[1, 2], [0, -1]], -0.8813),
        not_linear=Counterexample([[0, 1], [1, 0]], 0.1525),
        not_rotated=Counterexample([[-1, 2], [0, -3]], 2.1953),
    ),
    "fairgrad": Row(
        "NaN | no conflict, left out | none | no conflict | no conflict, alike"
        " | positive | no conflict",
        not_linear=Counterexample([[0, 1], [1, 0]], 1.587),
        scale_free=False,  # If G is s times as large, w is s^(-2/3) times as large.
        bargaining=True,
    ),
    "famo": Row(
        "blind | fixed | fixed | fixed | fixed | fixed | fixed",
        conflicts=Counterexample([[1, 2], [0, -1]], -0.8192),
        blind=True,
        of_losses=True,
    ),
    "geometric_mean": Row(
        "blind | fixed | fixed | fixed | fixed | fixed | fixed",
        conflicts=Counterexample([[1, 2], [0, -1]], -0.8192),
        blind=True,
        of_losses=True,
    ),
    "graddrop": Row(
        "there | one sign, left out | one sign | one sign, as twice one | sum"
        " | one sign | one sign, longest",
        conflicts=Counterexample([[1, 1], [0, -1]], -0.7071),
        not_linear=Counterexample([[-1, 0], [2, -1]], 1.118),
        not_weighted=Counterexample([[-3, -1, -1], [0, 2, -1], [2, 2, 0]], 0.2274),
        not_rotated=Counterexample([[-1, -2], [0, 1]], 1.5811),
    ),
    "gradnorm": Row(
        "NaN | sum, left out | sum | sum, as twice one | sum | sum | sum, longest",
        conflicts=Counterexample([[1, 2], [0, -1]], -0.7071),
        of_losses=True,
    ),
    "gradvac": Row(
        "NaN | at least 1, left out | sum | at least 1 | sum | at least 1 | at least 1",
        conflicts=Counterexample([[-1, 0, 1], [1, -2, -3], [1, 1, -1]], -0.5941),
        ordered=True,
        drawn=True,
    ),
    "imtl_g": Row(
        "NaN | equal projections, left out | none | equal projections, as one | mean"
        " | equal projections | equal projections",
        conflicts=Counterexample([[-2, -6], [1, -4], [-1, 1]], -0.224),
        not_linear=Counterexample([[1, 2], [2, 8], [1, 0]], 0.1214),
    ),
    "imtl_l": Row(
        "blind | fixed | fixed | fixed | fixed | fixed | fixed",
        conflicts=Counterexample([[1, 2], [0, -1]], -0.7071),
        blind=True,
        of_losses=True,
    ),
    "krum": Row(
        "NaN | convex | first | convex | convex | convex | convex",
        conflicts=Counterexample([[0, -1], [1, -1], [2, 3], [0, -1]], -0.8321),
        not_linear=Counterexample([[4, 0], [10, 0], [15, 0], [40, 0], [80, 0]], 0.3056),
        arguments=lambda m: (1, 2),
        least=4,
    ),
    "mean": Row(
        "blind | mean, left out | mean | mean, as twice one | mean | mean"
        " | mean, longest",
        conflicts=Counterexample([[1, 2], [0, -1]], -0.7071),
        blind=True,
    ),
    "mgda": Row(
        "NaN | convex, zero | mean | no conflict, convex, as one | mean"
        " | convex, zero | no conflict, convex, short",
        not_linear=Counterexample([[0, 1], [1, 0]], 0.1118),
        zero_at="stationary",
    ),
    "modo": Row(
        "NaN | convex | mean | convex | mean | convex | convex",
        conflicts=Counterexample([[1, 2], [0, -1]], -0.4472),
        not_linear=Counterexample([[0, 1], [1, 0]], 0.4031),
        of_two_batches=True,
        scale_free=False,  # Its step size depends on the units of the Gramian.
    ),
    "momentum_conflict_free": Row(
        "NaN | signs, left out | zero | signs, as one | signs | signs | signs",
        conflicts=Counterexample([[-3, 1, 3], [2, 0, -2], [3, 0, -1]], -0.6623),
        not_linear=Counterexample([[0, 1], [1, 0]], 1.0),
        not_weighted=Counterexample([[2, 3, -2], [-2, 3, 3]], 0.7474),
        not_rotated=Counterexample([[3, 0], [3, -3], [3, -3]], 0.7654),
        scale_free=False,  # Its epsilon is absolute.
    ),
    "nash_mtl": Row(
        "NaN | no conflict, left out | none | no conflict | no conflict, alike"
        " | positive | no conflict",
        not_linear=Counterexample([[0, 1], [1, 0]], 1.0),
        scale_free=False,  # The norm of the update is limited.
        bargaining=True,
    ),
    "pbi": Row(
        "blind | fixed | fixed | fixed | fixed | fixed | fixed",
        conflicts=Counterexample([[1, 2], [0, -1]], -0.9829),
        blind=True,
        of_losses=True,
    ),
    "pcd": Row(
        "NaN | secondary, left out ⁷ | none | secondary | first | secondary"
        " | secondary",
        conflicts=Counterexample([[1, 0], [-40, 1]], -0.6051),
        not_linear=Counterexample([[1, 0], [-40, 1]], 0.0635, [[1, 0], [-40, 1]]),
        ordered=True,
        scale_free=False,  # Its epsilon is absolute.
    ),
    "pcgrad": Row(
        "NaN | at least 1, left out | sum | at least 1 | sum | at least 1 | at least 1",
        conflicts=Counterexample([[-1, 0, -9], [-7, -1, 3], [5, 3, 2]], -0.224),
        ordered=True,
        drawn=True,
    ),
    "random": Row(
        "blind | convex, left out | convex | convex | convex | convex"
        " | convex, longest",
        conflicts=Counterexample([[0, 1], [1, -1]], -0.6854),
        blind=True,
        ordered=True,
        drawn=True,
    ),
    "sdmgrad": Row(
        "NaN | convex | mean | convex | mean | convex | convex, longest",
        conflicts=Counterexample([[-1, -1], [1, 0]], -0.6562),
        not_linear=Counterexample([[2, -3], [-1, 1]], 4.138),
        of_two_batches=True,
    ),
    "stch": Row(
        "blind | fixed | fixed | fixed | fixed | fixed | fixed",
        conflicts=Counterexample([[1, 2], [0, -1]], -0.4786),
        arguments=lambda m: (0.5,),
        blind=True,
        of_losses=True,
    ),
    "sum": Row(
        "blind | sum, left out | sum | sum, as twice one | sum | sum | sum, longest",
        conflicts=Counterexample([[1, 2], [0, -1]], -0.7071),
        blind=True,
    ),
    "trimmed_mean": Row(
        "there, trimmed | between | between | between | mean | between | between",
        conflicts=Counterexample([[0, 1], [-1, -2], [0, 1]], -0.8944),
        not_linear=Counterexample([[0, 1], [0, 2], [-2, 0]], 0.25),
        not_weighted=Counterexample([[2, 3, 0], [-2, 2, -2], [-3, -2, -1]], 0.2704),
        not_rotated=Counterexample([[0, 1], [0, 2], [-2, 0]], 0.7071),
        arguments=lambda m: (1,),
    ),
    "upgrad": Row(
        "NaN | no conflict, left out | mean | no conflict, as twice one | mean"
        " | no conflict | mean decreases",
        exact={"noise_eps": 0},
        zero_at="strongly",
    ),
    "uw": Row(
        "blind | fixed | fixed | fixed | fixed | fixed | fixed",
        conflicts=Counterexample([[1, 2], [0, -1]], -0.7071),
        blind=True,
        of_losses=True,
    ),
}
# Aggregators that need the rows themselves have no weighting.
OF_ROWS = {name: row for name, row in AGGREGATORS.items() if row.not_rotated}
WEIGHTINGS = {name: row for name, row in AGGREGATORS.items() if not row.not_rotated}
# Scalarizers are functions of the losses, from which a weighting is made.
OF_LOSSES = {name: row for name, row in AGGREGATORS.items() if row.of_losses}
# Functions from a weighting to a weighting: they have no transformation.
COMBINATORS = {"normalize", "regularize", "scale_by_losses"}


def weighting(name: str, m: int) -> jaxjd.Weighting:
    if name in OF_LOSSES:
        return scalarizer(name, m).weighting
    return _of_losses(getattr(jaxjd.weighting, name), AGGREGATORS[name], m)


def scalarizer(name: str, m: int) -> jaxjd.Scalarizer:
    return _of_losses(getattr(jaxjd.scalarization, name), AGGREGATORS[name], m)


def transformation(name: str, m: int) -> optax.GradientTransformationExtraArgs:
    return _of_losses(getattr(jaxjd, name), AGGREGATORS[name], m)


def exact(name: str, m: int) -> optax.GradientTransformationExtraArgs:
    """The transformation, with the options that make its claims hold exactly."""
    row = AGGREGATORS[name]
    return _of_losses(getattr(jaxjd, name), row, m, **row.exact)


def _of_losses(make: Callable[..., Any], row: Row, m: int, **options: Any) -> Any:
    sizes = row.options | options
    parameter = inspect.signature(make).parameters.get("num_losses")
    if parameter is not None and parameter.default is parameter.empty:
        sizes["num_losses"] = m
    return make(*row.arguments(m), **sizes)


def extra_args(
    name: str, gramian: jax.Array, losses: jax.Array | None = None
) -> dict[str, jax.Array]:
    """What `update` needs besides the Gramian. The same batch stands in for both."""
    if AGGREGATORS[name].of_losses:
        losses = some_losses(len(gramian)) if losses is None else losses
        return {"losses": losses, "losses_after": losses}
    return {"cross_gramian": gramian} if AGGREGATORS[name].of_two_batches else {}


def some_losses(m: int) -> jax.Array:
    """Positive losses of different sizes."""
    return jnp.linspace(0.5, 2.0, m)
