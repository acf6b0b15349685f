"""Steps on 8 devices are those on one: losses, Gramian, weights and update."""

import json
import pathlib
import socket
import subprocess
import sys

import jax
import pytest

ROOT = pathlib.Path(__file__).parents[2]
BOUNDS = {"float32": 1e-5, "float64": 1e-12}
# On the oldest JAX, arrays on Explicit axes need their mesh as context.
EXPLICIT = "Explicit" if hasattr(jax, "set_mesh") else "Explicit+context"


def start(kind, models, layouts, methods, dtype) -> subprocess.Popen:
    arguments = (kind, models, layouts, methods, dtype)
    command = [sys.executable, "-m", "tests.sharding.program", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def check(process: subprocess.Popen, dtype: str) -> None:
    output, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    found = json.loads(output.splitlines()[-1])
    assert found
    wrong = {
        name: parts
        for name, parts in found.items()
        if isinstance(parts, str) or max(parts.values()) > BOUNDS[dtype]
    }
    assert not wrong


def test_steps():
    """A few of all combinations, with what has gone wrong before."""
    of_auto = start("Auto", "CNN,heads", "data", "dense", "float64")
    # Axes are Auto inside of its lookup, which the context must not contradict.
    kind = "Explicit+context"
    of_explicit = start(kind, "transformer", "2-D", "structured", "float64")
    check(of_auto, "float64")
    check(of_explicit, "float64")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", ["Auto", "Explicit+context", EXPLICIT])
@pytest.mark.parametrize("models", ["MLP", "CNN", "transformer", "heads"])
def test_every_step(kind, models, dtype):
    methods = "structured,dense,chunked"
    if models != "heads":
        methods += ",structured 16,chunked 16"
    layouts = "data,FSDP,tensor,2-D"
    check(start(kind, models, layouts, methods, dtype), dtype)


@pytest.mark.slow
def test_two_processes():
    """Each with four devices, over gloo, as on two machines."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    module = "tests.sharding.two_processes"
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, port, str(number)],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for number in range(2)
    ]
    try:
        for process in processes:
            output, errors = process.communicate(timeout=200)
            assert process.returncode == 0, errors[-3000:]
            assert float(output.splitlines()[-1]) < 1e-5
    finally:
        for process in processes:
            process.kill()
