"""Project onto the dual cone of the gradients, whatever their scales."""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Real

from jaxjd._checks import (
    check_choice,
    check_gramian,
    check_max_iterations,
    check_number,
)
from jaxjd._numerics import (
    add_noise,
    all_finite,
    matmul,
    normalise_and_regularise,
    unit_diagonal,
)
from jaxjd._sharding import replicated, rows_apart
from jaxjd.solvers._apg import apg
from jaxjd.solvers._certificate import (
    Certificate,
    certificate,
    distance_bound,
    rounding,
    smallest_cosine,
)
from jaxjd.solvers._face_cg import FaceCG, default_ridge, face_cg
from jaxjd.solvers._implicit import differentiable
from jaxjd.solvers._stationary import restarted


class DualConeProjection(NamedTuple):
    """What [`jaxjd.solvers.project_dual_cone`][] returns."""

    solution: Float[Array, "... m"]
    """The weights v of the projections."""
    certificate: Certificate
    r"""How close the updates are to the projections, relative to $\|J^\top u\|$, for
    each row of u."""


def project_dual_cone(
    u: Real[Array, "... m"],
    gramian: Float[Array, "m m"],
    *,
    noise_eps: float | Float[Array, ""] | None = None,
    norm_eps: float | Float[Array, ""] | None = None,
    reg_eps: float | Float[Array, ""] | None = None,
    initial: Float[Array, "... m"] | None = None,
    method: Literal["face_cg", "apg"] = "face_cg",
    max_iterations: int | None = None,
) -> DualConeProjection:
    r"""Project $J^\top u$ onto the dual cone of the rows of J, given their Gramian.

    For each row u, $v = \operatorname{argmin}_v v^\top G v$ subject to $v \succeq u$.
    $J^\top v$ is the vector closest to $J^\top u$ that conflicts with no row of J:
    $Gv \succeq 0$. All rows of u are solved together; an iteration is one matrix
    product, of u's shape by G.

    By default the exact problem is solved, in coordinates in which the gradients have
    norm 1, so neither the scale of G nor the spread of the norms matters. A ridge of
    $4 \sqrt m + m / 4$ units of rounding makes G definite, and proximal steps remove
    its effect. If G is singular, v need not be unique, but $J^\top v$ is. If a gradient
    is zero, $v_j = u_j$.

    Given `noise_eps`, gradients far below $n$ are ignored, where $n$ is `noise_eps`
    times the root mean square of the nonzero norms. Then $\|g_i\|^2$ becomes
    $\|g_i\|^2 + n^4 / (n^2 + \|g_i\|^2)$, as if $g_i$ had an extra component that is
    orthogonal to all others, so nothing conflicts with it. At ten times $n$ this adds a
    fraction of 1e-4 to the squared norm, at a thousand times 1e-12.

    Given `reg_eps`, G is replaced by
    $G / \operatorname{trace}(G) + \texttt{reg\_eps}\, I$. The result conflicts with
    gradients whose norm is small beside that of others. TorchJD's defaults are
    `norm_eps=1e-4, reg_eps=1e-4`. All three numbers may be traced. Their values are
    checked if they are known.

    The solution is differentiable in reverse mode with respect to `u` and `gramian`, by
    implicit differentiation. A derivative exists if no index has both $v_j = u_j$ and
    $(Gv)_j = 0$. The certificate is not differentiable.

    **Arguments:**

    - `u`: lower bounds of the weights, any number of rows, any sign.
    - `gramian`: $G = J J^\top$. Must be symmetric positive semidefinite; this is not
      checked. Float32 or float64, in which the problem is solved; narrower types are
      solved in float32.
    - `noise_eps`: the relative norm below which a gradient is ignored. `None` or 0: no
      gradient is ignored. Cannot be given together with `reg_eps`.
    - `norm_eps`: with `reg_eps`, the trace below which G counts as zero. `None` or 0:
      never.
    - `reg_eps`: the regularisation of the normalised Gramian. With 0, or a number below
      the precision, the solver may not converge on a singular G: leave it `None`.
    - `initial`: where to start, shaped like `u` or broadcast to it, such as the
      solution of a similar problem. It does not change the solution.
    - `method`: `"face_cg"`, or `"apg"`: accelerated projected gradient, the plain
      method, slower and less accurate.
    - `max_iterations`: by default 8,000 (`"apg"`: 20,000), for each search: near a
      Pareto-stationary point there are up to five. 40 in all are usual. The most seen
      were 11,665, on random Gramians of rank m / 2.

    **Returns:** v, shaped like `u`, in the precision of the solver, and its
    [`jaxjd.solvers.Certificate`][]. NaN or infinity in G gives NaN; in a row of u, NaN
    in this row.

    **Raises:** `ValueError` or `TypeError` if the last axis of `u` or the shape of
    `initial` does not fit a square `gramian` of real floats, an `eps` is not a
    nonnegative number, `norm_eps` comes without `reg_eps` or `noise_eps` with it,
    `method` is unknown or `max_iterations` is below 1.

    **Reference:** Quinton & Rey (2024), arXiv:2406.16232, Proposition 1.

    **Example:**

    >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    >>> projection = jaxjd.solvers.project_dual_cone(jnp.eye(2) / 2, J @ J.T)
    >>> projection.solution.sum(axis=0)  # The weights of UPGrad.
    Array([1.1111, 0.7895], dtype=float32)
    """
    weights, proof = projection(
        u,
        gramian,
        noise_eps=noise_eps,
        norm_eps=norm_eps,
        reg_eps=reg_eps,
        initial=initial,
        method=method,
        max_iterations=max_iterations,
        certified=True,
    )
    assert proof is not None
    return DualConeProjection(weights, proof)


def projection(
    u: Real[Array, "... m"],
    gramian: Float[Array, "m m"],
    *,
    noise_eps: float | Float[Array, ""] | None = None,
    norm_eps: float | Float[Array, ""] | None = None,
    reg_eps: float | Float[Array, ""] | None = None,
    initial: Float[Array, "... m"] | None = None,
    method: Literal["face_cg", "apg"] = "face_cg",
    max_iterations: int | None = None,
    certified: bool,
) -> tuple[Float[Array, "... m"], Certificate | None]:
    """`project_dual_cone`, without the certificate unless it is asked for.

    The certificate solves a problem of its own.
    """
    check_regularisation(noise_eps, norm_eps, reg_eps)
    G = check_gramian(gramian)
    m = G.shape[0]
    if jnp.ndim(u) == 0 or jnp.shape(u)[-1] != m:
        raise ValueError(
            f"`u` must have shape (..., {m}), as `gramian` has shape {G.shape}. "
            f"Got {jnp.shape(u)}."
        )
    if jnp.issubdtype(jnp.result_type(u), jnp.complexfloating):
        raise TypeError(f"`u` must be real. Got {jnp.result_type(u)}.")
    check_choice("method", method, ("face_cg", "apg"))
    check_max_iterations(max_iterations)
    shape = jnp.shape(u)
    u = jnp.asarray(u).astype(G.dtype).reshape(-1, m)
    if initial is not None:
        initial = _broadcast_initial(initial, shape).astype(G.dtype).reshape(-1, m)
    options = tuple(
        None if eps is None else jnp.asarray(eps).astype(G.dtype)
        for eps in (noise_eps, norm_eps, reg_eps)
    )

    def project(rows, shared):
        (u, initial), (G, *options) = rows, shared
        weights, solved = project_rows(
            u, G, initial, *options, method=method, max_iterations=max_iterations
        )
        return weights, _certify_rows(solved) if certified else None

    weights, proof = rows_apart(project, (u, initial), (G, *options), len(u))
    if len(shape) != 2:
        weights, proof = replicated((weights, proof))
        weights = weights.reshape(shape)
        proof = jax.tree.map(
            lambda a: a if a.ndim == 0 else a.reshape(shape[:-1]), proof
        )
    return weights, proof


class Solved(NamedTuple):
    """The problem of each row, in coordinates in which the gradients have norm 1."""

    C: Float[Array, "m m"]
    b: Float[Array, "k m"]
    result: FaceCG


@functools.partial(jax.jit, static_argnames=("method", "max_iterations"))
def project_rows(
    u: Float[Array, "k m"],
    G: Float[Array, "m m"],
    initial: Float[Array, "k m"] | None = None,
    noise_eps: Float[Array, ""] | None = None,
    norm_eps: Float[Array, ""] | None = None,
    reg_eps: Float[Array, ""] | None = None,
    *,
    method: Literal["face_cg", "apg"] = "face_cg",
    max_iterations: int | None = None,
) -> tuple[Float[Array, "k m"], Solved]:
    """Project rows given checked arguments: the weights, and what was solved."""
    m, dtype = G.shape[0], G.dtype

    # A regularised Gramian is definite. Any other needs the standing ridge.
    H, ridge = G, default_ridge(m, dtype)
    if reg_eps is not None:
        norm_eps = jnp.zeros((), dtype) if norm_eps is None else norm_eps
        H, ridge = normalise_and_regularise(G, norm_eps, reg_eps), 0.0
    scaled = unit_diagonal(H, constant_norms=True)
    if noise_eps is not None:
        scaled = add_noise(scaled, noise_eps)

    # Scale each row to a largest bound of 1: the solution is homogeneous in the bounds.
    b = u * scaled.norms[None, :]
    size = lax.stop_gradient(jnp.max(jnp.abs(b), axis=-1, keepdims=True))
    size = jnp.where(size == 0, 1, size)
    b = b / size
    # By default start from max(u, 0), which is feasible.
    x0 = jnp.maximum(-b, 0)
    if initial is not None:
        x0 = (initial - u) * scaled.norms[None, :] / size
        x0 = jnp.where(jnp.isfinite(x0), jnp.maximum(x0, 0), 0)

    tolerance = _tolerance(m, dtype)
    if method == "face_cg":
        solver = functools.partial(
            face_cg, ridge=ridge, max_iterations=max_iterations or 8_000
        )
    else:
        solver = functools.partial(apg, max_iterations=max_iterations or 20_000)
    solver = functools.partial(solver, tolerance=tolerance)
    if reg_eps is None:
        solver = restarted(solver, tolerance=tolerance)
    result = differentiable(solver)(scaled.C, b, lax.stop_gradient(x0))

    # Check here, because with m = 1 the solver has nothing to do and would not notice.
    valid = all_finite(G) & jnp.all(jnp.isfinite(u), axis=-1)
    x = jnp.where(valid[:, None], result.x, jnp.nan)
    v = u + x * size * scaled.inverse_norms[None, :]
    return v, Solved(scaled.C, b, result._replace(x=x))


def _tolerance(m: int, dtype) -> float:
    """The tolerance at which the last step is as large as the rounding of a product."""
    return 0.5 * float(jnp.finfo(dtype).eps) * m**0.5


def common_descent(C: Float[Array, "m m"]) -> Float[Array, ""]:
    """The largest cosine that a vector can have with every gradient, or 0.

    It is 0 if no vector has positive cosines with all of them. Otherwise the shortest
    convex combination of the unit gradients has it. This is found as in
    `least_distance`: give each unit gradient 1 as one more coordinate, so that its norm
    is sqrt(2), and project the last axis onto the dual cone of the longer gradients.
    """
    m, dtype = C.shape[0], C.dtype
    ones = (jnp.diagonal(C) > 0).astype(dtype)
    across = -ones * 0.5**0.5
    longer = jnp.block(
        [
            [jnp.ones((1, 1), dtype), across[None, :]],
            [across[:, None], (C + ones[:, None] * ones[None, :]) / 2],
        ]
    )
    b = jnp.zeros((1, m + 1), dtype).at[0, 0].set(1)
    found = face_cg(
        longer,
        b,
        jnp.zeros_like(b),
        ridge=default_ridge(m + 1, dtype),
        tolerance=_tolerance(m + 1, dtype),
        max_iterations=8_000,
    )
    return smallest_cosine(C, found.x[0, 1:])


@jax.jit
def _certify_rows(solved: Solved) -> Certificate:
    C, b, (x, finished, iterations) = lax.stop_gradient(solved)
    z = b + x
    y, at_start = matmul(z, C), matmul(b, C)
    noise = rounding(z)
    size2 = jnp.maximum(jnp.sum(b * at_start, axis=-1), 0)
    # Every feasible update is closer to the solution than to 0.
    length2 = jnp.sum(z * y, axis=-1) + noise * jnp.sum(jnp.abs(z), axis=-1)
    length = jnp.sqrt(jnp.maximum(length2, 0))
    distance = distance_bound(C, x, y, noise, common_descent(C), jnp.sqrt(size2))
    size = jnp.sqrt(jnp.where(size2 > 0, size2, 1))
    return certificate(jnp.minimum(distance, length) / size, iterations, finished)


def check_regularisation(
    noise_eps: float | Float[Array, ""] | None,
    norm_eps: float | Float[Array, ""] | None,
    reg_eps: float | Float[Array, ""] | None,
) -> None:
    """**Raises:** `ValueError` or `TypeError` as `project_dual_cone` does for these."""
    named = {"noise_eps": noise_eps, "norm_eps": norm_eps, "reg_eps": reg_eps}
    for name, value in named.items():
        if value is not None:
            check_number(name, value, "[0, inf)")
    if norm_eps is not None and reg_eps is None:
        raise ValueError(
            "`norm_eps` has no meaning without `reg_eps`: the default works at any "
            f"scale. Got norm_eps={norm_eps}; give `reg_eps` too, or neither."
        )
    if noise_eps is not None and reg_eps is not None:
        raise ValueError(
            "`noise_eps` and `reg_eps` are two rules of regularisation: give one of "
            f"them. Got noise_eps={noise_eps} and reg_eps={reg_eps}."
        )


def _broadcast_initial(initial, shape):
    try:
        return jnp.broadcast_to(jnp.asarray(initial), shape)
    except ValueError:
        raise ValueError(
            f"`initial` must be broadcastable to the shape of `u`, {shape}. "
            f"Got {jnp.shape(initial)}."
        ) from None
