"""Run the examples, and keep what they print and draw for their pages on the site.

    python -m docs.run_examples                # all of them
    python -m docs.run_examples trajectories   # some

Each runs as a user would run it, in an empty folder. What it prints, and its pictures,
are in `docs/examples/NAME`. `docs/hooks.py` makes a page of the program and of these.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "docs" / "examples"
NAMES = sorted(path.stem for path in (ROOT / "examples").glob("[!_]*.py"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    for name in parser.parse_args().names or NAMES:
        if name not in NAMES:
            parser.error(f"no example {name!r}")
        print(f"running {name}", flush=True)
        keep(name)


def keep(name: str) -> None:
    environment = {"PYTHONPATH": str(ROOT), "COLUMNS": "100", "NO_COLOR": "1"}
    with tempfile.TemporaryDirectory() as folder:
        ran = subprocess.run(
            [sys.executable, str(ROOT / "examples" / f"{name}.py")],
            cwd=folder,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        kept = KEPT / name
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir(parents=True)
        lines = [line.rstrip() for line in ran.stdout.splitlines()]
        (kept / "output.txt").write_text("\n".join(lines).strip("\n") + "\n")
        for picture in sorted(Path(folder).rglob("*.png")):
            shutil.copy(picture, kept)


if __name__ == "__main__":
    main()
