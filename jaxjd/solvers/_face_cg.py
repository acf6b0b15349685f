"""Solve projections by an active-set method, with one matrix product per iteration."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxjd._numerics import matmul
from jaxjd._sharding import varying

# What a row does with the next product by C.
_EVALUATE, _DESCEND, _VERIFY, _DONE = 0, 1, 2, 3

# The first pivots of a row exchange every index whose sign is wrong, once the face is
# solved to half the size of the violations. Later pivots exchange only indices whose
# violation is at least a tenth of the worst, once the face is solved to a fifth of the
# violations. A row that is still not settled stalls: its proximal shift grows tenfold,
# and its tolerance doubles, up to sixteen times in all. Until the row stalls a second
# time, each proximal step that succeeds divides the shift by ten. These are heuristics,
# tuned on random Gramians of rank m / 2, the hardest, and on those of MNIST.
_EAGER_PIVOTS, _EAGER_ACCURACY = 4, 0.5
_MAX_PIVOTS, _CAREFUL_ACCURACY, _CAREFUL_SHARE = 12, 0.2, 0.1
_MAX_LOWERED, _MAX_LENIENCE = 2, 4
_LARGEST_SHIFT, _MAX_PROXIMAL_STEPS = 0.1, 50


class _Rows(NamedTuple):
    """The state of k problems of size m, which share C and move in lockstep."""

    z: Float[Array, "k m"]  # b + x
    y: Float[Array, "k m"]  # C z + shift (z - anchor)
    probe: Float[Array, "k m"]  # The direction to descend in, or z to evaluate y.
    anchor: Float[Array, "k m"]
    face: Bool[Array, "k m"]  # Where x is free and y is driven to 0.
    shift: Float[Array, " k"]
    mode: Int[Array, " k"]
    residual: Float[Array, " k"]  # Squared norm of y on the face.
    verified: Float[Array, " k"]  # Squared KKT residual when last verified.
    pivots: Int[Array, " k"]
    stalls: Int[Array, " k"]
    proximal_steps: Int[Array, " k"]
    iterations: Int[Array, ""]


class FaceCG(NamedTuple):
    """What `face_cg` returns."""

    x: Float[Array, "k m"]
    finished: Bool[Array, " k"]
    iterations: Int[Array, ""]


def default_ridge(m: int, dtype) -> float:
    """The shift of the unit diagonal that keeps C definite despite rounding.

    Rounding changes the eigenvalues of C by about eps sqrt(m) if the errors of its
    entries are independent, and by about eps m if they are alike, as for nearly opposed
    rows. With 128 and with 512 such rows, half of this shift failed.
    """
    return float(jnp.finfo(dtype).eps) * (4 * m**0.5 + m / 4)


def face_cg(
    C: Float[Array, "m m"],
    b: Float[Array, "k m"],
    x0: Float[Array, "k m"],
    *,
    ridge: float,
    tolerance: float,
    max_iterations: int,
) -> FaceCG:
    r"""Solve $x \succeq 0$, $y = C(b + x) \succeq 0$, $x \circ y = 0$ for each row b.

    These are the KKT conditions of $\min_z z^\top C z$ subject to $z \succeq b$. Each
    row guesses its face, the set where $x > 0$, minimises on the face by conjugate
    gradients, and exchanges the indices whose sign turns out wrong. This is a
    primal-dual active-set method. Its linear systems are solved only as accurately as
    the guess deserves. All rows move in lockstep, so an iteration is one product of
    [k, m] by [m, m].

    A row stops only on a freshly computed residual. It must be below `tolerance`, or,
    if rounding prevents that, no longer fall from one verification to the next.

    With `ridge > 0`, C may be singular. Each row then solves
    $\min z^\top C z + \text{ridge} \|x - a\|^2$ and moves the anchor $a$ to the
    solution until that changes nothing: the proximal point method (Rockafellar, 1976),
    whose limit does not depend on the ridge. A row that does not settle gets a larger
    shift for a while, whatever the `ridge`.

    **Arguments:**

    - `C`: positive semidefinite, its diagonal 1 (or 0: such entries of x stay 0).
    - `b`: rows whose largest entries are about 1.
    - `x0`: where to start, nonnegative.
    - `ridge`: the standing proximal shift, 0 if C is safely positive definite.
    - `tolerance`: the largest 2-norm of a row's KKT residual. If the norm of b + x is
      above 1, it is relative to that, as is the rounding of the product with C.
    - `max_iterations`: the largest number of products with C, for all rows together.

    **Returns:** x, which rows finished, and the iterations taken. A row that meets NaN
    or infinity stops and counts as finished.

    **Reference:** Kunisch & Rendl (2003), SIAM J. Optim. 14(1), for the exchange;
    Moré & Toraldo (1991), SIAM J. Optim. 1(1), for conjugate gradients on a face.
    """
    m = C.shape[-1]
    dtype = C.dtype
    tolerance2 = tolerance**2
    eps = float(jnp.finfo(dtype).eps)
    rounding = default_ridge(m, dtype)
    hard_shift = rounding**0.75

    # If the only nonzero entry of b is positive, the row projects a single gradient.
    # Then x stays 0 at this entry: `zᵀ C z >= 0` forces y to be nonnegative there.
    free = (b <= 0) | (jnp.sum(b != 0, axis=-1, keepdims=True) > 1)

    def split(face, z, y):
        """The gradient on the face, and the entries of the wrong sign."""
        violation = jnp.minimum(0, jnp.where(face, z - b, y))
        return jnp.where(face, y, 0), jnp.where(free, violation, 0)

    def start(z):
        y = matmul(z, C)
        face = free & ((z > b) | (y < 0))
        gradient, violation = split(face, z, y)
        residual = _square(gradient)
        total = residual + _square(violation)
        stop = (total <= tolerance2) | ~jnp.isfinite(total)
        zeros = jnp.zeros(z.shape[0], jnp.int32)
        return _Rows(
            z=z,
            y=y,
            probe=jnp.where(stop[:, None], 0, -gradient),
            anchor=z,
            face=face,
            shift=jnp.full(z.shape[0], ridge, dtype),
            mode=jnp.where(stop, _DONE, _DESCEND).astype(jnp.int32),
            residual=residual,
            verified=jnp.full(z.shape[0], jnp.inf, dtype),
            pivots=zeros,
            stalls=zeros,
            proximal_steps=zeros,
            iterations=jnp.zeros((), jnp.int32),
        )

    def is_settled(s: _Rows, size, goal):
        """Whether the solution of a shifted problem also solves the problem itself.

        The gradients of the two differ by `shift * moved`. Another proximal step is not
        worth it if this is within the goal; if this and the update are below rounding
        after a first step (a Pareto-stationary point); or if the shift is only the
        ridge, and its effect, of second order, is lost beside the squared norm of the
        update.
        """
        moved = s.z - s.anchor
        moved2 = _square(moved)
        update = jnp.sum(s.z * s.y, axis=-1)
        update -= s.shift * jnp.sum(s.z * moved, axis=-1)
        change2 = s.shift**2 * moved2
        standing, again = s.shift <= ridge, s.proximal_steps > 0
        return (
            (change2 <= goal)
            | (again & (change2 <= rounding**2 * size) & (update <= rounding * size))
            | (standing & (ridge * moved2 <= eps * update))
            | (standing & (ridge * size <= 0.3 * eps**0.5 * update))
            | (s.proximal_steps >= _MAX_PROXIMAL_STEPS)
        )

    def exchange(s: _Rows, violation, worst, pivot, move) -> _Rows:
        """Exchange the wrong signs of rows that pivot, and move anchors to solutions.

        A row that stalls before its first proximal step moves the anchor to where it
        is. One that stalls later goes back to its anchor, so the objective never rises
        from one anchor to the next.
        """
        share = jnp.where(s.pivots < _EAGER_PIVOTS, 0, _CAREFUL_SHARE).astype(dtype)
        threshold = jnp.where(pivot, share * worst, -jnp.inf)
        flip = (violation < 0) & (violation <= threshold[:, None])
        stall = pivot & (s.pivots >= _MAX_PIVOTS)
        back = stall & (s.proximal_steps > 0)
        here = (move | stall) & ~back
        z = jnp.where(flip | here[:, None], jnp.maximum(s.z, b), s.z)
        z = jnp.where(back[:, None], s.anchor, z)
        face = jnp.where(back[:, None], z > b, s.face ^ flip)
        anchor = jnp.where(here[:, None], z, s.anchor)
        raised = jnp.clip(10 * s.shift, hard_shift, _LARGEST_SHIFT)
        lowered = jnp.where(s.shift > 5 * hard_shift, s.shift / 10, ridge)
        lowered = jnp.where(s.stalls < _MAX_LOWERED, lowered, s.shift)
        shift = jnp.where(stall, raised, jnp.where(move, lowered, s.shift))
        return s._replace(
            z=z,
            anchor=anchor,
            face=face,
            shift=shift,
            pivots=jnp.where(move | stall, 0, s.pivots + pivot.astype(jnp.int32)),
            stalls=s.stalls + stall.astype(jnp.int32),
            proximal_steps=s.proximal_steps + move.astype(jnp.int32),
            verified=jnp.where(move | stall, jnp.inf, s.verified),
        )

    def step(s: _Rows) -> _Rows:
        descending, verifying = s.mode == _DESCEND, s.mode == _VERIFY
        fresh = (verifying | (s.mode == _EVALUATE))[:, None]

        # Finished rows have a probe of 0 and pass through unchanged.
        product = matmul(s.probe, C)
        product += s.shift[:, None] * jnp.where(fresh, s.z - s.anchor, s.probe)
        curvature = jnp.sum(s.probe * product, axis=-1)
        usable = descending & (curvature > 0)
        length = jnp.where(usable, s.residual / jnp.where(usable, curvature, 1), 0)
        z = s.z + length[:, None] * s.probe
        y = jnp.where(fresh, product, s.y + length[:, None] * product)

        gradient, violation = split(s.face, z, y)
        residual, violated, size = _square(gradient), _square(violation), _square(z)
        total = residual + violated
        goal = tolerance2 * jnp.maximum(1, size)
        lenience = 1 << 2 * jnp.minimum(s.stalls, _MAX_LENIENCE)
        goal *= lenience.astype(dtype)
        small = total <= goal
        broken = ~jnp.isfinite(total)
        solved = (fresh[:, 0] & small) | (verifying & (total > s.verified / 2))
        s = s._replace(z=z, y=y, verified=jnp.where(verifying, total, s.verified))
        careful = s.pivots >= _EAGER_PIVOTS
        accuracy = jnp.where(careful, _CAREFUL_ACCURACY**2, _EAGER_ACCURACY**2)
        pivot = descending & ~small & ~broken
        pivot &= residual <= jnp.maximum(accuracy.astype(dtype) * violated, goal / 4)

        # Only solved rows with a shift, and careful pivots, need these.
        settled, worst = lax.cond(
            jnp.any((solved & (s.shift > 0)) | (pivot & careful)),
            lambda: (is_settled(s, size, goal), jnp.min(violation, axis=-1)),
            lambda: (solved, jnp.zeros_like(residual)),
        )
        done = (s.mode == _DONE) | broken | (solved & settled)
        move = solved & ~settled & ~done

        mode = jnp.where(descending & small, _VERIFY, _DESCEND)
        mode = jnp.where(pivot | move, _EVALUATE, mode)
        mode = jnp.where(done, _DONE, mode).astype(jnp.int32)
        continued = descending & (s.residual > 0)
        ratio = jnp.where(continued, residual / jnp.where(continued, s.residual, 1), 0)

        after = exchange(s, violation, worst, pivot, move)
        probe = ratio[:, None] * s.probe - gradient
        probe = jnp.where((mode == _DESCEND)[:, None], probe, after.z)
        probe = jnp.where((mode == _DONE)[:, None], 0, probe)
        return after._replace(
            probe=probe, mode=mode, residual=residual, iterations=s.iterations + 1
        )

    def unfinished(s: _Rows):
        return (s.iterations < max_iterations) & jnp.any(s.mode != _DONE)

    end = lax.while_loop(unfinished, step, varying(start(b + x0), C, b))
    return FaceCG(jnp.maximum(end.z - b, 0), end.mode == _DONE, end.iterations)


def _square(rows: Float[Array, "k m"]) -> Float[Array, " k"]:
    return jnp.sum(jnp.square(rows), axis=-1)
