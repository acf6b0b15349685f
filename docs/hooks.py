"""What MkDocs does not do by itself: pages from files outside of `docs`."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# Where a file of the repository is on the site.
OUTSIDE = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    **{
        f"benchmarks/results/{path.name}": f"benchmarks/{path.name}"
        for path in sorted((ROOT / "benchmarks" / "results").glob("*"))
        if path.suffix in {".md", ".png"}
    },
}
LINK = re.compile(r"(?<=\]\()(?:\.\./)*((?:benchmarks/results/|[A-Z]+\.md)[^)#]*)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Take in the changelog, the notes for contributors and the measurements."""
    for source, page in OUTSIDE.items():
        file = File.generated(config, page, abs_src_path=str(ROOT / source))
        # Pages of measurements come and go: others link to them.
        file.inclusion = InclusionLevel.NOT_IN_NAV
        files.append(file)
    return files


def on_page_markdown(
    markdown: str, page: Page, config: MkDocsConfig, files: Files
) -> str:
    """Point links that leave `docs` at the pages made from those files.

    In the repository they lead to the file, on the site to its page.
    """
    del config, files
    up = "../" * page.file.src_uri.count("/")
    return LINK.sub(lambda match: up + OUTSIDE.get(match[1], match[1]), markdown)
