"""Differentiate a projection with respect to its Gramian and its bounds."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxjd._numerics import matmul
from jaxjd._sharding import varying
from jaxjd.solvers._face_cg import FaceCG, default_ridge

Solver = Callable[[Array, Array, Array], FaceCG]


def differentiable(solver: Solver) -> Solver:
    r"""Give a solver of $x \succeq 0 \perp C(b + x) \succeq 0$ its derivative.

    Let $z = b + x$, F the set where $x > 0$, and N the others. As long as F does not
    change, $z_N = b_N$ and $(Cz)_F = 0$. Differentiating,
    $C_{FF}\, dz_F = -(dC\, z)_F - C_{FN}\, db_N$. So for a cotangent $\bar x$, with
    $C_{FF} \lambda_F = \bar x_F$ and $\lambda = 0$ outside F,

    $$\bar C = -\tfrac12 (\lambda z^\top + z \lambda^\top), \quad
      \bar b_N = -(C \lambda)_N, \quad \bar b_F = -\bar x_F,$$

    the last because $x = z - b$. If strict complementarity fails (an index has
    $x = 0$ and $y = 0$), x has no derivative, and this is one of its one-sided limits.
    If $C_{FF}$ is singular, x is not unique, and this is the derivative of the solution
    that a proximal term of the order of rounding selects.
    """

    @jax.custom_vjp
    def solve(C, b, x0):
        return solver(C, b, x0)

    def forward(C, b, x0):
        result = solver(C, b, x0)
        return result, (C, b, result.x)

    def backward(residuals, cotangents):
        C, b, x = residuals
        face = x > 0
        cotangent = cotangents.x
        adjoint = _solve_on_face(C, face, jnp.where(face, cotangent, 0))
        outer = matmul(adjoint.T, b + x)
        C_bar = -(outer + outer.T) / 2
        b_bar = jnp.where(face, -cotangent, -matmul(adjoint, C))
        # The solution does not depend on the starting point.
        return C_bar, b_bar, jnp.zeros_like(x)

    solve.defvjp(forward, backward)
    return solve


class _Search(NamedTuple):
    solution: Float[Array, "k m"]
    residual: Float[Array, "k m"]
    direction: Float[Array, "k m"]
    squared: Float[Array, " k"]
    iterations: Int[Array, ""]


def _solve_on_face(
    C: Float[Array, "m m"], face: Bool[Array, "k m"], rhs: Float[Array, "k m"]
) -> Float[Array, "k m"]:
    """Solve `C_FF s_F = rhs_F` for each row by conjugate gradients, 0 outside F."""
    m = C.shape[-1]
    eps = float(jnp.finfo(C.dtype).eps)
    ridge = default_ridge(m, C.dtype)
    goal = (4 * eps) ** 2 * jnp.sum(jnp.square(rhs), axis=-1)

    def step(s: _Search) -> _Search:
        product = jnp.where(face, matmul(s.direction, C) + ridge * s.direction, 0)
        curvature = jnp.sum(s.direction * product, axis=-1)
        usable = (s.squared > goal) & (curvature > 0)
        length = jnp.where(usable, s.squared / jnp.where(usable, curvature, 1), 0)
        solution = s.solution + length[:, None] * s.direction
        residual = s.residual - length[:, None] * product
        squared = jnp.where(usable, jnp.sum(jnp.square(residual), axis=-1), 0)
        ratio = jnp.where(usable, squared / jnp.where(usable, s.squared, 1), 0)
        direction = residual + ratio[:, None] * s.direction
        direction = jnp.where(usable[:, None], direction, 0)
        return _Search(solution, residual, direction, squared, s.iterations + 1)

    def unfinished(s: _Search):
        # Rounding can cost conjugate gradients a few times their m iterations.
        return (s.iterations < 4 * m + 20) & jnp.any(s.squared > goal)

    start = _Search(
        solution=jnp.zeros_like(rhs),
        residual=rhs,
        direction=rhs,
        squared=jnp.sum(jnp.square(rhs), axis=-1),
        iterations=jnp.zeros((), jnp.int32),
    )
    return lax.while_loop(unfinished, step, varying(start, C, rhs)).solution
