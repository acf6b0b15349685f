"""Maximise the smallest progress of any loss within a ball around a given update."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import cho_factor, cho_solve
from jaxtyping import Array, Bool, Float, Int

from jaxjd._checks import check_gramian, check_max_iterations, check_number
from jaxjd._numerics import all_finite, like, matmul, root, symmetric_part
from jaxjd._sharding import on_every_device, varying
from jaxjd.solvers._certificate import Certificate, certificate
from jaxjd.solvers._face_cg import default_ridge
from jaxjd.solvers.least_distance import find_step


class BallMaximum(NamedTuple):
    """What [`jaxjd.solvers.maximise_on_ball`][] returns."""

    solution: Float[Array, " m"]
    r"""The multipliers $\mu \succeq 0$: the update is $J^\top (u + \mu)$."""
    certificate: Certificate
    r"""How close the update is to the best, relative to $(1 + c) \|J^\top u\|$. Each
    iteration solves a problem of least distance."""


class _Search(NamedTuple):
    level: Float[Array, ""]
    lower: Float[Array, ""]
    upper: Float[Array, ""]
    mu: Float[Array, " m"]
    stationary: Bool[Array, ""]
    done: Bool[Array, ""]
    iterations: Int[Array, ""]


@on_every_device
def maximise_on_ball(
    gramian: Float[Array, "m m"],
    u: Float[Array, " m"],
    c: float | Float[Array, ""],
    *,
    mask: Bool[Array, " m"] | None = None,
    max_iterations: int = 60,
) -> BallMaximum:
    r"""Maximise $\min_i g_i^\top x$ over $\|x - J^\top u\| \leq c \|J^\top u\|$.

    The solution is $x = J^\top (u + \mu)$. If the smallest progress t were known, x
    would be the point closest to $J^\top u$ with $Jx \succeq t$: a problem of
    [`jaxjd.solvers.least_distance`][]. The distance is a convex function of t, and the
    multipliers give its slope. Newton's method finds the t at which the distance is the
    radius. Each vector of multipliers, scaled to sum 1, also proves an upper bound on
    t:

    $$t \leq w^\top G u + c \|J^\top u\| \|J^\top w\|,$$

    This is the value of the dual problem, and the next iterate of Newton's method. If
    the best t is 0, because the point is Pareto-stationary or a gradient is zero, then
    $u + \mu$ is zero: no update is better. For this the ball must hold an update that
    conflicts with no loss, as it does if $c \geq 1$.

    **Arguments:**

    - `gramian`: $G = J J^\top$, symmetric positive semidefinite, which is not checked.
      Types narrower than float32 are solved in float32.
    - `u`: the weights of the centre.
    - `c`: the radius, relative to the centre.
    - `mask`: False for losses that are left out.
    - `max_iterations`: the largest number of problems of least distance.

    **Returns:** $\mu$ and its certificate. NaN or infinity in G gives NaN.

    **Raises:** `ValueError` or `TypeError` if `gramian` is not a square matrix of real
    floats, `u` or `mask` does not have one entry per row of it, `c` is negative or
    `max_iterations` is below 1.

    **Reference:** Liu et al. (2021), arXiv:2110.14048, equation 3 and its dual, in
    algorithm 1.

    **Example:**

    >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    >>> u = jnp.array([0.5, 0.5])
    >>> u + jaxjd.solvers.maximise_on_ball(J @ J.T, u, 0.5).solution
    Array([0.7041, 0.5   ], dtype=float32)
    """
    G = check_gramian(gramian)
    c = like(check_number("c", c, "[0, inf)"), G)
    check_max_iterations(max_iterations)
    m = G.shape[0]
    present = jnp.ones(m, bool) if mask is None else jnp.asarray(mask)
    for name, vector in (("u", u), ("mask", present)):
        if jnp.shape(vector) != (m,):
            raise ValueError(
                f"`{name}` must have shape ({m},), as `gramian` has shape {G.shape}. "
                f"Got {jnp.shape(vector)}."
            )
    G = jnp.where(present[:, None] & present[None, :], G, 0)
    u = jnp.where(present, jnp.asarray(u).astype(G.dtype), 0)
    found = _maximise(
        *lax.stop_gradient((G, u, c)), present, max_iterations=int(max_iterations)
    )
    return found._replace(solution=_with_derivative(G, u, c, found.solution))


@jax.custom_jvp
def _with_derivative(G, u, c, mu):
    r"""Give the multipliers the derivative that the optimality conditions imply.

    The losses with $\mu > 0$ make the same progress, $G (u + \mu) = t$, and the update
    is on the sphere, $\mu^\top G \mu = c^2 u^\top G u$. The first equation times
    $\mu$, with the second, gives $dt$. Then the first gives $d\mu$. If $u + \mu = 0$,
    because no update is better, it stays 0.
    """
    del G, u, c
    return mu


@_with_derivative.defjvp
def _derivative(primals, tangents):
    G, u, c, _ = primals
    change, change_of_u, change_of_c, _ = tangents
    mu = _with_derivative(*primals)
    change = symmetric_part(change)
    face = mu > 0
    norms = root(jnp.diagonal(G))
    Gu = matmul(G, u)
    centre2 = jnp.vdot(u, Gu)

    moved = -matmul(change, u + mu) - matmul(G, change_of_u)
    sphere2 = 2 * jnp.vdot(Gu, change_of_u) + jnp.vdot(u, matmul(change, u))
    sphere2 = c**2 * sphere2 + 2 * c * change_of_c * centre2
    sphere2 -= jnp.vdot(mu, matmul(change, mu))
    total = jnp.sum(jnp.where(face, mu, 0))
    level = (sphere2 / 2 - jnp.vdot(mu, moved)) / jnp.where(face.any(), total, 1)
    scale = jnp.where(face, norms, 1)
    C = jnp.where(face[:, None] & face[None], G / scale[:, None] / scale[None], 0)
    C += jnp.diag(jnp.where(face, default_ridge(len(u), G.dtype), 1))
    owed = jnp.where(face, (level + moved) / scale, 0)
    on_sphere = cho_solve(cho_factor(C), owed) / scale

    # From c = 0 on, the update first helps the loss with the least progress.
    worst = jnp.argmin(jnp.where(norms > 0, Gu, jnp.inf))
    leaving = jnp.zeros_like(u).at[worst].set(root(centre2) * change_of_c)
    leaving /= jnp.where(norms > 0, norms, 1)
    at_centre = jnp.where(c == 0, leaving, 0)
    result = jnp.where(face.any(), on_sphere, at_centre)
    zero = jnp.all(u + mu == 0) & jnp.any(u != 0)
    return mu, jnp.where(zero, -change_of_u, result)


@functools.partial(jax.jit, static_argnames=("max_iterations",))
def _maximise(
    G: Float[Array, "m m"],
    u: Float[Array, " m"],
    c: float | Float[Array, ""],
    present: Bool[Array, " m"],
    *,
    max_iterations: int,
) -> BallMaximum:
    m, dtype = G.shape[0], G.dtype
    eps = float(jnp.finfo(dtype).eps)
    valid = all_finite(G)
    largest = jnp.max(jnp.diagonal(G))
    G = G / jnp.where(largest > 0, largest, 1)

    Gu = matmul(G, u)
    centre2 = jnp.maximum(jnp.vdot(u, Gu), 0)
    radius = c * jnp.sqrt(centre2)
    norms = jnp.sqrt(jnp.diagonal(G))
    zero = (norms == 0) & present
    # A progress of 0, less its rounding: opposed gradients leave no slack for it.
    none = -64 * eps * m**0.5 * jnp.max(jnp.abs(Gu))

    def bound(w):
        """The upper bound that weights prove, and the norm of their combination."""
        norm = jnp.sqrt(jnp.maximum(jnp.vdot(w, matmul(G, w)), 0))
        return jnp.vdot(w, Gu) + radius * norm, norm

    def step(s: _Search) -> _Search:
        # The first problem only asks whether there is a common descent direction.
        first = s.iterations == 0
        levels = jnp.where(first, 1, s.level - Gu)
        # A loss whose gradient is zero makes no progress, and must not require any.
        levels = jnp.where(norms == 0, 0, levels)
        nearest = find_step(G, levels)
        mu = nearest.solution
        total = jnp.sum(mu)
        w = mu / jnp.where(total > 0, total, 1)
        proven, norm = bound(w)
        stationary = first & (
            ~nearest.feasible | (norm <= 8 * eps**0.5 * jnp.vdot(w, norms))
        )
        stationary = s.stationary | stationary | jnp.any(zero)
        proven = jnp.where(stationary & first, jnp.minimum(proven, none), proven)
        upper = jnp.where(total > 0, jnp.minimum(s.upper, proven), s.upper)

        distance = norm * total
        inside = nearest.feasible & (distance <= radius) & ~first
        lower = jnp.where(inside, jnp.maximum(s.lower, s.level), s.lower)
        # Infeasible levels are too high, as are all those that need too long a step.
        outside = ~inside & ~first
        upper = jnp.where(outside, jnp.minimum(upper, s.level), upper)
        usable = nearest.feasible & (total > 0) & (proven < s.upper) & ~first
        middle = (lower + upper) / 2
        level = jnp.where(first | usable, upper, middle)
        close = jnp.abs(distance - radius) <= 64 * eps * radius
        done = ~first & nearest.feasible & (close | (level == s.level))
        done |= ~first & (upper - lower <= 2 * eps * jnp.abs(upper))
        keep = first | ~nearest.feasible | (total == 0)
        return _Search(
            level=level,
            lower=lower,
            upper=upper,
            mu=jnp.where(keep, s.mu, mu),
            stationary=stationary,
            done=done | ~jnp.isfinite(level),
            iterations=s.iterations + 1,
        )

    def unfinished(s: _Search):
        return (s.iterations < max_iterations) & ~s.done

    lowest = jnp.min(jnp.where(present, Gu, jnp.inf))
    alone = jnp.min(jnp.where(present, Gu + radius * norms, jnp.inf))
    begin = _Search(
        level=alone,
        lower=lowest,
        upper=alone,
        mu=jnp.zeros(m, dtype),
        stationary=jnp.zeros((), bool),
        done=(radius == 0) | ~valid,
        iterations=jnp.zeros((), jnp.int32),
    )
    end = lax.while_loop(unfinished, step, varying(begin, G, u))

    # Scale onto the sphere, up to rounding, whatever t is.
    _, norm = bound(end.mu)
    mu = jnp.where(norm > 0, radius / jnp.where(norm > 0, norm, 1), 0) * end.mu
    # The best level in the ball is 0, so zero is as good for the worst-off loss.
    nothing = end.stationary & (end.lower >= none)
    mu = jnp.where(nothing, -u, mu)
    mu = jnp.where(valid, mu, jnp.nan)
    residual = _residual(*lax.stop_gradient((G, u, mu, present)), c, nothing)
    return BallMaximum(mu, certificate(residual, end.iterations, end.done))


def _residual(
    G: Float[Array, "m m"],
    u: Float[Array, " m"],
    mu: Float[Array, " m"],
    present: Bool[Array, " m"],
    c: float | Float[Array, ""],
    nothing: Bool[Array, ""],
) -> Float[Array, ""]:
    r"""Bound the distance to the best update x*, from the duality gap.

    With $w = \mu / \sum \mu$ and $g = J^\top w$, the update x is the point of the ball
    where $g^\top x$ is largest, and a ball of radius R is curved:
    $g^\top (x - x^*) \geq \|g\| \|x - x^*\|^2 / 2R$. And $g^\top x^*$ is at least the
    smallest progress along x*, which is at least that along x.
    """
    total = jnp.sum(mu)
    w = mu / jnp.where(total > 0, total, 1)
    norms = jnp.sqrt(jnp.diagonal(G))
    noise = 2 * float(jnp.finfo(G.dtype).eps) * norms

    def norm(weights):
        squared = jnp.vdot(weights, matmul(G, weights))
        return jnp.sqrt(jnp.maximum(squared, 0))

    def size(weights):
        return jnp.linalg.norm(norms * weights)

    progress = matmul(G, u + mu) - noise * size(u + mu)
    least = jnp.min(jnp.where(present, progress, jnp.inf))
    length, centre = norm(w), norm(u)
    radius = c * centre
    # Rounding may make g longer, and so raise the bound that w proves.
    longer = jnp.sqrt(jnp.square(length) + jnp.sum(noise * w) * size(w))
    proven = jnp.vdot(w, matmul(G, u)) + jnp.sum(noise * w) * size(u) + radius * longer
    gap = jnp.maximum(proven - least, 0)
    distance = jnp.sqrt(2 * radius * gap / jnp.where(length > 0, length, 1))
    # No two points of the ball are further apart than its diameter.
    distance = jnp.where(length > 0, jnp.minimum(distance, 2 * radius), 2 * radius)
    distance = jnp.where(nothing, norm(u + mu), distance)
    limit = (1 + c) * centre
    return jnp.where(radius > 0, distance / jnp.where(limit > 0, limit, 1), 0 * least)
