"""The site has a place for every public name, and every page has its place."""

import importlib
import inspect
import operator
import re
from pathlib import Path

import pytest

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
    # Without importing them: they need Flax, matplotlib and torch.
    expected |= {f"jaxjd.nnx.{x}" for x in ("value_and_jac", "explain", "Jacobian")}
    expected |= {f"jaxjd.plot.{x}" for x in ("heat_map", "weights", "conflicts")}
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


def test_every_example_has_its_page_and_a_guide_that_links_to_it():
    pages = {x.name: x.read_text() for x in DOCS.glob("*.md")}
    listed = pages.pop("examples.md")
    for program in sorted((ROOT / "examples").glob("[!_]*.py")):
        assert (DOCS / "examples" / program.stem / "output.txt").exists()
        link = f"](../examples/{program.name})"
        assert link in listed
        assert any(link in text for text in pages.values()), program.name


def test_the_links_of_the_readme_lead_somewhere():
    """MkDocs checks those of the site."""
    for link in re.findall(r"\]\((?!http)([^)]+)\)", (ROOT / "README.md").read_text()):
        path, _, anchor = link.partition("#")
        assert (ROOT / path).exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.+)$", (ROOT / path).read_text(), re.MULTILINE)
            slugs = {
                re.sub(r"[^\w -]", "", x).lower().replace(" ", "-") for x in titles
            }
            assert anchor in slugs, link


def test_every_public_name_of_torchjd_is_on_its_page():
    """In the section of its module, beside names that exist here."""
    torchjd = pytest.importorskip("torchjd")
    page = (DOCS / "torchjd.md").read_text()
    modules = {"torchjd": torchjd} | {
        f"torchjd.{name}": importlib.import_module(f"torchjd.{name}")
        for name in ("aggregation", "autogram", "autojac", "linalg", "scalarization")
    }
    for title, module in modules.items():
        section = page.split(f"\n## {title}\n")[1].split("\n## ")[0]
        rows = re.findall(r"^\| (`.*?) \| (.*) \|$", section, re.MULTILINE)
        listed = [name for row in rows for name in re.findall(r"`(\w+)`", row[0])]
        assert sorted(listed) == sorted(module.__all__)
    for name in set(re.findall(r"\bjaxjd((?:\.\w+)+)", page)) - {".interop"}:
        assert operator.attrgetter(name[1:])(jaxjd) is not None


def test_every_paper_can_be_cited():
    """Each link of the table of aggregators is that of an entry, once."""
    table = (DOCS / "aggregators.md").read_text().split("\n## ")[0]
    papers = {
        link
        for row in re.findall(r"^\| `.*$", table, re.MULTILINE)
        for link in re.findall(r"\]\((http[^)]+)\)", row)
    }
    page = (DOCS / "citation.md").read_text()
    assert sorted(re.findall(r"url += \{(.+)\}", page)) == sorted(papers)
