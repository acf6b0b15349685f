"""The programs that show how to use several devices run, and say the same as one."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from tests.xla import FLAGS

ROOT = pathlib.Path(__file__).parents[2]


def run(*command: str, devices: int = 8) -> str:
    flags = FLAGS.replace("device_count=4", f"device_count={devices}")
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_program_of_the_docs():
    text = (ROOT / "docs" / "devices.md").read_text()
    (program,) = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.M)
    on_all, alone = (float(run("-c", program, devices=n)) for n in (8, 1))
    # It starts at 1.4, and differs by the rounding of 200 steps.
    assert on_all < 0.3
    assert abs(on_all - alone) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_example(processes):
    pytest.importorskip("mlxtend")
    options = ("--steps=3", "--batch-size=16", f"--processes={processes}")
    shown = run("examples/data_parallel.py", *options)
    rows = re.findall(r"(UPGrad|SGD) .*?(\d+e-\d+)", shown)
    assert [name for name, _ in rows] == ["UPGrad", "SGD"]
    assert all(float(difference) < 1e-5 for _, difference in rows)


def test_example_refuses_batches_that_devices_cannot_share():
    pytest.importorskip("mlxtend")
    command = [sys.executable, "examples/data_parallel.py", "--batch-size=12"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "--batch-size: expected a multiple of 8, got 12" in done.stderr
