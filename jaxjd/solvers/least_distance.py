"""Find the shortest step along which every loss makes the progress it is owed."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxjd._checks import check_gramian, check_max_iterations
from jaxjd._numerics import all_finite, matmul, unit_diagonal
from jaxjd._sharding import on_every_device
from jaxjd.solvers._certificate import (
    Certificate,
    certificate,
    distance_bound,
    rounding,
)
from jaxjd.solvers.dual_cone import common_descent, project_rows


class LeastDistance(NamedTuple):
    """What [`jaxjd.solvers.least_distance`][] returns."""

    solution: Float[Array, " m"]
    r"""The multipliers $\mu \succeq 0$: the step is $J^\top \mu$. If infeasible, they
    are the proof: $J^\top \mu = 0$ and $h^\top \mu > 0$."""
    feasible: Bool[Array, ""]
    """Whether there is such a step, as far as the precision can tell."""
    certificate: Certificate
    r"""How close the step is to the shortest one, relative to its own norm. If
    infeasible, how close $J^\top \mu$ is to 0, relative to $\sum_j \mu_j \|g_j\|$.
    Infinite if the gradients have no common descent direction."""


@on_every_device
def least_distance(
    gramian: Float[Array, "m m"],
    levels: Float[Array, " m"],
    *,
    max_iterations: int | None = None,
) -> LeastDistance:
    r"""Minimise $\|x\|$ subject to $Jx \succeq h$, given the Gramian of J.

    The solution is $x = J^\top \mu$ with $\mu \succeq 0$, $y = G \mu - h \succeq 0$ and
    $\mu \circ y = 0$. It is found as a projection onto a dual cone. Give every gradient
    one more coordinate, $h_j / \sigma$, and let $p = (0, \ldots, 0, 1)$. Then r, the
    projection of $-p$ onto the dual cone of the longer gradients and of $-p$, is
    proportional to $(x, -\sigma)$, and zero if and only if the problem is infeasible.

    The solution is differentiable in reverse mode, as that of
    [`jaxjd.solvers.project_dual_cone`][] is.

    **Arguments:**

    - `gramian`: $G = J J^\top$, symmetric positive semidefinite, which is not checked.
      Types narrower than float32 are solved in float32.
    - `levels`: h, of any sign. If the gradient of a loss is zero, a positive level is
      infeasible, and with any other the loss is left out.
    - `max_iterations`: by default that of [`jaxjd.solvers.project_dual_cone`][].

    **Returns:** $\mu$, whether there is such an x, and the certificate. NaN or infinity
    in G or h gives NaN.

    **Raises:** `ValueError` or `TypeError` if `gramian` is not a square matrix of real
    floats, `levels` does not have one entry per row of it, or `max_iterations` is below
    1.

    **Reference:** Lawson & Hanson (1974), Solving Least Squares Problems, chapter 23,
    for least distance as nonnegative least squares.

    **Example:**

    >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    >>> found = jaxjd.solvers.least_distance(J @ J.T, jnp.array([1.0, 1.0]))
    >>> J @ (found.solution @ J)  # The progress along the shortest step.
    Array([1., 1.], dtype=float32)
    """
    G = check_gramian(gramian)
    check_max_iterations(max_iterations)
    m = G.shape[0]
    if jnp.shape(levels) != (m,):
        raise ValueError(
            f"`levels` must have shape ({m},), as `gramian` has shape {G.shape}. "
            f"Got {jnp.shape(levels)}."
        )
    step = find_step(G, jnp.asarray(levels).astype(G.dtype), max_iterations)
    proof = certificate(relative_residual(step), step.iterations, step.finished)
    return LeastDistance(step.solution, step.feasible, proof)


class Step(NamedTuple):
    """The shortest step, also in coordinates in which the gradients have norm 1."""

    solution: Float[Array, " m"]
    feasible: Bool[Array, ""]
    C: Float[Array, "m m"]
    heights: Float[Array, " m"]
    x: Float[Array, " m"]
    finished: Bool[Array, ""]
    iterations: Int[Array, ""]


def find_step(
    G: Float[Array, "m m"], h: Float[Array, " m"], max_iterations: int | None = None
) -> Step:
    """Find the shortest step, given checked arguments."""
    m = G.shape[0]
    scaled = unit_diagonal(G, constant_norms=True)
    zero = scaled.norms == 0

    # Let sigma be the highest level of a unit gradient. As |x| >= sigma, the scale of h
    # does not decide how much of p is left to r, and whether that is lost in rounding.
    heights = h * scaled.inverse_norms
    sigma = lax.stop_gradient(jnp.max(heights))
    owed = sigma > 0
    e = heights / jnp.where(owed, sigma, 1)
    longer = jnp.block(
        [
            [jnp.ones((1, 1), G.dtype), -e[None, :]],
            [-e[:, None], scaled.C + e[:, None] * e[None, :]],
        ]
    )
    target = jnp.zeros(m + 1, G.dtype).at[0].set(1)
    weights, solved = project_rows(target[None], longer, max_iterations=max_iterations)
    unscaled = weights[0, 1:]
    # What is left of p, |r|^2, is 1 / (1 + |x|^2 / sigma^2).
    left = 1 - jnp.sum(e * unscaled)
    rounding = 8 * float(jnp.finfo(G.dtype).eps) * (m + 1) ** 0.5
    rounding *= jnp.maximum(1, jnp.sum(jnp.square(unscaled)))
    feasible = ((left > rounding) | ~owed) & ~jnp.any(zero & (h > 0))
    x = jnp.where(owed, unscaled * sigma, 0) / jnp.where(feasible & owed, left, 1)
    solution = x * scaled.inverse_norms

    valid = all_finite(G) & jnp.all(jnp.isfinite(h))
    solution = jnp.where(valid, solution, jnp.nan)
    return Step(
        solution,
        feasible,
        scaled.C,
        jnp.where(zero, 0, heights),
        jnp.where(valid, x, jnp.nan),
        solved.result.finished[0],
        solved.result.iterations,
    )


def relative_residual(step: Step) -> Float[Array, ""]:
    """The residual of the certificate."""
    _, feasible, C, heights, x, _, _ = lax.stop_gradient(step)
    product = matmul(C, x)
    y = product - heights
    noise = rounding(x) + 2 * float(jnp.finfo(x.dtype).eps) * jnp.max(jnp.abs(heights))
    total = jnp.sum(x)
    length = jnp.sqrt(jnp.maximum(jnp.vdot(x, product) + rounding(x) * total, 0))

    descent = common_descent(C)
    missing = jnp.max(jnp.where(jnp.diagonal(C) > 0, jnp.maximum(-y, 0) + noise, 0))
    # A step along the common descent makes up for what is missing, so the shortest
    # step is no longer than the two together.
    further = jnp.where(descent > 0, missing / jnp.where(descent > 0, descent, 1), 0)
    distance = distance_bound(
        C, x[None], y[None], noise[None], descent, (length + further)[None]
    )[0]
    of_step = jnp.where(length > 0, distance / jnp.where(length > 0, length, 1), 0)
    of_proof = length / jnp.where(total > 0, total, 1)
    return jnp.where(feasible, of_step, of_proof)
