r"""The 2-D Helmholtz equation by a physics-informed network: residual, boundary loss.

$\Delta u + u = f$ on $[-1, 1]^2$ with $u = 0$ at the boundary (Wang et al., 2021,
arXiv:2001.04536). The solution is made first, $u = \sin(\pi x) \sin(2 \pi y)$, and $f$
from it. In the paper it has four waves along y, for which so small a network needs many
more steps. The residual loss starts from about 600 and the boundary loss below 1.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from benchmarks.quality._networks import Layers, dense_layers, tanh_network
from benchmarks.quality._problem import Measure, Problem

WAVES = (1, 2)
INSIDE, EDGE = 128, 16  # Points in a batch: inside, and on each of the four edges.


def solution(x: Float[Array, " n"], y: Float[Array, " n"]) -> Float[Array, " n"]:
    a, b = WAVES
    return jnp.sin(a * jnp.pi * x) * jnp.sin(b * jnp.pi * y)


def source(x: Float[Array, " n"], y: Float[Array, " n"]) -> Float[Array, " n"]:
    """The right-hand side of the equation."""
    a, b = WAVES
    return (1 - (a**2 + b**2) * jnp.pi**2) * solution(x, y)


def residual(u, x: Float[Array, " n"], y: Float[Array, " n"]) -> Float[Array, " n"]:
    """How far a function of x and y is from solving the equation at each point."""
    ones = jnp.ones_like(x)

    def curvature(function, at):
        def slope(at):
            return jax.jvp(function, (at,), (ones,))[1]

        return jax.jvp(slope, (at,), (ones,))[1]

    laplacian = curvature(lambda x: u(x, y), x) + curvature(lambda y: u(x, y), y)
    return laplacian + u(x, y) - source(x, y)


def network(layers: Layers, x: Float[Array, " n"], y: Float[Array, " n"]) -> Array:
    return tanh_network(layers, jnp.stack([x, y], axis=-1))[..., 0]


def losses(
    layers: Layers, inside: Float[Array, "2 n"], boundary: Float[Array, "2 e"]
) -> dict[str, Float[Array, ""]]:
    def u(x, y):
        return network(layers, x, y)

    return {
        "residual": jnp.mean(residual(u, *inside) ** 2),
        "boundary": jnp.mean(u(*boundary) ** 2),
    }


def batch(key: Key[Array, ""]) -> tuple[Array, Array]:
    of_inside, of_boundary = jax.random.split(key)
    inside = jax.random.uniform(of_inside, (2, INSIDE), minval=-1, maxval=1)
    along = jax.random.uniform(of_boundary, (4, EDGE), minval=-1, maxval=1)
    ends = jnp.broadcast_to(jnp.array([[-1.0], [1.0]]), (2, EDGE))
    x = jnp.concatenate([ends, along[:2]]).ravel()
    y = jnp.concatenate([along[2:], ends]).ravel()
    return inside, jnp.stack([x, y])


def problem() -> Problem:
    grids = {}
    for name, size in (("validation", 40), ("error", 51)):
        line = jnp.linspace(-1, 1, size)
        x, y = (z.ravel() for z in jnp.meshgrid(line, line))
        grids[name] = x, y, solution(x, y)

    def measure(layers):
        return {
            name: jnp.linalg.norm(network(layers, x, y) - u) / jnp.linalg.norm(u)
            for name, (x, y, u) in grids.items()
        }

    return Problem(
        title="Helmholtz' equation, physics-informed",
        num_losses=2,
        steps=1500,
        rates=(3e-3, 1e-2, 3e-2, 1e-1),
        init=lambda key: dense_layers(key, (2, 20, 20, 20, 1)),
        batch=batch,
        losses=losses,
        measure=measure,
        measures={"error": Measure("relative L2 error")},
        equal_time=True,
    )
