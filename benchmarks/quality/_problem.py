"""What a problem is: losses, batches, and what to measure at the end."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array, Float, Key

Params = Any
Batch = tuple[Any, ...]


class Measure(NamedTuple):
    """A number that is measured, as tables show it. Lower is better."""

    heading: str
    percent: bool = False


class Problem(NamedTuple):
    """A vector of losses to train, and how to judge the result.

    `measure(params)` returns a dict with one number for each of `measures`, and
    `"validation"`: the number that chooses the learning rate, lower is better. It must
    come from data that the measures do not use.
    """

    title: str
    num_losses: int
    steps: int
    rates: tuple[float, ...]
    """Learning rates of Adam, of which validation chooses one."""
    init: Callable[[Key[Array, ""]], Params]
    batch: Callable[[Key[Array, ""]], Batch]
    losses: Callable[..., Any]
    """Of the parameters and a batch."""
    measure: Callable[[Params], dict[str, Float[Array, ""]]]
    measures: dict[str, Measure]
    """The first one ranks the methods."""
    in_axes: tuple[int | None, ...] | None = None
    """Given if `losses` is of one example, as for `jaxjd.value_and_jac`."""
    labels: Any = None
    """Which parameters are "shared" and which are "own": a head has the gradient of its
    own task. None if all are shared."""
    seeds: int = 5
    epoch_steps: int = 100
    """How many steps `dwa` takes for an epoch."""
    equal_time: bool = False
    """Whether each method also has a run as long as the mean's."""
    methods: tuple[str, ...] | None = None
    """Those that are run by default. None for all."""
    memoryless: bool = False
    """Whether the others make no sense, because each step has other losses."""
