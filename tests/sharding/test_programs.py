"""The programs that show how to use several devices run, and say the same as one."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def run(*command: str) -> str:
    flags = "--xla_force_host_platform_device_count=8"
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


def test_program_of_the_docs():
    text = (ROOT / "docs" / "devices.md").read_text()
    (program,) = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.M)
    # The bound of the same program in the README.
    assert float(run("-c", program)) < 0.45


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
