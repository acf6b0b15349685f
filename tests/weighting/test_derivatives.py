"""Are the derivatives of the weights those of finite differences?

With respect to the Jacobian and to every hyperparameter that is a number.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

import jaxjd
from jaxjd import scalarization as s
from jaxjd import weighting as w

pytestmark = pytest.mark.usefixtures("x64")

M, N = 4, 6
EPS = 1e-6
U = np.array([0.1, 0.4, 0.2, 0.3])
# Gradients that are dependent, orthonormal or opposed in pairs, or that are zero.
KINDS = ("generic", "masked", "zero", "dependent", "orthonormal", "opposed", "all zero")
SMOOTH = KINDS[:4]


class Row(NamedTuple):
    """Weightings that are compiled together, and where they have a derivative."""

    make: Callable[..., list[jaxjd.Weighting]]
    """Of hyperparameters."""
    hyperparameters: Sequence[tuple[Any, ...]] = ((),)
    """Which ones are tried."""
    smooth: tuple[str, ...] = SMOOTH
    """The kinds of gradients near which the weights are smooth."""


def unit_mean():
    """A weighting that depends on the norms only."""
    return w.normalize(w.mean())


ROWS = {
    "cagrad": Row(
        lambda *args: [w.cagrad(*args)],
        [(0.4, U), (1.5, U)],
        (*SMOOTH, "orthonormal"),
    ),
    "constant, krum, mean, pcgrad, random, sum": Row(
        lambda u: [
            w.constant(u),
            w.krum(1, 2),
            w.mean(),
            w.pcgrad(),
            w.random(),
            w.sum(),
        ],
        [(U,)],
    ),
    "cr_mogm, normalize, regularize, scale_by_losses": Row(
        lambda decay, start, eps: [
            w.cr_mogm(unit_mean(), decay, num_losses=M, initial_weights=start),
            w.scale_by_losses(w.regularize(unit_mean(), eps)),
            w.normalize(w.imtl_g()),
        ],
        [(0.7, U, 0.05)],
        (*SMOOTH, "orthonormal"),
    ),
    "cosmos, geometric_mean, pbi, stch": Row(
        lambda smoothing, penalty, u: [
            s.cosmos(penalty, u).weighting,
            s.geometric_mean().weighting,
            s.pbi(penalty, u).weighting,
            s.stch(smoothing, u, reference=-u).weighting,
        ],
        [(0.3, 0.7, U)],
        KINDS,
    ),
    "dualproj, upgrad": Row(
        lambda u: [w.upgrad(u), w.dualproj(u), w.normalize(w.upgrad(u))], [(U,)]
    ),
    "fairgrad": Row(
        lambda alpha: [w.fairgrad(alpha)],
        [(2.0,), (0.6,)],
        (*SMOOTH, "orthonormal"),
    ),
    "gradvac": Row(
        lambda decay, eps: [w.gradvac(num_losses=M, decay=decay, eps=eps)],
        [(0.5, 1e-3)],
    ),
    "aligned_mtl, conflict_free, imtl_g": Row(
        lambda u: [
            w.aligned_mtl(u, scale_mode="rmse"),
            *(
                w.conflict_free(u, length=length)
                for length in ("projection", "arithmetic", "harmonic", "geometric", 2)
            ),
            w.imtl_g(),
        ],
        [(U,)],
        (*SMOOTH, "orthonormal"),
    ),
    # The derivative of the least eigenvalue, or norm, is that of one of several.
    "aligned_mtl, conflict_free": Row(
        lambda u: [
            w.aligned_mtl(u),
            w.aligned_mtl(u, scale_mode="median"),
            w.conflict_free(u, length="min"),
            w.conflict_free(u, length="max"),
        ],
        [(U,)],
    ),
    "mgda": Row(lambda: [w.mgda()], smooth=(*SMOOTH, "orthonormal")),
    "mgda, with Frank-Wolfe steps": Row(lambda: [w.mgda(frank_wolfe_steps=20)]),
    "modo, sdmgrad": Row(
        lambda step_size, regularization, momentum, u: [
            w.modo(num_losses=M, step_size=step_size, regularization=regularization),
            w.sdmgrad(
                num_losses=M,
                step_size=step_size,
                momentum=momentum,
                inner_steps=4,
                regularization=regularization,
                preference=u,
            ),
        ],
        [(0.05, 0.3, 0.5, U)],
        (*SMOOTH, "orthonormal"),
    ),
    "nash_mtl": Row(
        lambda limit: [w.nash_mtl(num_losses=M, max_norm=limit)],
        [(1.0,)],
        (*SMOOTH, "orthonormal"),
    ),
    "pcd": Row(
        lambda tau, decay, eps: [
            w.pcd(num_losses=M, tau=tau, decay=decay, eps=eps),
        ],
        [(0.1, 0.9, 1e-3)],
        (*SMOOTH, "orthonormal"),
    ),
}


def test_a_row_for_every_weighting():
    exported = {name for name in vars(w) if name[0].islower() and name[0] != "_"}
    named = {name for key in ROWS for name in key.split(", ")}
    assert exported <= named


def gradients(kind):
    """[M, N], the losses that are there, and a direction that keeps the kind."""
    rng = np.random.default_rng(1)
    J, direction = rng.normal(size=(2, M, N))
    mask = np.full(M, True)
    J[0] -= 0.7 * J[1:3].mean(axis=0)  # Some conflict.
    if kind == "masked":
        mask[2] = False
    elif kind == "zero":
        J[2] = direction[2] = 0
    elif kind == "dependent":
        J[:, 2:] = direction[:, 2:] = 0
        J[:, 0] = np.abs(J[:, 0])  # All losses can decrease.
    elif kind == "orthonormal":
        J = np.eye(M, N)
    elif kind == "opposed":
        J = np.outer([1.0, -1, 1, -1], np.ones(N))
    elif kind == "all zero":
        J *= 0
    return jnp.asarray(J), jnp.asarray(mask), jnp.asarray(direction)


@functools.cache
def compiled(name):
    """A sum of weights and updates, with the states after it, and the gradient."""

    def total(J, hyperparameters, states, mask, of_weights, of_updates):
        result, new = jnp.zeros(()), []
        weightings = ROWS[name].make(*hyperparameters)
        for weighting, *case in zip(
            weightings, states, of_weights, of_updates, strict=True
        ):
            state, of_weight, of_update = case
            gramian = J @ J.T
            weights, state = weighting.update(
                gramian,
                state,
                mask=mask,
                cross_gramian=J @ J[:, ::-1].T + gramian,
                losses=1 + jnp.square(J).sum(axis=1),
            )
            new.append(state)
            result += weights @ of_weight + weights @ J @ of_update
        return result, new

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))


class Case:
    """The value and the derivatives of a second step."""

    def __init__(self, name, hyperparameters, *, of_weights):
        weightings = ROWS[name].make(*hyperparameters)
        rng = np.random.default_rng(2)
        cotangents = (
            jnp.asarray(of_weights * rng.normal(size=(len(weightings), M))),
            jnp.asarray(rng.normal(size=(len(weightings), N))),
        )
        before = jnp.asarray(rng.normal(size=(M, N)))
        self.call = lambda J, hyperparameters, states, mask: compiled(name)(
            J, tuple(map(jnp.asarray, hyperparameters)), states, mask, *cotangents
        )
        states = [weighting.init() for weighting in weightings]
        (_, self.states), _ = self.call(
            before, hyperparameters, states, jnp.full(M, True)
        )

    def value(self, J, hyperparameters, mask):
        return self.call(J, hyperparameters, self.states, mask)[0][0]

    def gradient(self, J, hyperparameters, mask):
        return self.call(J, hyperparameters, self.states, mask)[1]


@pytest.mark.parametrize("name", ROWS)
def test_finite_differences(name):
    for hyperparameters in ROWS[name].hyperparameters:
        for kind in KINDS:
            compare(name, kind, hyperparameters)


def compare(name, kind, hyperparameters):
    where = f"{kind}, {hyperparameters}"
    J, mask, direction = gradients(kind)
    # Of dependent gradients there may be many weights, but there is one update.
    case = Case(name, hyperparameters, of_weights=kind != "dependent")
    gradient = case.gradient(J, hyperparameters, mask)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(gradient)), where
    if kind not in ROWS[name].smooth:
        return
    of_jacobian, of_hyperparameters = gradient

    def moved(step):
        return case.value(J + step * direction, hyperparameters, mask)

    expected = (moved(EPS) - moved(-EPS)) / (2 * EPS)
    actual = jnp.vdot(of_jacobian, direction)
    assert_allclose(actual, expected, rtol=1e-5, atol=1e-6, err_msg=where)

    changes = [
        np.random.default_rng(4).normal(size=np.shape(h)) for h in hyperparameters
    ]

    def varied(step):
        pairs = zip(hyperparameters, changes, strict=True)
        return case.value(J, [h + step * c for h, c in pairs], mask)

    expected = (varied(EPS) - varied(-EPS)) / (2 * EPS)
    actual = sum(map(jnp.vdot, of_hyperparameters, map(jnp.asarray, changes)))
    assert_allclose(actual, expected, rtol=1e-5, atol=1e-6, err_msg=where)


def test_of_the_radius_of_a_ball_that_is_a_point():
    """Only to one side: from the mean towards the gradient that it serves least."""
    J, _, _ = gradients("generic")

    @jax.jit
    def weights(c):
        return jax.jvp(lambda c: w.cagrad(c, U)(J @ J.T), (c,), (1.0,))

    value, slope = weights(0.0)
    assert_allclose(slope, (weights(EPS)[0] - value) / EPS, rtol=1e-5)


def test_twice():
    """By what is solved for, too. By eigenvalues it is refused."""
    J, _, direction = gradients("generic")

    def slope(weighting, J):
        def total(J):
            return weighting(J @ J.T) @ U

        return jnp.vdot(jax.grad(total)(J), direction)

    @jax.jit
    def slopes(J):
        def both(J):
            return jnp.stack([slope(w.cagrad(), J), slope(w.fairgrad(), J)])

        return jax.jvp(both, (J,), (direction,))

    ahead, behind = slopes(J + EPS * direction)[0], slopes(J - EPS * direction)[0]
    assert_allclose(slopes(J)[1], (ahead - behind) / (2 * EPS), rtol=1e-5)
    for weighting in (w.imtl_g(), w.aligned_mtl()):
        with pytest.raises(TypeError, match="imtl_g can be differentiated only once"):
            jax.eval_shape(jax.grad(functools.partial(slope, weighting)), J)


def test_of_updates_that_come_from_rows():
    J, _, direction = gradients("generic")
    transformations = [
        jaxjd.excess_mtl(num_losses=M),
        jaxjd.graddrop(U),
        jaxjd.trimmed_mean(1),
    ]
    params = jnp.zeros(N)
    before = [tx.init(params) for tx in transformations]

    @jax.jit
    def total(J):
        updates = [
            tx.update(J, state, params)[0]
            for tx, state in zip(transformations, before, strict=True)
        ]
        return jnp.stack(updates).ravel() @ jnp.arange(1.0, 3 * N + 1)

    expected = (total(J + EPS * direction) - total(J - EPS * direction)) / (2 * EPS)
    actual = jnp.vdot(jax.jit(jax.grad(total))(J), direction)
    assert_allclose(actual, expected, rtol=1e-6)
