"""The example finds what is known of its problems."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pareto_front = pytest.importorskip("examples.pareto_front")


def test_a_short_run(tmp_path, monkeypatch, capsys):
    """By STCH, which compiles quickly. Preferences spread, starting points do not."""
    name = "FF"
    monkeypatch.setattr(pareto_front, "METHODS", {"stch": pareto_front.METHODS["stch"]})
    problems = {name: pareto_front.PROBLEMS[name]}
    monkeypatch.setattr(pareto_front, "PROBLEMS", problems)
    folder = tmp_path / "new"
    found = pareto_front.main(
        ["--runs", "5", "--steps", "1000", "--output", str(folder)]
    )
    assert list(found) == [(name, "stch")]
    front = problems[name].front
    scores = {
        over: pareto_front.igd(front, x) for over, x in found[name, "stch"].items()
    }
    assert scores["preferences"] < 0.1 < 0.3 < scores["starting points"]
    shown = capsys.readouterr().out
    assert all(f"{score:.3f}" in shown for score in scores.values())
    png = (folder / "pareto_front.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert len(png) > 10_000


@pytest.mark.parametrize("name", pareto_front.PROBLEMS)
def test_nothing_is_below_the_front(name):
    """And some points are on it: those whose loss f1 is known to be optimal."""
    problem = pareto_front.PROBLEMS[name]
    keys = jax.random.split(jax.random.key(0), 2000)
    draw = lambda key: jax.random.uniform(  # noqa: E731
        key, (problem.n,), float, problem.low, problem.high
    )
    losses = jax.vmap(lambda key: problem.losses(draw(key)))(keys)
    assert not problem.clipped or problem.low == 0
    on_front = np.interp(
        losses["f1"], *problem.front[np.argsort(problem.front[:, 0])].T
    )
    assert (np.asarray(losses["f2"]) >= on_front - 1e-3).all()
    if name == "FF":
        t = np.linspace(-1, 1, 11) / np.sqrt(3)
        points = [problem.losses(jnp.full(3, x)) for x in t]
    elif name == "ZDT1":
        points = [problem.losses(jnp.zeros(30).at[0].set(x)) for x in (0.1, 0.5, 1)]
    else:
        points = [problem.losses(jnp.full(30, -20.0).at[0].set(z)) for z in (-1, 0, 1)]
    for point in points:
        f1, f2 = float(point["f1"]), float(point["f2"])
        away = np.linalg.norm(problem.front - np.array([f1, f2]), axis=1).min()
        assert away < 5e-3


def test_distances_are_those_to_the_nearest_run():
    front = np.array([[0.0, 1.0], [1.0, 0.0]])
    assert pareto_front.igd(front, front[::-1]) == 0
    assert pareto_front.igd(front, np.array([[0.0, 0.0]])) == pytest.approx(1)


def test_refuses_bad_options(capsys):
    with pytest.raises(SystemExit) as error:
        pareto_front.main(["--runs", "0"])
    assert error.value.code == 2
    assert "--runs and --steps: expected at least 1" in capsys.readouterr().err
