"""Draw the results of `benchmarks.tasks_quality`, seed by seed.

    python -m docs.draw_evidence

One panel for each of four problems. A dot is a seed, a line the mean of a method.
"""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks._results import FOLDER
from benchmarks.quality import _report

PROBLEMS = ("scales_unequal", "burgers", "multimnist", "instance_wise_noisy")
COLOURS = {"better": "tab:green", "worse": "tab:red", "within noise": "gray"}
WORST = 4  # Results more than this many times the mean gradient's are cut off.


def draw(axes: Axes, content: dict[str, Any]) -> None:
    first, about = next(iter(content["measures"].items()))
    baseline = np.array(content["rows"][_report.BASELINE]["measures"][first])
    names = _report.ranked(content)[::-1]
    factor = 100 if about["percent"] else 1
    for place, name in enumerate(names):
        values = content["rows"][name]["measures"][first]
        verdict = _report.versus(values, list(baseline)).verdict
        colour = "black" if name == _report.BASELINE else COLOURS.get(verdict, "gray")
        points = factor * np.array(values, float)
        axes.plot(points, np.full(len(points), place), ".", color=colour, alpha=0.35)
        axes.plot(points.mean(), place, "|", color=colour, markersize=10, mew=2)
    axes.axvline(factor * baseline.mean(), color="black", linewidth=0.5)
    axes.set_xlim(0, min(axes.get_xlim()[1], WORST * factor * baseline.mean()))
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_xlabel(about["heading"] + (", %" if about["percent"] else ""), fontsize=8)
    axes.set_title(content["title"], fontsize=9)


def main() -> None:
    found = [_report.read(FOLDER, name) for name in PROBLEMS]
    contents = [content for content in found if content is not None]
    figure = Figure(figsize=(11, 9), layout="constrained")
    panels = figure.subplots(2, 2).ravel()
    for axes, content in zip(panels, contents, strict=False):
        draw(axes, content)
    figure.savefig(Path(__file__).parent / "images" / "evidence.png", dpi=90)


if __name__ == "__main__":
    main()
