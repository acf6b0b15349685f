"""Every page of the built site works in a real browser: `make docs-check`.

It needs Chromium, Debian's package `chromium` or another on the path.
"""

import functools
import http.server
import shutil
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

import pytest

pytestmark = pytest.mark.browser

SITE = Path(__file__).parents[1] / "out" / "site"
PAGES = sorted(
    str(path.parent.relative_to(SITE)) + "/" for path in SITE.rglob("index.html")
)
WIDTHS = (390, 1440)
# WCAG's level AA, for normal and for large text.
CONTRAST, CONTRAST_LARGE = 4.5, 3.0


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        del args


class Server(http.server.ThreadingHTTPServer):
    def handle_error(self, *args: object) -> None:
        """The browser leaves when it has what it wants: that is no error."""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    assert PAGES, "Build the site first: `make docs`."
    handler = functools.partial(Quiet, directory=str(SITE))
    server = Server(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    assert chromium, "Install Chromium, on Debian `apt-get install chromium`."
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(
            executable_path=chromium,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        yield started
        started.close()


@pytest.mark.parametrize("width", WIDTHS)
def test_pages_load_without_errors_and_fit(browser, address, width):
    """No message in the console, no request elsewhere, no sideways scrolling."""
    page = browser.new_page(viewport={"width": width, "height": 900})
    problems, where = [], ""
    page.on("console", lambda message: problems.append((where, message.text)))
    page.on("pageerror", lambda error: problems.append((where, str(error))))
    page.on("requestfailed", lambda request: problems.append((where, request.url)))

    def outside(request):
        if not request.url.startswith((address, "data:", "blob:")):
            problems.append((where, request.url))

    page.on("request", outside)
    for where in PAGES:
        page.goto(address + where)
        page.wait_for_load_state("networkidle")
        if page.evaluate("document.documentElement.scrollWidth") > width:
            problems.append((where, "wider than the window"))
    assert not problems


def test_equations_are_rendered(browser, address):
    page = browser.new_page()
    rendered = 0
    for where in PAGES:
        page.goto(address + where)
        marked = page.locator(".arithmatex").count()
        assert page.locator(".arithmatex .katex-html").count() == marked
        assert page.locator(".katex-error").count() == 0
        assert not page.evaluate(DOLLARS), where
        rendered += marked
    assert rendered > 100


# Text with a dollar sign, outside of code.
DOLLARS = """
() => {
  const article = document.querySelector("article").cloneNode(true);
  article.querySelectorAll("code, pre, .arithmatex").forEach(code => code.remove());
  return article.textContent.includes("$");
}
"""


class Found(HTMLParser):
    """The anchors and the links of a page."""

    def __init__(self, html: str):
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.anchors |= {given[k] for k in ("id", "name") if given.get(k)}
        self.links |= {given[k] for k in ("href", "src") if given.get(k)}


def test_no_link_or_anchor_is_dead():
    found = {page: Found((SITE / page / "index.html").read_text()) for page in PAGES}
    root = "http://site/"
    dead = []
    for page, here in found.items():
        for link in here.links:
            target, anchor = urldefrag(urljoin(root + page.removeprefix("./"), link))
            if not target.startswith(root):
                continue
            path = unquote(target.removeprefix(root))
            file = SITE / path
            if not (file.is_file() or (file / "index.html").is_file()):
                dead.append((page, link))
            elif anchor and unquote(anchor) not in found[path or "./"].anchors:
                dead.append((page, link))
    assert not dead


def test_search_finds(browser, address):
    page = browser.new_page(viewport={"width": 1440, "height": 900})
    page.goto(address)
    page.locator("input.md-search__input").click()
    page.locator("input.md-search__input").press_sequentially("upgrad")
    page.wait_for_selector(".md-search-result__link")
    links = page.locator(".md-search-result__link").evaluate_all(
        "links => links.map(link => link.getAttribute('href'))"
    )
    assert any("jaxjd.upgrad" in link for link in links)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_legible(browser, address, scheme):
    """The contrast of every piece of text with what is behind it."""
    context = browser.new_context(color_scheme=scheme, reduced_motion="reduce")
    page = context.new_page()
    faint = set()
    for where in PAGES:
        page.goto(address + where)
        assert page.evaluate("document.body.dataset.mdColorScheme") == (
            "slate" if scheme == "dark" else "default"
        )
        for text, contrast, large in page.evaluate(CONTRASTS):
            if contrast < (CONTRAST_LARGE if large else CONTRAST):
                faint.add((where, text, round(contrast, 2)))
    assert not faint


# Colours are painted on a canvas and read back, whatever their notation.
CONTRASTS = """
() => {
  const pen = Object.assign(document.createElement("canvas"), {width: 1, height: 1})
    .getContext("2d", {willReadFrequently: true});
  const rgba = colour => {
    pen.clearRect(0, 0, 1, 1);
    pen.fillStyle = colour;
    pen.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = pen.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = (top, below) =>
    [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3])).concat([1]);
  const luminance = colour => {
    const [r, g, b] = colour.slice(0, 3).map(x => x / 255)
      .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = element => {
    const layers = [];
    for (let e = element; e; e = e.parentElement)
      layers.push(rgba(getComputedStyle(e).backgroundColor));
    const white = [255, 255, 255, 1];
    return layers.reverse().reduce((below, top) => over(top, below), white);
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; node = walker.nextNode();) {
    const element = node.parentElement;
    if (!node.textContent.trim() || !element.checkVisibility({
      checkOpacity: true, checkVisibilityCSS: true})) continue;
    if (element.closest("script, style, .katex-mathml, .md-search, .md-skip")) continue;
    const box = element.getBoundingClientRect();
    if (box.width < 2 || box.height < 2) continue;
    const style = getComputedStyle(element), below = behind(element);
    let alpha = 1;
    for (let e = element; e; e = e.parentElement) alpha *= getComputedStyle(e).opacity;
    const colour = rgba(style.color);
    colour[3] *= alpha;
    const a = luminance(over(colour, below)), b = luminance(below);
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    found.push([node.textContent.trim().slice(0, 40),
      (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), large]);
  }
  return found;
}
"""
