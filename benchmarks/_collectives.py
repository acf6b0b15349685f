"""What devices send each other, read from a compiled program."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "reduce-scatter",
)
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}
_LINE = re.compile(rf"= (\S+|\(.*?\)) ({'|'.join(KINDS)})(?:-start)?\(")
_TYPE = re.compile(r"\b(\w+)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:body|condition|to_apply|calls)=%?([\w.\-]+)")


class Collective(NamedTuple):
    """One collective: the bytes of its result on each device, and where it is."""

    kind: str
    num_bytes: int
    in_loop: bool


def collectives(hlo: str) -> list[Collective]:
    """All collectives of a program that XLA has compiled for several devices."""
    parts = _computations(hlo)
    in_loops = _called_in_loops(parts)
    found = []
    for name, lines in parts.items():
        for line in lines:
            match = _LINE.search(line)
            if match:
                size = sum(_sizes(match[1]))
                found.append(Collective(match[2], size, name in in_loops))
    return found


def _sizes(type_: str) -> Iterator[int]:
    for name, dims in _TYPE.findall(type_):
        numbers = math.prod(int(d) for d in dims.split(",") if d)
        yield numbers * BYTES.get(name, 8)


def _computations(hlo: str) -> dict[str, list[str]]:
    """The lines of each computation, by its name."""
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line in hlo.splitlines():
        if line and not line[0].isspace() and line.endswith("{"):
            words = line.split()
            name = words[1] if words[0] == "ENTRY" else words[0]
            current = found.setdefault(name.lstrip("%"), [])
        else:
            current.append(line)
    return found


def _called_in_loops(parts: dict[str, list[str]]) -> set[str]:
    """The bodies and conditions of loops, and whatever these call."""
    waiting = [
        name
        for lines in parts.values()
        for line in lines
        if " while(" in line
        for name in re.findall(r"(?:body|condition)=%?([\w.\-]+)", line)
    ]
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            lines = parts.get(name, [])
            waiting += [called for line in lines for called in _CALLED.findall(line)]
    return seen
