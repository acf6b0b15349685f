"""Solve projections by accelerated projected gradient, the plain method."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxjd._numerics import matmul
from jaxjd._sharding import varying
from jaxjd.solvers._face_cg import FaceCG


class _Iterate(NamedTuple):
    x: Float[Array, "k m"]
    ahead: Float[Array, "k m"]  # x, extrapolated.
    momentum: Float[Array, " k"]
    done: Bool[Array, " k"]
    iterations: Int[Array, ""]


def largest_eigenvalue_bound(C: Float[Array, "m m"]) -> Float[Array, ""]:
    """Bound the largest eigenvalue of C from above, by three matrix products.

    The bound is the Frobenius norm of C^8, to the power of 1/8. It exceeds the largest
    eigenvalue by a factor of at most m^(1/16).
    """
    # After scaling by the trace, no power overflows.
    trace = jnp.maximum(jnp.trace(C), jnp.finfo(C.dtype).tiny)
    power = C / trace
    for _ in range(3):
        power = matmul(power, power)
    return trace * jnp.sum(jnp.square(power)) ** (1 / 16)


def apg(
    C: Float[Array, "m m"],
    b: Float[Array, "k m"],
    x0: Float[Array, "k m"],
    *,
    tolerance: float,
    max_iterations: int,
) -> FaceCG:
    r"""Solve $x \succeq 0$, $y = C(b + x) \succeq 0$, $x \circ y = 0$ for each row b.

    This takes projected gradient steps with Nesterov's momentum, which a row resets
    whenever it points uphill. It needs many times more iterations than `face_cg`, but
    makes no decision that could go wrong. The arguments and the result are those of
    `face_cg`, without the ridge.

    **Reference:** Beck & Teboulle (2009), SIAM J. Imaging Sci. 2(1); O'Donoghue &
    Candès (2015), Found. Comput. Math. 15, section 3.2, for the restart.
    """
    bound = largest_eigenvalue_bound(C)
    rate = 1 / jnp.where(bound > 0, bound, 1)

    def step(s: _Iterate) -> _Iterate:
        gradient = matmul(b + s.ahead, C)
        x = jnp.maximum(s.ahead - rate * gradient, 0)
        moved = x - s.x
        restart = jnp.sum((s.ahead - x) * moved, axis=-1) > 0
        momentum = jnp.where(restart, 1, (1 + jnp.sqrt(1 + 4 * s.momentum**2)) / 2)
        weight = jnp.where(restart, 0, (s.momentum - 1) / momentum)
        # The step, divided by the rate, is the KKT residual at `ahead`.
        residual2 = jnp.sum(jnp.square((s.ahead - x) / rate), axis=-1)
        done = s.done | (residual2 <= tolerance**2) | ~jnp.isfinite(residual2)
        keep = s.done[:, None]
        return _Iterate(
            x=jnp.where(keep, s.x, x),
            ahead=jnp.where(keep, s.ahead, x + weight[:, None] * moved),
            momentum=momentum,
            done=done,
            iterations=s.iterations + 1,
        )

    def unfinished(s: _Iterate):
        return (s.iterations < max_iterations) & ~jnp.all(s.done)

    k = x0.shape[0]
    start = _Iterate(
        x=x0,
        ahead=x0,
        momentum=jnp.ones(k, C.dtype),
        done=jnp.zeros(k, bool),
        iterations=jnp.zeros((), jnp.int32),
    )
    end = lax.while_loop(unfinished, step, varying(start, C, b))
    return FaceCG(end.x, end.done, end.iterations)
