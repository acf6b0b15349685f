"""Find the weights that give every loss its fair share of the progress."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import cho_factor, cho_solve
from jaxtyping import Array, Bool, Float

from jaxjd._checks import check_gramian, check_max_iterations, check_number
from jaxjd._numerics import all_finite, like, matmul, symmetric_part, unit_diagonal
from jaxjd._sharding import on_every_device, varying
from jaxjd.solvers._certificate import Certificate, certificate, rounding
from jaxjd.solvers._face_cg import default_ridge


class Bargain(NamedTuple):
    """What [`jaxjd.solvers.bargain`][] returns."""

    solution: Float[Array, " m"]
    """The weights."""
    certificate: Certificate
    """How close the update is to that of the solution, relative to its own norm.
    Infinite at a Pareto-stationary point: there is no solution, and the weights are
    those of a Gramian with a ridge of the order of rounding."""


@on_every_device
def bargain(
    gramian: Float[Array, "m m"],
    *,
    alpha: float | Float[Array, ""] = 1.0,
    mask: Bool[Array, " m"] | None = None,
    max_iterations: int = 100,
) -> Bargain:
    r"""Solve $(Gw)_i = w_i^{-1/\alpha}$, $w \succ 0$.

    Along the update $J^\top w$ a loss with a smaller weight makes more progress,
    $(Gw)_i$. The equations are the optimality conditions for the minimum of the convex
    function

    $$\tfrac12 w^\top G w - \sum_i \psi(w_i), \qquad \psi'(w) = w^{-1/\alpha}$$

    Newton's method with a line search finds it, in coordinates in which the gradients
    have norm 1 and the solution for orthogonal gradients is 1. The minimum exists, and
    is unique, unless a combination of the gradients with nonnegative weights, not all
    zero, vanishes.

    **Arguments:**

    - `gramian`: $G = J J^\top$, symmetric positive semidefinite, which is not checked.
      Types narrower than float32 are solved in float32.
    - `alpha`: in (0, inf). 1 is Nash's bargaining solution.
    - `mask`: False for losses that are left out. Their weight is 0, as is that of a
      loss whose gradient is zero, because no update can help it.
    - `max_iterations`: the largest number of Newton steps.

    **Returns:** the weights and how well they solve the equations. NaN or infinity in G
    gives NaN.

    **Raises:** `ValueError` or `TypeError` if `gramian` is not a square matrix of real
    floats, `mask` does not have one entry per row of it, `alpha` is not positive or
    `max_iterations` is below 1.

    **Reference:** Navon et al. (2022), arXiv:2202.01017, equation 2, for $\alpha = 1$;
    Ban & Ji (2024), arXiv:2402.15638, equation 4.

    **Example:**

    >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    >>> weights = jaxjd.solvers.bargain(J @ J.T).solution
    >>> weights * (J @ J.T @ weights)
    Array([1., 1.], dtype=float32)
    """
    G = check_gramian(gramian)
    check_max_iterations(max_iterations)
    alpha = check_number("alpha", alpha, "(0, inf)")
    m = G.shape[0]
    if mask is not None:
        if jnp.shape(mask) != (m,):
            raise ValueError(f"`mask` must have shape ({m},). Got {jnp.shape(mask)}.")
        mask = jnp.asarray(mask)
        G = jnp.where(mask[:, None] & mask[None, :], G, 0)
    power = like(1 / alpha, G)
    solved = _bargain(*lax.stop_gradient((G, power)), max_iterations=max_iterations)
    return solved._replace(solution=_with_derivative(G, power, solved.solution))


@jax.custom_jvp
def _with_derivative(G, power, w):
    r"""Give weights that solve $Gw = w^{-p}$ the derivative that this implies.

    Differentiating, $(G + p \operatorname{diag}(w^{-p-1})) dw = -dG w - w^{-p} \log(w)
    dp$. It is solved in the unknowns $dw / r$ with $r = w^{(1 + p) / 2}$, in which the
    matrix is $\operatorname{diag}(r) G \operatorname{diag}(r) + p I$.
    """
    del G, power
    return w


@_with_derivative.defjvp
def _derivative(primals, tangents):
    G, power, _ = primals
    change, change_of_power, _ = tangents
    w = _with_derivative(*primals)
    present = w != 0
    safe = jnp.where(present, w, 1)
    r = jnp.where(present, safe ** ((1 + power) / 2), 0)
    matrix = r[:, None] * G * r[None] + power * jnp.eye(len(w), dtype=w.dtype)
    force = r * matmul(symmetric_part(change), w)
    force += safe ** ((1 - power) / 2) * jnp.log(safe) * change_of_power
    return w, -r * cho_solve(cho_factor(matrix), force)


@functools.partial(jax.jit, static_argnames=("max_iterations",))
def _bargain(
    G: Float[Array, "m m"], power: float | Float[Array, ""], *, max_iterations: int
) -> Bargain:
    m, dtype = G.shape[0], G.dtype
    # The equations scale: for s G the solution is s^(-1 / (1 + power)) w.
    largest = jnp.max(jnp.diagonal(G))
    scaled = unit_diagonal(G / jnp.where(largest > 0, largest, 1))
    present = scaled.norms > 0
    C = scaled.C + default_ridge(m, dtype) * jnp.eye(m, dtype=dtype)
    norms = jnp.where(present, scaled.norms, 1)

    # With w = w0 z, where w0 solves the equations for orthogonal gradients, and the
    # step of z measured in units of q, the Hessian is C + power diag(z^(-power - 1)).
    log_w0 = -2 / (1 + power) * jnp.log(norms)
    q = norms * jnp.exp(log_w0)

    def forces(z):
        """What each loss lacks of its share, in the coordinates of C."""
        return jnp.where(present, q * z**-power - matmul(C, q * z), 0)

    def hessian(z):
        return C + jnp.diag(jnp.where(present, power * z ** (-power - 1), 1))

    def step(carry):
        z, force, iterations, _ = carry
        direction = cho_solve(cho_factor(hessian(z)), force) / q
        slope = jnp.sum(force * direction * q)
        # Every weight keeps at least a hundredth of its value. Then halve the step
        # while the function rises steeply at its end: by convexity, the slope decides.
        shrinking = jnp.min(jnp.where(direction < 0, z / -direction, jnp.inf))
        length = jnp.minimum(1, 0.99 * shrinking).astype(dtype)

        def overshoots(search):
            length, halvings = search
            ahead = jnp.sum(forces(z + length * direction) * direction * q)
            return (ahead < -slope / 2) & (halvings < 30)

        def halve(search):
            return search[0] / 2, search[1] + 1

        length, _ = lax.while_loop(overshoots, halve, varying((length, 0), z))
        new = z + length * direction
        change = jnp.max(jnp.where(present, jnp.abs(length * direction) / z, 0))
        return new, forces(new), iterations + 1, change

    eps = float(jnp.finfo(dtype).eps)

    def unfinished(carry):
        _, _, iterations, change = carry
        return (iterations < max_iterations) & (change > 8 * eps)

    start = jnp.ones(m, dtype)
    begin = (start, forces(start), jnp.zeros((), jnp.int32), jnp.array(jnp.inf, dtype))
    z, _, iterations, _ = lax.while_loop(unfinished, step, varying(begin, G))

    def lacking(z):
        """What each loss lacks of its share, relative to it, without the ridge."""
        share = matmul(scaled.C, q * z) * z**power / q
        return jnp.where(present, 1 - share, 0)

    def residual_of(z):
        worst = jnp.max(jnp.abs(lacking(z)))
        return jnp.where(jnp.all(z > 0), worst, jnp.inf)

    # One step of refinement removes the effect of the ridge, if there is a solution.
    force = q * z**-power * lacking(z)
    refined = z + cho_solve(cho_factor(hessian(z)), force) / q
    z = jnp.where(residual_of(refined) < residual_of(z), refined, z)

    w = jnp.where(present, z * jnp.exp(log_w0), 0)
    residual = _residual(*lax.stop_gradient((lacking(z), z, q, present)), power=power)
    valid = all_finite(G)
    w *= jnp.where(largest > 0, largest, 1) ** (-1 / (1 + power))
    # Newton's method counts as finished at its limit, too: rounding may keep it moving.
    proof = certificate(jnp.where(valid, residual, jnp.nan), iterations, valid)
    return Bargain(jnp.where(valid, w, jnp.nan), proof)


def _residual(
    lacking: Float[Array, " m"],
    z: Float[Array, " m"],
    q: Float[Array, " m"],
    present: Bool[Array, " m"],
    *,
    power: float | Float[Array, ""],
) -> Float[Array, ""]:
    r"""Bound the distance to the solution, from what each loss lacks of its share.

    With $s_i = w_i^{-p}$, $p = 1 / \alpha$, the gradient of the function to minimise is
    $(Gw)_i - s_i = -\ell_i s_i$. As both its terms are convex,

    $$\|d - d^*\|^2 \leq \sum_i \bigl(-\ell_i s_i - (w_i^{*-p} - s_i)\bigr)
      (w_i - w_i^*) = \sum_i s_i w_i (1 - t_i) (1 - \ell_i - t_i^{-p})$$

    with $t_i = w_i^* / w_i$. The largest value of a term over all $t_i$ is at most
    $\ell_i \delta_i / 4$, where $\delta_i = (1 - \ell_i)^{-\alpha} - 1$ for a positive
    $\ell_i$ and $\alpha \ell_i$ for a negative one, by the convexity of $t^{-p}$. And
    $\|d\|^2 = \sum_i s_i w_i (1 - \ell_i)$.
    """
    # Sums of products as large as |q z| are rounded.
    noise = rounding(jnp.where(present, q * z, 0)) * z**power / q
    upper = lacking + noise
    below = upper < 1
    delta = jnp.where(below, 1 - upper, 1) ** (-1 / power) - 1
    positive = jnp.where(below, upper * delta, jnp.inf)
    negative = jnp.square(jnp.minimum(lacking - noise, 0)) / power
    parts = jnp.where(present, q * q * z ** (1 - power), 0)
    terms = jnp.where(present, jnp.maximum(positive, negative), 0) * parts / 4
    squared = jnp.sum(parts * (1 - lacking))
    known = (squared > 0) & jnp.all(~present | (z > 0))
    ratio = jnp.sum(terms) / jnp.where(known, squared, 1)
    none = ~jnp.any(present)
    return jnp.where(none, 0, jnp.where(known, jnp.sqrt(ratio), jnp.inf))
