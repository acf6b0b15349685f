"""Does `project_dual_cone` solve its problem, and refuse bad input?"""

import hypothesis
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxjd.solvers import project_dual_cone
from tests.solvers import problems

TORCHJD = {"norm_eps": 1e-4, "reg_eps": 1e-4}
EPS = np.finfo(np.float32).eps

# Nearly all tests project 12 rows with 8 losses, to share the compiled programs.
M, ROWS = 8, 12


def relative_distance(G, w, exact):
    """The squared relative distance between the update and the exact one."""
    return ((w - exact) @ G * (w - exact)).sum(-1) / (exact @ G * exact).sum(-1)


def kkt_residual(G, u, v):
    """The largest violation of the KKT conditions, whatever the scales of G and u."""
    d = np.sqrt(np.diagonal(G))
    d = np.where(d > 0, d, 1)
    size = np.maximum(*(np.linalg.norm(d * a, axis=-1, keepdims=True) for a in (u, v)))
    slack = d * (v - u) / size
    gradient = v @ G / d / size
    return np.max([-slack, -gradient, np.abs(slack * gradient)])


def rows_of_every_kind(rng):
    """UPGrad's rows, DualProj's, and rows of any density and sign."""
    dense = rng.normal(size=(ROWS - M, M))
    dense[0] = 1 / M
    dense[1] = -np.abs(dense[1])
    dense[2, ::2] = 0
    return np.concatenate([np.eye(M) / M, dense])


def rows_of_upgrad(m=M):
    """UPGrad's rows for m losses of weight 1, padded with rows of zeros."""
    u = np.zeros((ROWS, M), np.float32)
    u[:m, :m] = np.eye(m)
    return u


def padded(J):
    """The Gramian of a Jacobian of fewer losses, padded with zero gradients."""
    J = np.concatenate([J, np.zeros((M - len(J), J.shape[1]), J.dtype)])
    return J @ J.T


@pytest.mark.parametrize("method", ["face_cg", "apg"])
@pytest.mark.parametrize("options", [{}, TORCHJD], ids=["default", "torchjd"])
def test_the_kkt_conditions_hold_in_float64(x64, method, options):
    for number, family in enumerate((problems.normal, problems.conflicting)):
        rng = np.random.default_rng(number)
        J = problems.spread(rng, family(rng, M), 2)
        G, u = J @ J.T, rows_of_every_kind(rng)
        result = project_dual_cone(u, G, method=method, **options)
        if options:
            G = G / np.trace(G) + 1e-4 * np.eye(M)
        assert kkt_residual(G, u, np.asarray(result.solution)) <= 1e-9
        assert result.certificate.converged.all()


@pytest.mark.parametrize("family", problems.NOT_STATIONARY)
def test_the_projection_is_exact_in_float64(x64, family):
    rng = np.random.default_rng(0)
    J = problems.spread(rng, family(rng, M), 3)
    G, u = J @ J.T, rows_of_every_kind(rng)
    result = project_dual_cone(u, G)
    exact = problems.exact_projections(J, u)
    nonzero = np.linalg.norm(exact @ J, axis=1) > 1e-9 * np.linalg.norm(u @ J, axis=1)
    assert nonzero.sum() >= M
    distance = relative_distance(G, np.asarray(result.solution), exact)
    assert distance[nonzero].max() <= 1e-12
    assert result.certificate.converged.all()


def test_quadprog_finds_the_same_weights(x64):
    quadprog = pytest.importorskip("quadprog")
    rng = np.random.default_rng(1)
    J = problems.spread(rng, problems.conflicting(rng, M), 2)
    G, u = J @ J.T, rows_of_every_kind(rng)
    H = G / np.trace(G) + 1e-4 * np.eye(M)
    exact = [quadprog.solve_qp(H, np.zeros(M), np.eye(M), row)[0] for row in u]
    for method in ("face_cg", "apg"):
        weights = project_dual_cone(u, G, method=method, **TORCHJD).solution
        np.testing.assert_allclose(weights, exact, atol=1e-9 * np.abs(exact).max())


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(
    J=hnp.arrays(np.float64, (5, 3), elements=st.integers(-3, 3)),
    u=hnp.arrays(np.float64, (2, 5), elements=st.integers(-2, 2)),
)
def test_small_integer_jacobians_meet_the_kkt_conditions(J, u):
    # Integers make zero rows, duplicates, opposites, rank 0 to 3 and stationary points.
    G, rows = padded(J), np.zeros((ROWS, M))
    rows[:2, :5] = u
    with jax.enable_x64(True):
        result = project_dual_cone(rows, G)
    v = np.asarray(result.solution)
    longest = max(np.abs(v).max(), 1)
    size = np.abs(J).max() ** 2 * longest
    assert (v - rows).min() >= 0
    assert (v @ G).min() >= -1e-12 * size
    # At a stationary point v, hence the product, is exact to the root of rounding.
    assert np.abs((v - rows) * (v @ G)).max() <= 1e-9 * size * longest
    # Some of these points are Pareto-stationary, where even float64 proves little. But
    # the search ends, and only a large residual counts as not converged.
    proof = result.certificate
    assert proof.iterations < 8_000
    converged, residual = np.asarray(proof.converged), np.asarray(proof.residual)
    assert (converged | (residual > 1e-6)).all()


def test_noise_is_a_part_of_its_own_for_every_gradient(x64):
    rng = np.random.default_rng(9)
    J = problems.spread(rng, problems.conflicting(rng, M), 2)
    J[3] = 0
    norms = np.linalg.norm(J, axis=1)
    noise = 0.3 * np.sqrt(np.square(norms).sum() / (M - 1))
    assert ((norms > 0) & (norms < noise)).sum() >= 2
    assert (norms > noise).sum() >= 2
    own = np.where(norms > 0, noise**2 / np.hypot(norms, noise), 0)
    u = rows_of_every_kind(rng)
    # A zero gradient has no such part. In the reference it has one, orthogonal to all.
    longer = np.concatenate([J, np.diag(np.where(norms > 0, own, 1))], axis=1)
    exact = problems.exact_projections(longer, u)
    for scale in (1.0, 1e-30):
        weights = project_dual_cone(u, scale * J @ J.T, noise_eps=0.3).solution
        kept = norms > 0
        np.testing.assert_allclose(
            weights[:, kept], exact[:, kept], rtol=1e-9, atol=1e-9 * np.abs(exact).max()
        )
        np.testing.assert_array_equal(weights[:, 3], u[:, 3])


def test_what_is_above_the_noise_is_exact_to_the_bit():
    rng = np.random.default_rng(10)
    # All norms are more than a factor of 1e3 above, so what is added is below rounding.
    G = problems.gramian32(problems.spread(rng, problems.conflicting(rng, M), 3))[1]
    u = rows_of_upgrad()
    exact = project_dual_cone(u, G).solution
    for noise_eps in (0.0, EPS, jnp.float32(EPS)):
        weights = project_dual_cone(u, G, noise_eps=noise_eps).solution
        np.testing.assert_array_equal(weights, exact)


def test_the_documented_example():
    J = np.array([[-4.0, 1, 1], [6, 1, 1]], np.float32)
    u = np.eye(2, dtype=np.float32) / 2
    default = J.T @ project_dual_cone(u, J @ J.T).solution.sum(0)
    torchjd = J.T @ project_dual_cone(u, J @ J.T, **TORCHJD).solution.sum(0)
    np.testing.assert_allclose(default, [0.29240, 1.90058, 1.90058], atol=1e-4)
    np.testing.assert_allclose(torchjd, [0.2929, 1.9004, 1.9004], atol=1e-4)


@pytest.mark.parametrize("max_iterations", [2, 5, None])
def test_the_certificate_bounds_the_distance(max_iterations):
    u = rows_of_every_kind(np.random.default_rng(2)).astype(np.float32)
    for number, family in enumerate(problems.NOT_STATIONARY):
        rng = np.random.default_rng([2, number])
        J = problems.spread(rng, family(rng, M), number % 4)
        G = problems.gramian32(J)[1]
        result = project_dual_cone(u, G, max_iterations=max_iterations)
        # The reference takes the rounded Gramian, because the solver does not know J.
        rows = problems.factor(G.astype(float))
        exact = problems.exact_projections(rows, u.astype(float))
        distance = np.linalg.norm((result.solution - exact) @ rows, axis=1)
        distance /= np.linalg.norm(u @ rows, axis=1)
        residual = result.certificate.residual
        assert (distance <= residual + 1e-6).all()  # The reference is rounded, too.
        if max_iterations is None:
            # The root of rounding, over the opening of the cone.
            assert residual.max() <= 0.05
            assert result.certificate.converged.all()
        if max_iterations == 2:
            # Two iterations are seldom enough, and the certificate says so.
            assert result.certificate.iterations <= 2
            wrong = distance > 256 * EPS**0.5
            assert not result.certificate.converged[wrong].any()


@pytest.mark.parametrize(
    ("seed", "shape"), [(630228926, (30, 15)), (47400023, (17, 9))]
)
def test_a_point_whose_stationarity_is_hard_to_see(seed, shape):
    """The Gramian is exact in float32, and the update is 0, with huge weights."""
    J = np.random.RandomState(seed).randint(-2, 3, shape).astype(np.float32)
    u = np.concatenate([np.eye(len(J)), np.ones((1, len(J)))]).astype(np.float32)
    result = project_dual_cone(u, J @ J.T)
    update = np.asarray(result.solution, float) @ J
    relative = np.linalg.norm(update, axis=1) / np.linalg.norm(u @ J, axis=1)
    # A single search would leave half of the mean gradient.
    assert relative.max() <= 0.03
    assert np.linalg.norm(update[:-1].sum(0)) <= 0.03 * np.linalg.norm(u[-1] @ J)
    # Float32 cannot prove that, and the certificate says so.
    assert (relative <= result.certificate.residual).all()


def test_starting_at_the_solution_ends_sooner_at_the_same_place():
    rng = np.random.default_rng(3)
    _, G = problems.gramian32(problems.conflicting(rng, M))
    cold = project_dual_cone(rows_of_upgrad(), G)
    warm = project_dual_cone(rows_of_upgrad(), G, initial=cold.solution)
    assert warm.certificate.iterations < cold.certificate.iterations / 2
    distance = relative_distance(G, np.asarray(warm.solution)[:M], cold.solution[:M])
    assert distance.max() <= 1e-8
    # Even a start from NaN does no harm.
    nan = np.full((ROWS, M), np.nan, np.float32)
    poor = project_dual_cone(rows_of_upgrad(), G, initial=nan)
    assert poor.certificate.converged.all()


def test_vmap_over_gramians_is_a_loop_over_them():
    rng = np.random.default_rng(4)
    families = (problems.normal, problems.stationary, problems.near_duplicate)
    G = np.stack([problems.gramian32(family(rng, M))[1] for family in families])
    G[1, 0, 0] = np.nan
    batched = jax.vmap(project_dual_cone, (None, 0))(rows_of_upgrad(), G)
    for index, one in enumerate(G):
        expected = project_dual_cone(rows_of_upgrad(), one).solution
        # A small entry has the rounding error of entries of order 1.
        np.testing.assert_allclose(
            batched.solution[index], expected, rtol=2e-5, atol=1e-7
        )
    converged = [True, False, True]
    np.testing.assert_array_equal(batched.certificate.converged.all(-1), converged)


def test_leading_axes_of_u_are_kept():
    rng = np.random.default_rng(5)
    _, G = problems.gramian32(problems.normal(rng, M))
    u = rows_of_every_kind(rng).astype(np.float32)
    result = project_dual_cone(u.reshape(2, 6, M), G)
    assert result.certificate.residual.shape == (2, 6)
    flat = project_dual_cone(u, G).solution
    np.testing.assert_array_equal(result.solution, flat.reshape(2, 6, M))
    one = project_dual_cone(u[8], G)
    assert one.certificate.converged.shape == ()
    np.testing.assert_allclose(one.solution, flat[8], rtol=1e-5)


def test_scan_and_a_single_compilation():
    traces = []

    @jax.jit
    def solve(u, gramians):
        traces.append(1)

        def step(previous, G):
            solution = project_dual_cone(u, G, initial=previous).solution
            return solution, solution

        return jax.lax.scan(step, u, gramians)[1]

    rng = np.random.default_rng(6)
    u = rows_of_upgrad()
    for scale in (1.0, 1e3):
        G = [problems.gramian32(scale * problems.normal(rng, M))[1] for _ in range(3)]
        solutions = solve(u, np.stack(G))
        alone = project_dual_cone(u, G[2]).solution
        np.testing.assert_allclose(solutions[2], alone, atol=1e-5)
    assert len(traces) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("m", [1, M])
@pytest.mark.parametrize("options", [{}, TORCHJD], ids=["default", "torchjd"])
def test_nan_and_infinity_give_nan_at_once(bad, m, options):
    rng = np.random.default_rng(7)
    _, G = problems.gramian32(problems.normal(rng, m))
    u = rows_of_upgrad()[:, :m]
    poisoned = G.copy()
    poisoned[0, -1] = poisoned[-1, 0] = bad
    result = project_dual_cone(u, poisoned, **options)
    assert np.isnan(result.solution).all()
    assert not result.certificate.converged.any()
    assert result.certificate.iterations <= 2
    # In a row of u it only affects that row.
    u[0, 0] = bad
    result = project_dual_cone(u, G, **options)
    assert np.isnan(result.solution[0]).all()
    assert np.isfinite(result.solution[1:]).all()


def test_zero_gramian_and_zero_rows():
    u = rows_of_every_kind(np.random.default_rng(8)).astype(np.float32)
    zero = project_dual_cone(u, np.zeros((M, M), np.float32))
    np.testing.assert_array_equal(zero.solution, u)
    assert zero.certificate.converged.all()
    # Zero rows change nothing for the others.
    J = np.array([[-4.0, 1, 1], [6, 1, 1]], np.float32)
    weights = project_dual_cone(rows_of_upgrad(3) / 2, padded(J)).solution
    update = J.T @ weights.sum(0)[:2]
    np.testing.assert_allclose(update, [0.29240, 1.90058, 1.90058], atol=1e-4)
    np.testing.assert_array_equal(weights[2], rows_of_upgrad(3)[2] / 2)
    # A row of zeros has the weights 0.
    np.testing.assert_array_equal(weights[3:], 0)


def test_one_loss_and_negative_bounds():
    u = np.full((ROWS, 1), -1.0, np.float32)
    u[0] = 2
    one = project_dual_cone(u, np.array([[3.0]], np.float32))
    np.testing.assert_allclose(one.solution[:2], [[2.0], [0.0]], atol=EPS)


def test_exactly_opposed_and_repeated_gradients():
    J = np.array([[1.0, 2], [-1, -2], [1, 2], [2, -1]], np.float32)
    weights = project_dual_cone(rows_of_upgrad(4), padded(J)).solution[:4, :4]
    # The projections of the first three are 0. The last is orthogonal to them.
    expected = [[0, 0], [0, 0], [0, 0], [2, -1]]
    np.testing.assert_allclose(weights @ J, expected, atol=2e-6)


def test_the_types_of_the_results(x64):
    def dtype(u, gramian):
        return jax.eval_shape(project_dual_cone, u, gramian).solution.dtype

    G, u = np.eye(2), np.ones(2)
    assert dtype(u, G) == jnp.float64
    assert dtype(u, G.astype(np.float32)) == jnp.float32
    assert dtype(u, jnp.asarray(G, jnp.bfloat16)) == jnp.float32
    assert dtype(np.array([1, 0]), G) == jnp.float64


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((np.ones(2), np.ones((2, 3))), {}, ValueError, r"`gramian`.*\(2, 3\)"),
        ((np.ones(2), np.ones(2)), {}, ValueError, r"`gramian`.*square.*\(2,\)"),
        ((np.ones(0), np.ones((0, 0))), {}, ValueError, r"`gramian`.*\(0, 0\)"),
        ((np.ones(2), np.eye(2, dtype=int)), {}, TypeError, r"`gramian`.*int"),
        ((np.ones(3), np.eye(2)), {}, ValueError, r"`u`.*\(\.\.\., 2\).*\(3,\)"),
        ((1.0, np.eye(2)), {}, ValueError, r"`u`.*Got \(\)"),
        ((np.ones(2) * 1j, np.eye(2)), {}, TypeError, r"`u`.*complex"),
        ((np.ones(2), np.eye(2)), {"reg_eps": -1.0}, ValueError, r"`reg_eps`.*-1\.0"),
        (
            (np.ones(2), np.eye(2)),
            {"reg_eps": 1.0, "norm_eps": float("nan")},
            ValueError,
            r"`norm_eps`.*nan",
        ),
        ((np.ones(2), np.eye(2)), {"norm_eps": 1.0}, ValueError, "`norm_eps`.*reg_eps"),
        (
            (np.ones(2), np.eye(2)),
            {"noise_eps": 0.0, "reg_eps": 1.0},
            ValueError,
            r"`noise_eps` and `reg_eps`.*0\.0.*1\.0",
        ),
        ((np.ones(2), np.eye(2)), {"noise_eps": "a"}, TypeError, "`noise_eps`.*'a'"),
        ((np.ones(2), np.eye(2)), {"method": "qp"}, ValueError, "`method`.*'qp'"),
        (
            (np.ones(2), np.eye(2)),
            {"max_iterations": 0},
            ValueError,
            "`max_iterations`.*0",
        ),
        (
            (np.ones(2), np.eye(2)),
            {"initial": np.ones(3)},
            ValueError,
            r"`initial`.*\(2,\).*\(3,\)",
        ),
    ],
)
def test_bad_input_is_refused_while_tracing(arguments, options, error, message):
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda: project_dual_cone(*arguments, **options))
