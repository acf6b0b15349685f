"""Are the weights those of TorchJD, step after step where there is a state?"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

import jaxjd
from jaxjd.weighting._gradvac import gradvac_weights
from jaxjd.weighting._pcgrad import pcgrad_weights

pytest.importorskip("torchjd")
import torch
import torchjd.aggregation as reference

pytestmark = pytest.mark.usefixtures("x64")

M, N, STEPS = 5, 12, 20
PREFERENCE = [0.1, 0.5, 0.0, 0.3, 0.2]
# Each with the rounding of its precision, times the condition of the matrices below.
TOLERANCES = {"float32": 1e-4, "float64": 1e-12}
dtypes = pytest.mark.parametrize("dtype", TOLERANCES)


def double(values):
    return None if values is None else torch.tensor(values, dtype=torch.float64)


def jacobians():
    """By kind; all of them with a condition number below 100 on their range."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(M, N))
    yield from rng.normal(size=(3, M, N))
    # All gradients agree; they conflict; their norms differ; the whole is small, big.
    yield rows + 2
    yield np.concatenate([rows[:3], -rows[:2] + 0.5 * rows[3:]])
    yield rows * np.array([[0.1], [1], [3], [0.5], [2]])
    yield 1e-6 * rows
    yield 1e6 * rows


def singular_jacobians():
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(M, N))
    yield rng.normal(size=(M, 3)) @ rng.normal(size=(3, N))
    yield rows[[0, 1, 2, 3, 0]]
    yield rows * np.array([[1], [1], [0], [1], [1]])


# Ours is made when float64 is on, or it would round the preference.
ALIGNED = {
    f"aligned_mtl, {mode}{', preference' if preference else ''}": (
        functools.partial(jaxjd.weighting.aligned_mtl, preference, scale_mode=mode),
        reference.AlignedMTLWeighting(double(preference), mode),
    )
    for mode in ("min", "median", "rmse")
    for preference in (None, PREFERENCE)
}
KRUM = {
    f"krum, {byzantine}, {selected}": (
        functools.partial(jaxjd.weighting.krum, byzantine, selected),
        reference.KrumWeighting(byzantine, selected),
    )
    for byzantine, selected in [(0, 1), (1, 1), (1, 2), (2, 1), (0, 5)]
}
STATELESS = {
    "imtl_g": (jaxjd.weighting.imtl_g, reference.IMTLGWeighting()),
    **ALIGNED,
    **KRUM,
}


@functools.cache
def compiled(name):
    weighting = STATELESS[name][0]()
    return jax.jit(lambda gramian: weighting(gramian))


@dtypes
@pytest.mark.parametrize("name", STATELESS)
def test_weights(name, dtype):
    exact = dtype == "float64"
    # In float32 the rank of a singular Gramian is a matter of rounding.
    for J in [*jacobians(), *(singular_jacobians() if exact else ())]:
        if name.startswith("krum, 2"):
            # One neighbour each: the two that are nearest to one another tie.
            continue
        G = (J @ J.T).astype(dtype)
        theirs = STATELESS[name][1](torch.tensor(G.astype(float)))
        weights = compiled(name)(jnp.asarray(G))
        assert_allclose(weights, theirs, rtol=0, atol=close(theirs, dtype))


def close(theirs, dtype):
    return TOLERANCES[dtype] * np.abs(np.asarray(theirs)).max()


def test_krum_of_nearest_neighbours():
    """Of a pair that is nearest to one another, either may be the one selected."""
    for J in jacobians():
        weights = compiled("krum, 2, 1")(jnp.asarray(J @ J.T))
        theirs = STATELESS["krum, 2, 1"][1](torch.tensor(J @ J.T)).numpy()
        distances = np.linalg.norm(J[:, None] - J[None], axis=2)
        pair = set(np.argwhere(distances == distances[distances > 0].min())[0])
        assert {int(np.argmax(weights)), int(np.argmax(theirs))} <= pair
        assert sorted(weights) == sorted(theirs) == [0, 0, 0, 0, 1]


@dtypes
@pytest.mark.parametrize("preference", [None, PREFERENCE])
def test_updates_of_conflict_free(preference, dtype):
    """Theirs needs the Jacobian, hence the updates and not the weights."""
    weighting = jaxjd.weighting.conflict_free(preference)
    weights = jax.jit(lambda gramian: weighting(gramian))
    for J in [*jacobians(), *(singular_jacobians() if dtype == "float64" else ())]:
        J = J.astype(dtype).astype(float)
        theirs = reference.ConFIG(double(preference))(torch.tensor(J))
        ours = J.T @ np.asarray(weights(jnp.asarray((J @ J.T).astype(dtype))))
        assert_allclose(ours, theirs, rtol=0, atol=close(theirs, dtype))


@dtypes
def test_pcgrad_with_the_same_permutations(dtype):
    weights = jax.jit(pcgrad_weights)
    for seed, J in enumerate([*jacobians(), *singular_jacobians()]):
        G = (J @ J.T).astype(dtype)
        torch.manual_seed(seed)
        permutations = [torch.randperm(M).numpy() for _ in range(M)]
        torch.manual_seed(seed)
        theirs = reference.PCGradWeighting()(torch.tensor(G.astype(float)))
        ours = weights(jnp.asarray(G), jnp.ones(M, bool), jnp.asarray(permutations))
        assert_allclose(ours, theirs, rtol=0, atol=close(theirs, dtype))


def orders_of_gradvac():
    """What TorchJD draws: permutations of the others. Ours pass over the row's own."""
    rows = []
    for i in range(M):
        others = np.delete(np.arange(M), i)
        rows.append([*others[torch.randperm(M - 1).numpy()], i])
    return jnp.asarray(rows)


@dtypes
# With TorchJD's eps ours differs by eps times a norm: their denominators are products
# of norms, and ours are relative to them.
@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_gradvac_over_steps(eps, dtype):
    step = jax.jit(functools.partial(gradvac_weights, beta=0.3, eps=eps))
    theirs = reference.GradVacWeighting(beta=0.3, eps=eps)
    rng = np.random.default_rng(2)
    targets = jnp.zeros((M, M), dtype)
    turned = 0
    for seed in range(STEPS):
        J = rng.normal(size=(M, N)) + rng.uniform(-0.2, 1.5)
        G = (J @ J.T).astype(dtype)
        torch.manual_seed(seed)
        orders = orders_of_gradvac()
        torch.manual_seed(seed)
        expected = theirs(torch.tensor(G.astype(float))).numpy()
        ours, targets = step(jnp.asarray(G), jnp.ones(M, bool), orders, targets)
        tolerance = max(TOLERANCES[dtype], 10 * eps)
        assert_allclose(ours, expected, rtol=tolerance)
        assert_allclose(targets, theirs._phi_t, atol=tolerance)
        turned += not np.allclose(expected, 1)
    assert turned >= STEPS // 2


def cross_gramians(dtype):
    rng = np.random.default_rng(3)
    expected = rng.normal(size=(M, N))
    for _ in range(STEPS):
        J1, J2 = expected + rng.normal(size=(2, M, N))
        # TorchJD adds 1e-8 to a square of norms, which must be nothing beside it.
        yield (1e8 * J1 @ J2.T).astype(dtype)


TWO_BATCHES = {
    "sdmgrad": ({}, {}),
    "sdmgrad, gentle": ({"lr": 0.5, "n_iter": 7, "momentum": 0.2}, {}),
    "sdmgrad, preference": ({"lambda_": 2}, {"preference": PREFERENCE}),
    "modo": ({"gamma": 2e-10, "rho": 0.3}, {}),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "float64") for name in TWO_BATCHES), ("sdmgrad", "float32")],
)
def test_two_batches_over_steps(name, dtype):
    both, preference = TWO_BATCHES[name]
    if name == "modo":
        ours = jaxjd.weighting.modo(num_losses=M, **both)
        theirs = reference.MoDoWeighting(**both)
    else:
        ours = jaxjd.weighting.sdmgrad(num_losses=M, **both, **preference)
        preferred = double(preference.get("preference"))
        theirs = reference.SDMGradWeighting(**both, pref_vector=preferred)

    @jax.jit
    def step(cross_gramian, state):
        one = jnp.eye(M, dtype=cross_gramian.dtype)
        return ours.update(one, state, cross_gramian=cross_gramian)

    state = ours.init()
    interior = 0
    for A in cross_gramians(dtype):
        expected = theirs(torch.tensor(A.astype(float))).numpy()
        weights, state = step(jnp.asarray(A), state)
        # 20 steps of size 10 multiply what was rounded.
        assert_allclose(weights, expected, atol=10 * TOLERANCES[dtype])
        interior += (np.asarray(state.weights) > 0).sum() > 1
    assert interior > 0


@pytest.mark.parametrize("initial", [None, PREFERENCE])
def test_cr_mogm_over_steps(initial):
    def schedule(count):
        return 0.1 + 0.04 * count.astype(float)

    ours = jaxjd.weighting.cr_mogm(
        jaxjd.weighting.aligned_mtl(),
        schedule,
        num_losses=M,
        initial_weights=initial,
    )
    theirs = reference.CRMOGMWeighting(
        reference.AlignedMTLWeighting(),
        initial_weights=double(initial),
    )
    step = jax.jit(lambda gramian, state: ours.update(gramian, state))
    state = ours.init()
    rng = np.random.default_rng(4)
    for count in range(STEPS):
        J = rng.normal(size=(M, N))
        theirs.alpha = float(schedule(jnp.int32(count)))
        expected = theirs(torch.tensor(J @ J.T))
        weights, state = step(jnp.asarray(J @ J.T), state)
        assert_allclose(weights, expected, rtol=TOLERANCES["float64"])
