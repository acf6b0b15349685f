"""What MkDocs does not do by itself: pages from files outside of `docs`."""

import ast
import re
import textwrap
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# Files of the repository that are taken as they are, and where they are on the site.
TAKEN = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    **{
        f"benchmarks/results/{path.name}": f"benchmarks/{path.name}"
        for path in sorted((ROOT / "benchmarks" / "results").glob("*"))
        if path.suffix in {".md", ".png"}
    },
}
LINK = re.compile(
    r"(?<=\]\()(?:\.\./)*((?:benchmarks/results/|examples/|[A-Z]+\.md)[^)#]*)"
)
# A picture on a line of its own.
PICTURE = re.compile(r"^(!\[[^\]]*\]\(([^)\s]+)\))$", re.MULTILINE)
GUIDE = re.compile(r"\bdocs/(\w+\.md)\b")
# Those that were run: `make docs-examples`.
EXAMPLES = sorted(path.parent for path in ROOT.glob("docs/examples/*/output.txt"))
PAGES = TAKEN | {f"examples/{x.name}.py": f"examples/{x.name}.md" for x in EXAMPLES}

COMMANDS = re.compile(r"(?:^    \S.*\n)+", re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the examples to the navigation, behind the methods."""
    pages = [{f"{kept.name}.py": f"examples/{kept.name}.md"} for kept in EXAMPLES]
    names = [next(iter(entry)) for entry in config.nav]
    config.nav.insert(names.index("Methods") + 1, {"Examples": pages})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Take in the changelog, the notes for contributors, measurements and examples."""
    for source, page in TAKEN.items():
        file = File.generated(config, page, abs_src_path=str(ROOT / source))
        # Pages of measurements come and go: others link to them.
        file.inclusion = InclusionLevel.NOT_IN_NAV
        files.append(file)
    for kept in EXAMPLES:
        page = f"examples/{kept.name}.md"
        files.append(File.generated(config, page, content=example(kept)))
    return files


def on_page_markdown(
    markdown: str, page: Page, config: MkDocsConfig, files: Files
) -> str:
    """Point links that leave `docs` at the pages made from those files.

    In the repository they lead to the file, on the site to its page. A picture is a
    link to itself, for narrow screens.
    """
    del config, files
    up = "../" * page.file.src_uri.count("/")
    markdown = LINK.sub(lambda match: up + PAGES.get(match[1], match[1]), markdown)
    return PICTURE.sub(r"[\1](\2)", markdown)


def fenced(commands: re.Match[str]) -> str:
    """Behind a list Markdown would take indented lines for a part of it."""
    return f"```sh\n{textwrap.dedent(commands[0]).rstrip()}\n```\n"


def example(kept: Path) -> str:
    """The page of an example: what it is, what it prints and draws, the program."""
    code = (ROOT / "examples" / f"{kept.name}.py").read_text()
    module = ast.parse(code)
    text = GUIDE.sub(r"[docs/\1](../\1)", ast.get_docstring(module) or "")
    body = code.splitlines()[module.body[1].lineno - 1 :]
    pictures = [
        f"![What {kept.name}.py draws]({kept.name}/{path.name})"
        for path in sorted(kept.glob("*.png"))
    ]
    return "\n\n".join(
        [
            f"# {kept.name}.py",
            COMMANDS.sub(fenced, text),
            "## What it prints",
            f"```text\n{(kept / 'output.txt').read_text().rstrip()}\n```",
            *pictures,
            "## The program",
            "\n".join(["```python", *body, "```"]),
        ]
    )
