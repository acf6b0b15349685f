"""The trajectories are right, and no aggregator is missing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.weighting.registry import AGGREGATORS, OF_LOSSES

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
trajectories = pytest.importorskip("examples.trajectories")

SOME = ("mean", "sum", "excess_mtl")


@pytest.fixture(scope="module")
def descents_and_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "new"
    with pytest.MonkeyPatch.context() as monkeypatch:
        some = {name: trajectories.METHODS[name] for name in SOME}
        monkeypatch.setattr(trajectories, "METHODS", some)
        return trajectories.main(["--steps", "3", "--output", str(folder)]), folder


def test_every_path_has_its_steps(descents_and_folder):
    descents, _ = descents_and_folder
    assert list(descents) == ["EWQ", "CQF"]
    for column in descents.values():
        assert tuple(one.method for one in column) == SOME
        for one in column:
            assert one.paths.shape == (5, 4, 2)
            assert np.isfinite(one.paths).all()
            assert one.seconds > 0


def test_the_mean_descends_as_computed_by_hand(descents_and_folder):
    """On EWQ each step of the mean shrinks the parameters by the learning rate."""
    descents, _ = descents_and_folder
    mean, total, _ = descents["EWQ"]
    start = mean.paths[:, 0]
    np.testing.assert_allclose(start[0], [3, -2])
    end = start * (1 - 0.075) ** 3
    np.testing.assert_allclose(mean.paths[:, -1], end, rtol=1e-5)
    np.testing.assert_allclose(total.paths, mean.paths, rtol=1e-5)  # Half the rate.
    # The front is the origin.
    distance = np.linalg.norm(end**2, axis=1).mean()
    assert mean.distance == pytest.approx(distance, rel=1e-5)


def test_draws_a_figure_per_problem(descents_and_folder):
    _, folder = descents_and_folder
    for name in ("ewq", "cqf"):
        png = (folder / f"trajectories_{name}.png").read_bytes()
        assert png.startswith(b"\x89PNG")
        assert len(png) > 10_000


def test_the_table_shows_the_numbers(descents_and_folder):
    descents, _ = descents_and_folder
    table = trajectories.results_table(descents)
    names, ewq, _, cqf, _ = [list(column.cells) for column in table.columns]
    assert names == list(SOME)
    assert ewq == [f"{one.distance:.2e}" for one in descents["EWQ"]]
    assert cqf == [f"{one.distance:.2e}" for one in descents["CQF"]]
    assert str(table.columns[1].header) == "EWQ after\n3 steps"


def test_the_pareto_set_is_where_the_gradients_are_opposed():
    problem = trajectories.convex_quadratic_form()
    # Near each end one gradient vanishes and is only rounding.
    points = jnp.asarray(problem.pareto_set[400:-400])
    gradients = jax.vmap(jax.jacrev(problem.losses))(points)
    first, second = np.moveaxis(np.asarray(gradients), 1, 0)
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    np.testing.assert_allclose((first * second).sum(1) / norms, -1, atol=1e-5)
    ends = problem.pareto_set[[0, -1]]
    np.testing.assert_allclose(ends, [[-1, 0], [1, 0]], atol=1e-3)


def test_distances_are_those_to_the_front():
    problem = trajectories.convex_quadratic_form()
    between = problem.pareto_set[[700, 1000, 1300]]
    assert trajectories.distance_to_front(problem, between) < 1e-5
    worse = np.array([[3.0, 0.0]])
    losses = np.asarray(problem.losses(jnp.asarray(worse[0])))
    front = np.asarray(jax.vmap(problem.losses)(jnp.asarray(problem.pareto_set)))
    nearest = np.linalg.norm(front - losses, axis=1).min()
    distance = trajectories.distance_to_front(problem, worse)
    assert distance == pytest.approx(nearest, rel=1e-3)
    assert distance > 1


def test_no_aggregator_is_forgotten():
    others = {"constant", "krum", "momentum_conflict_free", "trimmed_mean"}
    assert set(AGGREGATORS) - set(trajectories.METHODS) == others | set(OF_LOSSES)
    start = jnp.zeros(2)
    for method in trajectories.METHODS.values():
        method.make().init(start)


@pytest.mark.parametrize("steps", ["0", "-1", "1.5", "many"])
def test_refuses_bad_options(steps, capsys):
    with pytest.raises(SystemExit) as error:
        trajectories.main(["--steps", steps])
    assert error.value.code == 2
    shown = capsys.readouterr().err
    assert f"--steps: expected an integer of at least 1, got '{steps}'" in shown


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as error:
        trajectories.main(["--help"])
    assert error.value.code == 0
    shown = capsys.readouterr().out
    assert "--steps" in shown
    assert "--output" in shown
