"""Are the problems, the training and the statistics of the evidence right?"""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks._results import FOLDER
from benchmarks.quality import PROBLEMS, _report, burgers, front, helmholtz
from benchmarks.quality import vector_reward as reward
from benchmarks.quality._evaluation import results
from benchmarks.quality._methods import FEW, LEFT_OUT, METHODS, of_problem
from benchmarks.quality._problem import Measure, Problem
from benchmarks.quality._training import STAGES, runs
from tests.weighting.registry import AGGREGATORS

DOCS = Path(__file__).parents[2] / "docs"


# The problems ------------------------------------------------------------------------


def test_burgers_by_cole_and_hopf_is_that_of_finite_differences():
    """Central differences in conservative form, and Runge-Kutta's fourth order.

    There are ten cells across the front, whose width is about 4 ν. So the error of the
    differences, of second order, is about a thousandth.
    """
    x, h = np.linspace(-1, 1, 1601, retstep=True)
    steps = 4000

    def speed(u):
        flux = u[1:-1] * 0
        flux = -(u[2:] ** 2 - u[:-2] ** 2) / (4 * h)
        return np.pad(
            flux + burgers.VISCOSITY * (u[2:] - 2 * u[1:-1] + u[:-2]) / h**2, 1
        )

    u, dt = -np.sin(np.pi * x), 1 / steps
    for _ in range(steps):
        k1 = speed(u)
        k2 = speed(u + dt / 2 * k1)
        k3 = speed(u + dt / 2 * k2)
        u = u + dt / 6 * (k1 + 2 * k2 + 2 * k3 + speed(u + dt * k3))
    expected = burgers.solution(np.ones_like(x), x)
    assert np.linalg.norm(u - expected) < 3e-3 * np.linalg.norm(expected)


def test_the_residuals_of_the_solutions_are_zero():
    with jax.enable_x64(True):
        x, y = jax.random.uniform(jax.random.key(0), (2, 50), float, -1, 1)
        # Of the order of the source, 170, times rounding.
        assert abs(helmholtz.residual(helmholtz.solution, x, y)).max() < 1e-11
        ones = jnp.ones(5)
        for edge in ((ones, x[:5]), (-ones, x[:5]), (x[:5], ones), (x[:5], -ones)):
            assert abs(helmholtz.solution(*edge)).max() < 1e-14


def test_burgers_residual_of_a_network():
    """By hand, for a network of one tanh: u = tanh(a (2 t - 1) + b x)."""
    a, b = 0.7, -1.3
    layers = [
        {"w": jnp.array([[a], [b]]), "b": jnp.zeros(1)},
        {"w": jnp.ones((1, 1)), "b": jnp.zeros(1)},
    ]
    t, x = jax.random.uniform(jax.random.key(0), (2, 20))
    u = jnp.tanh(a * (2 * t - 1) + b * x)
    s = 1 - u**2  # The derivative of tanh.
    expected = 2 * a * s + u * b * s + burgers.VISCOSITY * 2 * b**2 * u * s
    np.testing.assert_allclose(
        burgers.residual(layers, t, x), expected, rtol=1e-5, atol=1e-6
    )


def test_the_best_returns_of_the_maze():
    """The goals are 5, 7, 5, 7 and 2 steps away, and each step at the goal counts."""
    best = reward.extremes(reward.five_goals(), 1)
    np.testing.assert_allclose(best, [20 - d + 1 for d in (5, 7, 5, 7, 2)])
    np.testing.assert_allclose(reward.extremes(reward.five_goals(), -1), 0)


def test_the_best_returns_of_resource_gathering():
    world = reward.resource_gathering()
    gold, gem, safety = reward.extremes(world, 1)
    # 12 steps to the gold and back on a way without enemies: twice in 30 steps. The
    # short way takes 8 steps, and is worth less than 3 times if it may be attacked.
    assert 2 <= gold < 3
    # 10 steps to the gem and back without enemies: three times.
    assert gem == pytest.approx(3)
    assert safety == 0
    assert reward.extremes(world, -1)[2] < 0


@pytest.mark.parametrize("name", ["resource_gathering", "five_goals"])
def test_sampled_returns_have_the_exact_mean(name):
    world = getattr(reward, name)()
    layers = reward.dense_layers(jax.random.key(0), (world.features.shape[1], 4, 4))

    @jax.jit
    def both(layers, drawn):
        policy = jnp.exp(reward.log_policy(world, layers))
        returns = reward.returns_to_go(world, policy, drawn)[2][0]
        return returns, reward.expected_returns(world, layers)

    shape = (world.horizon, 2, len(world.starts), 4000)
    returns, exact = both(layers, jax.random.uniform(jax.random.key(1), shape))
    error = returns.std(axis=1).max(axis=0) / np.sqrt(4000)
    assert (abs(returns.mean(axis=1).sum(axis=0) - exact) <= 4 * error + 1e-6).all()


@pytest.mark.slow
def test_the_gradients_of_the_losses_are_those_of_the_returns(monkeypatch):
    """REINFORCE with many episodes, against the derivative of the exact returns."""
    world = reward.resource_gathering()._replace(entropy=0.0, episodes=100_000)
    monkeypatch.setattr(reward, "resource_gathering", lambda: world)
    problem = reward.problem("resources")
    layers = problem.init(jax.random.key(0))
    drawn = problem.batch(jax.random.key(1))

    def flat(tree):
        return np.concatenate([x.reshape(3, -1) for x in jax.tree.leaves(tree)], 1)

    estimated = flat(jax.jit(jax.jacobian(problem.losses))(layers, *drawn))
    exact = -flat(jax.jacobian(lambda p: reward.expected_returns(world, p))(layers))
    exact /= (reward.extremes(world, 1) - reward.extremes(world, -1))[:, None]
    for ours, theirs in zip(estimated, exact, strict=True):
        # 3,300 parameters share the noise of 100,000 episodes.
        assert np.linalg.norm(ours - theirs) < 0.2 * np.linalg.norm(theirs)


def test_hypervolume_by_hand():
    # Boxes of 0.5 x 0.25 x 1 and 0.25 x 0.5 x 1, which share 0.25 x 0.25 x 1.
    points = np.array([[0.5, 0.75, 0.0], [0.75, 0.5, 0.0], [0.9, 0.9, 0.9]])
    assert front.hypervolume(points) == pytest.approx(0.125 + 0.125 - 0.0625)
    assert front.hypervolume(np.zeros((1, 3))) == 1
    assert front.hypervolume(np.ones((2, 3))) == 0
    np.testing.assert_array_equal(front.front(points), points[:2])
    preferences = front.preferences(3)
    assert len(preferences) == 15
    np.testing.assert_allclose(preferences.sum(axis=1), 1)


# The training ------------------------------------------------------------------------


def quadratic() -> Problem:
    """Two losses of two parameters, with noise in the batches."""

    def losses(x, noise):
        return jnp.stack([(x[0] - 1) ** 2 + x[1] ** 2, 9 * x[1] ** 2]) + noise @ x

    return Problem(
        title="Quadratic",
        num_losses=2,
        steps=3 * STAGES,
        rates=(0.1, 0.01),
        seeds=2,
        init=lambda key: jax.random.normal(key, (2,)),
        batch=lambda key: (0.1 * jax.random.normal(key, (2, 2)),),
        losses=losses,
        measure=lambda x: {"validation": (x**2).sum(), "first": x[0], "second": x[1]},
        measures={"first": Measure("first")},
    )


def test_runs_are_those_of_a_loop():
    """Every seed and rate, against Adam by a loop, with a rate that decays to zero."""
    problem = quadratic()
    keys, rates = jax.random.split(jax.random.key(0), 2), jnp.array(problem.rates)
    found = jax.jit(runs(problem, METHODS["mean"]))(keys, rates, 3)

    def mean(x, noise):
        return problem.losses(x, noise).mean()

    gradient = jax.jit(jax.grad(mean))
    for r, rate in enumerate(problem.rates):
        for s, key in enumerate(keys):
            of_params, of_batches = jax.random.split(key)
            x = np.asarray(problem.init(of_params))
            first, second = np.zeros(2), np.zeros(2)
            for number in range(problem.steps):
                (noise,) = problem.batch(jax.random.fold_in(of_batches, number))
                g = np.asarray(gradient(x, noise))
                first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
                t = number + 1
                unit = np.sqrt(second / (1 - 0.999**t)) + 1e-8
                factor = (1 + np.cos(np.pi * number / problem.steps)) / 2
                x = x - rate * factor * first / (1 - 0.9**t) / unit
                if t % 3 == 0:
                    stage = t // 3 - 1
                    at = [found[name][r, s, stage] for name in ("first", "second")]
                    np.testing.assert_allclose(at, x, rtol=1e-4, atol=1e-5)


# What is not the same for all methods: two more batches, the losses after a step, the
# rows in turn, the parameters of heads.
SPECIAL = ("upgrad", "sdmgrad", "famo", "momentum_conflict_free", "gradnorm")


def started(problem: Problem, name: str, execute: bool):
    keys, rates = jax.random.split(jax.random.key(0), 2), jnp.array(problem.rates[:1])
    traced = jax.jit(runs(problem, METHODS[name])).trace(keys, rates, 1)
    if execute:
        return traced.lower().compile()(keys, rates, 1)
    return traced.out_info


@pytest.mark.parametrize(
    "name",
    [
        "scales_unequal",
        *[pytest.param(n, marks=pytest.mark.slow) for n in ("instance_wise", "goals")],
    ],
)
def test_problems_are_traced(name):
    pytest.importorskip("mlxtend")
    pytest.importorskip("sklearn")
    problem = PROBLEMS[name]()
    found = started(problem, "mean", execute=False)
    assert {"validation", *problem.measures} <= set(found)
    assert {leaf.shape for leaf in found.values()} == {(1, 2, STAGES)}
    names = of_problem(problem)
    assert next(iter(names)) == "mean"
    assert set(FEW) & set(names)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROBLEMS)
def test_every_problem_runs(name):
    pytest.importorskip("mlxtend")
    pytest.importorskip("sklearn")
    problem = PROBLEMS[name]()
    for method in ("mean", *SPECIAL):
        if method not in of_problem(problem, everything=True):
            continue
        for leaf in started(problem, method, execute=True).values():
            assert np.isfinite(leaf).all(), method


def test_all_methods_are_measured_or_left_out():
    names = {name.partition(" ")[0] for name in METHODS}
    assert names | set(LEFT_OUT) == set(AGGREGATORS)
    assert not names & set(LEFT_OUT)
    assert set(FEW) <= set(METHODS)


def test_a_run_that_diverges_is_the_worst():
    validation = np.array([[[0.0, np.nan]], [[0.0, 3.0]], [[0.0, 2.0]]])
    found = results({"validation": validation, "error": 2 * validation})
    assert found["best"] == 2
    assert found["measures"]["error"] == [4.0]
    assert found["validation"] == [None, 3.0, 2.0]


# The report --------------------------------------------------------------------------


def test_what_is_noise():
    base = [1.0, 2.0, 3.0, 4.0, 5.0]
    # All seeds alike, however much they vary.
    assert _report.versus([x - 0.1 for x in base], base).verdict == "better"
    assert _report.versus([x + 0.1 for x in base], base).verdict == "worse"
    # Differences 1, 0, 0, 0, 0: their mean is one standard error.
    assert _report.versus([0.0, *base[1:]], base).verdict == "within noise"
    # 95% of Student's t with 4 degrees of freedom are within 2.776 standard errors.
    differences = np.array([0.1, 0.3, 0.2, 0.5, 0.4])
    found = _report.versus(list(base - differences), base)
    error = differences.std(ddof=1) / np.sqrt(5)
    assert found.difference == pytest.approx(0.3)
    assert found.bound == pytest.approx(2.776445 * error, rel=1e-5)
    assert _report.versus([*base[1:], None], base).verdict == "diverges"


# The pages ---------------------------------------------------------------------------


LINK = re.compile(r'\((?:evidence\.md)?#([\w-]+) "([a-z ]+)"\)')


def verdicts() -> dict[str, str]:
    """What each row of the tables says against the mean, by its anchor."""
    found = {}
    for path in FOLDER.glob("quality_*.json"):
        content = json.loads(path.read_text())
        if content["name"] == front.NAME:
            continue
        first = next(iter(content["measures"]))
        base = content["rows"]["mean"]["measures"][first]
        for name, row in content["rows"].items():
            versus = _report.versus(row["measures"][first], base)
            found[_report.slug(content["name"], name)] = versus.verdict
    return found


@pytest.mark.parametrize("page", ["evidence.md", "choose.md"])
def test_what_the_pages_say_is_in_the_tables(page):
    """A link to a row has the verdict for its title."""
    found = verdicts()
    links = LINK.findall((DOCS / page).read_text())
    assert len(links) > 10
    assert {slug: found.get(slug) for slug, _ in links} == dict(links)


def test_every_anchor_exists():
    pages = {path.name: path.read_text() for path in DOCS.glob("*.md")}
    anchors = set(re.findall(r'<a id="([\w-]+)"', pages["evidence.md"]))
    for page in ("evidence.md", "choose.md"):
        for file, anchor in re.findall(r"\]\(([\w.]*)#([\w-]+)", pages[page]):
            if (file or page) == "evidence.md":
                titles = re.findall(r"^#+ (.*)$", pages["evidence.md"], re.MULTILINE)
                plain = {re.sub(r"[^\w -]", "", t.lower()) for t in titles}
                assert anchor in anchors | {t.replace(" ", "-") for t in plain}
