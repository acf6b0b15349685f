"""Tables of the results, and what they say against the mean."""

import json
import math
import pathlib
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

BASELINE = "mean"


class Versus(NamedTuple):
    """How a method compares with the mean."""

    difference: float
    """Positive if the method is better."""
    bound: float
    """Half of the 95% interval of the difference over seeds, by Student's t."""

    @property
    def verdict(self) -> str:
        if not math.isfinite(self.difference):
            return "diverges"
        if abs(self.difference) <= self.bound:
            return "within noise"
        return "better" if self.difference > 0 else "worse"


def versus(values: list[Any], baseline: list[Any]) -> Versus:
    """Compare seed by seed: a seed has the same start and batches for all methods.

    Lower is better, in everything that is measured.
    """
    ours, theirs = (np.array(x, float) for x in (values, baseline))
    differences = theirs - ours
    if not np.isfinite(differences).all():
        return Versus(math.nan, math.nan)
    error = differences.std(ddof=1) / math.sqrt(len(differences))
    bound = stats.t.ppf(0.975, len(differences) - 1) * error
    return Versus(float(differences.mean()), float(bound))


def number(values: list[Any], percent: bool) -> str:
    """Mean and standard deviation over the seeds."""
    array = np.array(values, float)
    if not np.isfinite(array).all():
        return "not finite"
    mean, spread = array.mean(), array.std(ddof=1)
    if percent:
        return f"{100 * mean:.1f} ± {100 * spread:.1f}"
    return f"{mean:.3f} ± {spread:.3f}"


def slug(problem: str, method: str) -> str:
    """The anchor of a row."""
    plain = "".join(c if c.isalnum() else " " for c in f"{problem} {method}".lower())
    return "-".join(plain.split())


def ranked(content: dict[str, Any]) -> list[str]:
    """The methods, the best first."""
    first = next(iter(content["measures"]))

    def key(name: str) -> float:
        mean = np.mean(np.array(content["rows"][name]["measures"][first], float))
        return float(mean) if math.isfinite(mean) else math.inf

    return sorted(content["rows"], key=key)


def relative_cost(row: dict[str, Any], baseline: dict[str, Any]) -> str:
    if "processor_s" not in row or "processor_s" not in baseline:
        return "-"
    return f"{row['processor_s'] / baseline['processor_s']:.1f}"


def cells(content: dict[str, Any]) -> list[list[str]]:
    """The header and the rows of the table of a problem, the best method first."""
    about = content["measures"]
    first = next(iter(about))

    def shown(of: dict[str, Any], measure: str) -> str:
        return number(of["measures"][measure], about[measure]["percent"])

    def against(name: str, of: dict[str, Any], other: dict[str, Any]) -> str:
        pair = of["measures"][first], other["measures"][first]
        return "" if name == BASELINE else versus(*pair).verdict

    timed = "equal_time" in content["rows"][BASELINE]
    units = {name: ", %" if x["percent"] else "" for name, x in about.items()}
    header = ["method", *(x["heading"] + units[name] for name, x in about.items())]
    header += ["against the mean"]
    if timed:
        header += ["in the time of the mean", "against the mean"]
    table = [[*header, "rate", "cost"]]
    baseline = content["rows"][BASELINE]
    for name in ranked(content):
        row = content["rows"][name]
        verdict = against(name, row, baseline)
        line = [f'<a id="{slug(content["name"], name)}"></a>{name}']
        line += [shown(row, measure) for measure in about]
        line += [verdict]
        if verdict == "better":
            line[1] = f"**{line[1]}**"
        if timed:
            equal = row["equal_time"], baseline["equal_time"]
            later = against(name, *equal)
            text = shown(equal[0], first)
            line += [f"**{text}**" if later == "better" else text, later]
        cost = relative_cost(row, baseline)
        line += [f"{content['rates'][row['best']]:g}", cost]
        table.append(line)
    return table


def markdown(table: list[list[str]]) -> str:
    header, *rows = table
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def glance(contents: list[dict[str, Any]], methods: list[str]) -> list[list[str]]:
    """How much each method changes what each problem measures first, if not by noise.

    Each number is relative to the mean gradient's, bold where the method is better.
    """
    names = [content["name"].replace("_", " ") for content in contents]
    table = [["method", *names]]
    for method in methods:
        line = [method]
        for content in contents:
            if method not in content["rows"]:
                line.append("")
                continue
            first = next(iter(content["measures"]))
            ours, base = (
                content["rows"][x]["measures"][first] for x in (method, BASELINE)
            )
            verdict = versus(ours, base).verdict
            if verdict in ("better", "worse"):
                change = np.mean(ours) / np.mean(base) - 1
                digits = 0 if abs(change) >= 0.095 else 1
                text = f"{100 * change:+.{digits}f}%".replace("-", "\u2212")
                target = f"#{slug(content['name'], method)}"
                text = f"[{text}]({target})"
                line.append(f"**{text}**" if verdict == "better" else text)
            else:
                line.append("≈" if verdict == "within noise" else verdict)
        table.append(line)
    return table


def setting(content: dict[str, Any]) -> str:
    """One line on what was run where."""
    rates = ", ".join(f"{rate:g}" for rate in content["rates"])
    return (
        f"{content['num_losses']} losses, {content['parameters']:,} parameters, "
        f"{content['steps']:,} steps, {content['seeds']} seeds, rates {rates}. "
        f"{content['machine']}"
    )


def text(content: dict[str, Any]) -> str:
    return "\n\n".join(
        [f"# {content['title']}", setting(content), markdown(cells(content))]
    )


def write(folder: pathlib.Path, content: dict[str, Any]) -> None:
    """Save the results of a problem, for programs and for readers."""
    save(folder, content)
    path = folder / f"quality_{content['name']}.md"
    path.write_text(text(content) + "\n")


def save(folder: pathlib.Path, content: dict[str, Any]) -> None:
    """One method a line."""
    folder.mkdir(parents=True, exist_ok=True)
    head = {name: value for name, value in content.items() if name != "rows"}
    lines = [
        f"{json.dumps(name)}: {json.dumps(row)}"
        for name, row in content["rows"].items()
    ]
    body = json.dumps(head)[:-1] + ',\n"rows": {\n' + ",\n".join(lines) + "\n}}\n"
    (folder / f"quality_{content['name']}.json").write_text(body)


def read(folder: pathlib.Path, name: str) -> dict[str, Any] | None:
    path = folder / f"quality_{name}.json"
    return json.loads(path.read_text()) if path.exists() else None
