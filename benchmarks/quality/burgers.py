r"""Burgers' equation by a physics-informed network: residual, initial, boundary loss.

$u_t + u u_x = \nu u_{xx}$ on $[-1, 1]$ for $0 \leq t \leq 1$, with $\nu = 0.01 / \pi$,
$u(0, x) = -\sin \pi x$ and $u(t, \pm 1) = 0$ (Raissi et al., 2019, doi
10.1016/j.jcp.2018.10.045). The solution becomes steep at $x = 0$.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from benchmarks.quality._networks import Layers, dense_layers, tanh_network
from benchmarks.quality._problem import Measure, Problem

VISCOSITY = 0.01 / np.pi
INSIDE, EDGE = 128, 32  # Points in a batch: inside, and on each of the two edges.


def solution(
    t: Float[np.ndarray, " n"], x: Float[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
    r"""The solution, from the heat equation that Cole and Hopf turn this one into.

    $u = -\int \sin(\pi (x - \eta)) f(x - \eta) e^{-\eta^2 / 4 \nu t} d\eta / \int f(x
    - \eta) e^{-\eta^2 / 4 \nu t} d\eta$ with $f(y) = e^{-\cos(\pi y) / 2 \pi \nu}$, by
    Gauss-Hermite quadrature.
    """
    nodes, weights = np.polynomial.hermite.hermgauss(200)
    y = x[:, None] - 2 * np.sqrt(VISCOSITY * t)[:, None] * nodes
    f = weights * np.exp(-np.cos(np.pi * y) / (2 * np.pi * VISCOSITY))
    return -(np.sin(np.pi * y) * f).sum(1) / f.sum(1)


def network(layers: Layers, t: Float[Array, " n"], x: Float[Array, " n"]) -> Array:
    return tanh_network(layers, jnp.stack([2 * t - 1, x], axis=-1))[..., 0]


def residual(
    layers: Layers, t: Float[Array, " n"], x: Float[Array, " n"]
) -> Float[Array, " n"]:
    """How far the network is from solving the equation at each point."""
    ones = jnp.ones_like(x)

    def with_slope(x):
        return jax.jvp(lambda x: network(layers, t, x), (x,), (ones,))

    (u, slope), (_, curvature) = jax.jvp(with_slope, (x,), (ones,))
    _, speed = jax.jvp(lambda t: network(layers, t, x), (t,), (ones,))
    return speed + u * slope - VISCOSITY * curvature


def losses(
    layers: Layers,
    inside: Float[Array, "2 n"],
    initial: Float[Array, " e"],
    boundary: Float[Array, "2 e"],
) -> dict[str, Float[Array, ""]]:
    start = network(layers, jnp.zeros_like(initial), initial)
    return {
        "residual": jnp.mean(residual(layers, *inside) ** 2),
        "initial": jnp.mean((start + jnp.sin(jnp.pi * initial)) ** 2),
        "boundary": jnp.mean(network(layers, *boundary) ** 2),
    }


def batch(key: Key[Array, ""]) -> tuple[Array, ...]:
    of_inside, of_initial, of_time = jax.random.split(key, 3)
    t, x = jax.random.uniform(of_inside, (2, INSIDE))
    sides = jnp.tile(jnp.array([-1.0, 1.0]), EDGE // 2)
    return (
        jnp.stack([t, 2 * x - 1]),
        jax.random.uniform(of_initial, (EDGE,), minval=-1, maxval=1),
        jnp.stack([jax.random.uniform(of_time, (EDGE,)), sides]),
    )


def problem() -> Problem:
    # Both grids have points next to the steep front at x = 0, and none in common.
    grids = {}
    for name, columns in (("validation", 60), ("error", 81)):
        t, x = np.meshgrid(np.linspace(0.05, 1, 20), np.linspace(-1, 1, columns))
        t, x = t.ravel(), x.ravel()
        grids[name] = [np.float32(a) for a in (t, x, solution(t, x))]

    def measure(layers):
        return {
            name: jnp.linalg.norm(network(layers, t, x) - u) / jnp.linalg.norm(u)
            for name, (t, x, u) in grids.items()
        }

    return Problem(
        title="Burgers' equation, physics-informed",
        num_losses=3,
        steps=1500,
        rates=(3e-3, 1e-2, 3e-2, 1e-1),
        init=lambda key: dense_layers(key, (2, 20, 20, 20, 1)),
        batch=batch,
        losses=losses,
        measure=measure,
        measures={"error": Measure("relative L2 error")},
        equal_time=True,
    )
