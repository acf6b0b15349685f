"""A row of the parity report: a computation, its result and its bound."""

import dataclasses
import math
from collections.abc import Callable, Mapping

from .precision import Precision


@dataclasses.dataclass(frozen=True)
class Check:
    """One computation that both libraries do.

    `difference` runs it in one precision and returns the largest relative difference.
    `bounds` says how large that may be. `quick` says whether `--quick` includes it.
    """

    group: str
    name: str
    difference: Callable[[Precision], float]
    bounds: Mapping[Precision, float]
    quick: bool = True

    def measure(self, precision: Precision) -> "Measurement":
        return Measurement(self.difference(precision), self.bounds[precision])


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A value and its bound. The bound is inclusive, so it may be 0."""

    value: float
    bound: float

    @property
    def passed(self) -> bool:
        return math.isfinite(self.value) and self.value <= self.bound
