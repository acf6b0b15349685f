"""The site has a place for every public name, and every page has its place."""

import inspect
import re
from pathlib import Path

import jaxjd

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
REFERENCE = [
    name
    for page in sorted((DOCS / "api").glob("*.md"))
    for name in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.MULTILINE)
]


def test_every_public_name_is_in_the_reference():
    """Each once, and no name that does not exist."""
    expected = {f"jaxjd.{name}" for name in dir(jaxjd)} - {"jaxjd.__version__"}
    for module in (jaxjd.weighting, jaxjd.scalarization, jaxjd.solvers):
        # Their types are on the same page by the name in `jaxjd`.
        expected |= {
            f"{module.__name__}.{name}"
            for name, value in vars(module).items()
            if not name.startswith("_") and not inspect.ismodule(value)
        } - {"jaxjd.weighting.Weighting", "jaxjd.scalarization.Scalarizer"}
    # Without importing them: they need Flax and torch.
    expected |= {f"jaxjd.nnx.{x}" for x in ("value_and_jac", "explain", "Jacobian")}
    exported = (ROOT / "interop" / "__init__.py").read_text()
    expected |= {"interop"} | {
        f"interop.{name}" for name in re.findall(r"import (\w+) as \1", exported)
    }
    assert sorted(REFERENCE) == sorted(expected)


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1]
    listed = re.findall(r"([\w/]+\.md)$", navigation, re.MULTILINE)
    pages = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    assert pages <= set(listed)
    assert len(listed) == len(set(listed))
