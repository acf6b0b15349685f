"""The problems on which `benchmarks.tasks_quality` compares the aggregators."""

from collections.abc import Callable
from functools import partial

from benchmarks.quality import (
    burgers,
    helmholtz,
    instance_wise,
    language_model,
    multimnist,
    scales,
    vector_reward,
)
from benchmarks.quality._problem import Problem

# A problem reads its data when it is made.
PROBLEMS: dict[str, Callable[[], Problem]] = {
    "burgers": burgers.problem,
    "helmholtz": helmholtz.problem,
    "scales_equal": partial(scales.problem, (1, 1, 1)),
    "scales_unequal": partial(scales.problem, (1, 100, 10_000)),
    "multimnist": multimnist.problem,
    "instance_wise": partial(instance_wise.problem, 0.0),
    "instance_wise_noisy": partial(instance_wise.problem, 0.1),
    "resources": partial(vector_reward.problem, "resources"),
    "goals": partial(vector_reward.problem, "goals"),
    "language_model": language_model.problem,
}
