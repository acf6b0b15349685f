"""The problems on which `benchmarks.tasks_quality` compares the aggregators."""

from collections.abc import Callable
from functools import partial

from benchmarks.quality import burgers, scales
from benchmarks.quality._problem import Problem

# A problem reads its data when it is made.
PROBLEMS: dict[str, Callable[[], Problem]] = {
    "burgers": burgers.problem,
    "scales_equal": partial(scales.problem, (1, 1, 1)),
    "scales_unequal": partial(scales.problem, (1, 100, 10_000)),
}
