"""Repeat a search if its weights are so large that rounding decided the result.

Near a Pareto-stationary point the dual cone is thin. If it contains only 0, the
projection is a combination of the gradients that vanishes. Its weights are of the order
of 1 / (the smallest share in such a combination). Rounding widens the cone, so a search
that starts at small weights stops before it gets there.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxjd._numerics import matmul
from jaxjd._sharding import varying
from jaxjd.solvers._face_cg import FaceCG
from jaxjd.solvers._implicit import Solver

_MAX_SEARCHES, _GROWTH = 5, 32


class _Searches(NamedTuple):
    best: FaceCG
    gradient2: Float[Array, " k"]  # Squared norm of C (b + x) for the best x.
    rows: Bool[Array, " k"]  # Those to search (again).
    start: Float[Array, "k m"]
    count: Int[Array, ""]


def restarted(solver: Solver, *, tolerance: float) -> Solver:
    """Make a solver search again from larger weights, in the few rows that need it.

    In these rows the squared norm of the update is below the rounding that its weights
    cause, but its projection onto some gradient is not. The combination of the
    gradients by these weights nearly vanishes. So a multiple of the weights changes the
    update little, and is far from the bounds that stopped the first search.
    """

    def solve(C, b, x0) -> FaceCG:
        k, m = b.shape
        eps = float(jnp.finfo(C.dtype).eps)

        def search(s: _Searches) -> _Searches:
            # A row of zeros ends at once.
            rows = s.rows[:, None]
            new = solver(C, jnp.where(rows, b, 0), jnp.where(rows, s.start, 0))
            z = jnp.where(rows, b + new.x, 0)
            y = matmul(z, C)
            size2, gradient2 = _square(z), _square(y)
            better = s.rows & (gradient2 < s.gradient2)
            x = jnp.where(better[:, None], new.x, s.best.x)
            noise2 = eps * m**0.5 * size2
            update2 = jnp.sum(z * y, axis=-1)
            # If one row needs it, those close to needing it search again, too.
            again = (update2 <= 512 * noise2) & jnp.any(update2 <= 32 * noise2)
            again &= s.rows & (gradient2 > (16 * tolerance) ** 2 * size2)
            # A search that did not help, or reached its limit, is not repeated.
            again &= (gradient2 < s.gradient2 / 2) & new.finished
            return _Searches(
                best=FaceCG(
                    x,
                    jnp.where(better, new.finished, s.best.finished),
                    s.best.iterations + new.iterations,
                ),
                gradient2=jnp.where(better, gradient2, s.gradient2),
                rows=again,
                start=_GROWTH * x,
                count=s.count + 1,
            )

        def unfinished(s: _Searches):
            return jnp.any(s.rows) & (s.count < _MAX_SEARCHES)

        begin = _Searches(
            best=FaceCG(x0, jnp.zeros(k, bool), jnp.zeros((), jnp.int32)),
            gradient2=jnp.full(k, jnp.inf, C.dtype),
            rows=jnp.ones(k, bool),
            start=x0,
            count=jnp.zeros((), jnp.int32),
        )
        return lax.while_loop(unfinished, search, varying(begin, C, b)).best

    return solve


def _square(rows: Float[Array, "k m"]) -> Float[Array, " k"]:
    return jnp.sum(jnp.square(rows), axis=-1)
