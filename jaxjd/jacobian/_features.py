"""Check the names of features, and split the function there."""

from collections.abc import Sequence
from typing import Any

from jaxjd import engine


def split_at(named: engine.Named | None, names: str | Sequence[str]) -> engine.Split:
    """**Raises:** as [`jaxjd.Jacobian.features`][]."""
    one = isinstance(names, str) or not isinstance(names, Sequence)
    wanted: tuple[Any, ...] = (names,) if one else tuple(names)
    if not wanted or not all(isinstance(name, str) for name in wanted):
        raise TypeError(
            "`features` must be the name of a value in the function, or several. Got "
            f"{names!r}."
        )
    known = () if named is None else named.names
    unknown = [name for name in wanted if name not in known]
    if named is None or unknown:
        scaled = (
            " Nor do gradients have features that `jaxjd.precondition_by_rms` has "
            "scaled: its scales are those of parameters."
        )
        raise ValueError(
            f"The function must name {', '.join(map(repr, unknown))} by `x = "
            "checkpoint_name(x, name)`, from `jax.ad_checkpoint`, outside of loops, "
            "branches and `jax.checkpoint`. What it names there: "
            f"{', '.join(map(repr, known)) or 'nothing'}."
            f"{scaled if named is None else ''}"
        )
    if named.function.axes is not None:
        raise ValueError(
            "`features` need a function that returns the losses of all examples. Got "
            "one of a single example, with `in_axes`: no two examples share features."
        )
    return named.split(wanted)
