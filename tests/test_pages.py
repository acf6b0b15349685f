"""Every block of code on the site runs, and prints what the page shows.

The blocks of a page are one program. What stands in a comment that begins with `setup`
runs too, but is not shown. `README.md` has a test of its own, and so has the program of
`docs/devices.md`, in `tests/sharding`.
"""

import contextlib
import io
import re
from pathlib import Path

import jax
import pytest

from tests.test_doctests import ToTheDigitsShown

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(
    r"^(?:```python|<!-- setup)\n(?P<code>.*?)^(?:```|-->)$"
    r"(?:\n\n```text\n(?P<output>.*?)^```$)?",
    re.DOTALL | re.MULTILINE,
)
PAGES = {
    str(path.relative_to(DOCS)): path.read_text()
    for path in sorted(DOCS.rglob("*.md"))
    if "```python" in path.read_text() and path.name != "devices.md"
}


# Together they take a minute.
@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page(page, monkeypatch, tmp_path):
    if "from flax" in PAGES[page]:
        pytest.importorskip("flax")
    if "import orbax" in PAGES[page]:
        pytest.importorskip("orbax.checkpoint")
    monkeypatch.chdir(tmp_path)  # Where files are written.
    names: dict[str, object] = {"__name__": "page"}
    text = PAGES[page]
    for block in BLOCK.finditer(text):
        # So that a traceback shows the line of the page.
        above = "\n" * (text[: block.start()].count("\n") + 1)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(above + block["code"], page, "exec"), names)
        if block["output"] is not None:
            shown, got = block["output"], printed.getvalue()
            assert ToTheDigitsShown().check_output(shown, got, 0), got
    jax.clear_caches()


@pytest.mark.parametrize("page", PAGES)
def test_all_code_is_found(page):
    """A block in another form would not run: `py` is for none of them."""
    fences = re.findall(r"^ *```(\w+)$", PAGES[page], re.MULTILINE)
    assert set(fences) <= {"python", "text", "sh", "bibtex"}
    code = [block for block in BLOCK.finditer(PAGES[page])]
    setups = PAGES[page].count("<!-- setup")
    assert len(code) == fences.count("python") + setups
