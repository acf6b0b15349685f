"""Every program has `--help`, and refuses to train for no step at all."""

import contextlib
from pathlib import Path

import pytest

from tests.examples.running import example

NAMES = sorted(x.stem for x in Path(__file__).parents[2].glob("examples/[!_]*.py"))
STEPS = {"mnist_iwrm": "--epochs", "vector_reward_rl": "--updates"}
# They do more than show one use.
LONG = {"data_parallel", "mnist_iwrm", "trajectories"}


def program(name):
    with contextlib.suppress(ModuleNotFoundError):
        return example(name)
    pytest.skip(f"{name} lacks a package")


@pytest.mark.parametrize("name", NAMES)
def test_no_steps_are_refused(name, capsys):
    option = STEPS.get(name, "--steps")
    with pytest.raises(SystemExit) as error:
        program(name).main([option, "0"])
    assert error.value.code == 2
    shown = capsys.readouterr().err.splitlines()[-1]
    assert option in shown
    assert "at least" in shown


@pytest.mark.parametrize("name", NAMES)
def test_help_says_what_is_the_default(name, capsys):
    option = STEPS.get(name, "--steps")
    with pytest.raises(SystemExit) as error:
        program(name).main(["--help"])
    assert error.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "default: " in shown[shown.index(f"{option} ", shown.index("options:")) :]


@pytest.mark.parametrize("name", sorted(set(NAMES) - LONG))
def test_is_short(name):
    path = Path(__file__).parents[2] / "examples" / f"{name}.py"
    assert len(path.read_text().splitlines()) <= 150
