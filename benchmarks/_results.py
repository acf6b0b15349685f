"""Save the tables to files."""

import json
import pathlib
from typing import Any

FOLDER = pathlib.Path(__file__).parent / "results"


def save(folder: pathlib.Path, name: str, text: str, content: dict[str, Any]) -> None:
    """Write Markdown for readers and JSON for programs."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(text + "\n")
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
