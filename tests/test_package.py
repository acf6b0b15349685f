"""The package agrees with its metadata, and its public names are documented."""

import inspect
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import jaxjd

ROOT = Path(__file__).parents[1]


def test_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert jaxjd.__version__ == project["version"] == version("jaxjd")
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {jaxjd.__version__}\n" in citation


def test_core_dependencies():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {dependency.split(">=")[0] for dependency in project["dependencies"]}
    assert names == {"jax", "jaxlib", "optax", "jaxtyping"}


def test_importing_needs_the_core_only():
    code = (
        "import sys, jaxjd\n"
        "extras = {'flax', 'torch', 'torchjd', 'matplotlib', 'quadprog', 'rich'}\n"
        "assert not extras & set(sys.modules), extras & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_public_names():
    """`dir` lists only public names, and each of them is on a page."""
    assert all(not name.startswith("_") or name == "__version__" for name in dir(jaxjd))
    names = set(dir(jaxjd)) - {"__version__"}
    assert not names & {"engine", "jacobian", "transform", "importlib", "typing"}
    pages = "".join(
        path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
    )
    hidden = {n for n in names if f"`{n}`" not in pages and f"jaxjd.{n}" not in pages}
    # Types may be missing: users meet them as return values.
    assert {name for name in hidden if not name[0].isupper()} == set()


def test_interop_without_torch_says_what_to_install():
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "try:\n"
        "    import interop\n"
        "except ImportError as error:\n"
        "    assert 'pip install' in str(error) and 'torch' in str(error), error\n"
        "else:\n"
        "    raise AssertionError('it was imported')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_what_the_wheel_installs(tmp_path):
    """The wheel's only top-level package is `jaxjd`, which contains `interop`."""
    builder = pytest.importorskip("hatchling.builders.wheel")
    (wheel,) = builder.WheelBuilder(str(ROOT)).build(
        directory=str(tmp_path), versions=["standard"]
    )
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"jaxjd"}
    assert {"jaxjd/py.typed", "jaxjd/interop/__main__.py"} <= set(names)
    assert not any("__pycache__" in name for name in names)


def test_everything_public_is_documented():
    missing = []
    for module in (jaxjd, jaxjd.weighting, jaxjd.solvers):
        for name, value in vars(module).items():
            if name.startswith("_") or inspect.ismodule(value):
                continue
            if not (inspect.getdoc(value) or "").strip():
                missing.append(f"{module.__name__}.{name}")
    for name, value in vars(jaxjd.Jacobian).items():
        if callable(value) and not name.startswith("_") and not value.__doc__:
            missing.append(f"Jacobian.{name}")
    assert not missing


def test_an_unknown_name():
    with pytest.raises(
        AttributeError, match="module 'jaxjd' has no attribute 'upgard'"
    ):
        _ = jaxjd.upgard
