"""MGDA: take the shortest convex combination of the gradients."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxjd._checks import check_integer, known
from jaxjd._numerics import finite_or_nan, matmul
from jaxjd._sharding import on_every_device, varying
from jaxjd.solvers import minimise_on_simplex
from jaxjd.weighting._certified import certified
from jaxjd.weighting._preference import mean_weights
from jaxjd.weighting._weighting import Weighting, stateless


def mgda(
    *, frank_wolfe_steps: int | None = None, certificate: bool = False
) -> Weighting:
    r"""Weights of MGDA, the multiple-gradient descent algorithm.

    $w = \operatorname{argmin} \|J^\top w\|$ over $w \succeq 0$ with $\sum_i w_i = 1$.
    The update is the shortest vector of the convex hull of the gradients. It conflicts
    with no loss, and is zero if and only if the point is Pareto-stationary. A loss
    whose gradient is zero makes it zero.

    **Arguments:**

    - `frank_wolfe_steps`: if given, the problem is not solved exactly, but by at most
      that many steps of the Frank-Wolfe method, which stops when a step is shorter than
      1e-3. 100 gives TorchJD's weights, which are within about 1 % of the exact ones.
    - `certificate`: whether the state keeps the [`jaxjd.solvers.Certificate`][] of the
      last step. `optax.tree.get(opt_state, "certificate")` finds it.

    **Raises:** `ValueError` or `TypeError` if `frank_wolfe_steps` is not a positive
    integer, or is given together with `certificate`, because Frank-Wolfe steps have no
    certificate.

    **Reference:** Désidéri (2012), Comptes Rendus Math. 350, section 2; Sener & Koltun
    (2018), arXiv:1810.04650, algorithm 2, for the Frank-Wolfe method.

    **Example:**

    >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    >>> jaxjd.weighting.mgda()(J @ J.T)
    Array([0.6, 0.4], dtype=float32)
    """
    if frank_wolfe_steps is None:

        def mgda_weights(gramian, mask, state, _):
            found = minimise_on_simplex(gramian, mask=mask)
            return found.solution, state, found.certificate

        return certified(on_every_device(mgda_weights), certificate=certificate)

    steps = known(
        "frank_wolfe_steps",
        check_integer("frank_wolfe_steps", frank_wolfe_steps, least=1),
    )
    if certificate:
        raise ValueError(
            "`certificate` must be False if `frank_wolfe_steps` is given: these steps "
            "have no certificate."
        )
    return stateless(
        on_every_device(lambda gramian, mask: _frank_wolfe(gramian, mask, steps))
    )


class _Walk(NamedTuple):
    weights: Float[Array, " m"]
    steps: Int[Array, ""]
    length: Float[Array, ""]  # Of the last step. 1 before the first.


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
@functools.partial(jax.jit, static_argnums=(2,))
def _frank_wolfe(
    gramian: Float[Array, "m m"], mask: Bool[Array, " m"], steps: int
) -> Float[Array, " m"]:
    """The weights after the given number of steps, or after the first short one."""

    def unfinished(walk: _Walk):
        return (walk.steps < steps) & _long(walk)

    def step(walk: _Walk):
        return _step(gramian, mask, walk)

    end = lax.while_loop(unfinished, step, _start(gramian, mask))
    return finite_or_nan(gramian, jnp.where(mask, end.weights, 0))


@_frank_wolfe.defjvp
def _derivative(steps, primals, tangents):
    # Differentiate the steps themselves, because a while loop cannot be differentiated
    # in reverse mode.
    gramian, mask = primals

    def all_steps(gramian):
        def step(walk: _Walk, _):
            new = _step(gramian, mask, walk)
            return jax.tree.map(
                functools.partial(jnp.where, _long(walk)), new, walk
            ), ()

        end, _ = lax.scan(step, _start(gramian, mask), length=steps)
        return finite_or_nan(gramian, jnp.where(mask, end.weights, 0))

    return jax.jvp(all_steps, (gramian,), tangents[:1])


def _start(gramian: Float[Array, "m m"], mask: Bool[Array, " m"]) -> _Walk:
    start = _Walk(
        mean_weights(gramian, mask),
        jnp.zeros((), jnp.int32),
        jnp.ones((), gramian.dtype),
    )
    return varying(start, gramian)


def _long(walk: _Walk) -> Bool[Array, ""]:
    return walk.length >= 1e-3


def _step(gramian: Float[Array, "m m"], mask: Bool[Array, " m"], walk: _Walk) -> _Walk:
    """Step towards the gradient of the worst-off loss, by exact line search."""
    weights = walk.weights
    slopes = matmul(gramian, weights)
    t = jnp.argmin(jnp.where(mask, slopes, jnp.inf))
    # The inner products of the combination and of gradient t with each other.
    a, b, c = slopes[t], jnp.vdot(weights, slopes), gramian[t, t]
    inside = (b - a) / jnp.where((c > a) & (b > a), b + c - 2 * a, 1)
    length = jnp.where(c <= a, 1.0, jnp.where(b <= a, 0.0, inside))
    length = length.astype(weights.dtype)
    weights = ((1 - length) * weights).at[t].add(length)
    return _Walk(weights, walk.steps + 1, length)
