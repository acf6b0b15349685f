"""Time contenders, and describe the machine."""

import importlib.metadata
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


def alternating(
    contenders: dict[str, Callable[[], Any]], rounds: int
) -> dict[str, float]:
    """Median seconds of each contender, over rounds in which each one runs once.

    A contender must be compiled already, and must return only when its work is done.
    One that takes over half a second takes part in the first three rounds only.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name, contender in contenders.items():
            if number >= 3 and seconds[name][0] > 0.5:
                continue
            start = time.perf_counter()
            contender()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


class Timing(NamedTuple):
    """Median seconds, and the median ratio to a run of the baseline just before."""

    seconds: float
    ratio: float


def paired(
    contenders: dict[str, Callable[[], Any]], baseline: str, rounds: int
) -> dict[str, Timing]:
    """Time each contender right after the baseline, over rounds.

    What slows the machine down for a while then slows both. Each runs twice, and the
    second run counts: in training a step follows a step like itself, with the same
    arrays in the cache and the same pages of memory. A contender must be compiled
    already, and must return only when its work is done. One that takes over a fifth of
    a second takes part in the first five rounds only.
    """

    def run(name: str) -> float:
        contenders[name]()
        start = time.perf_counter()
        contenders[name]()
        return time.perf_counter() - start

    others = [name for name in contenders if name != baseline]
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in others}
    for number in range(rounds):
        for name in others:
            if number < 5 or pairs[name][0][1] <= 0.2:
                pairs[name].append((run(baseline), run(name)))
    found = {
        name: Timing(
            statistics.median(seconds for _, seconds in of),
            statistics.median(seconds / base for base, seconds in of),
        )
        for name, of in pairs.items()
    }
    before = [base for of in pairs.values() for base, _ in of]
    return {baseline: Timing(statistics.median(before), 1.0), **found}


def machine(packages: Sequence[str]) -> str:
    """Describe the processor, its cores and load, and the versions of the packages."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    versions = [f"Python {platform.python_version()}"]
    for package in packages:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return (
        f"{names[0] if names else platform.processor()} ({platform.machine()}), "
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {', '.join(versions)}"
    )
