"""Run an example with few steps, and look at what it leaves behind."""

import importlib

import pytest


def example(name):
    """The program `examples/NAME.py`; skips the tests if it lacks a package."""
    for package in ("matplotlib", "rich", "sklearn"):
        pytest.importorskip(package)
    return importlib.import_module(f"examples.{name}")


def run(program, folder, *arguments):
    """What `main` returns. It must make the folder and draw the figure."""
    output = folder / "new"
    result = program.main([*arguments, "--output", str(output)])
    png = (output / f"{program.__name__.split('.')[-1]}.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert len(png) > 5_000
    return result
