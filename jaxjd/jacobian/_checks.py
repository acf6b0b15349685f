"""Checks of what `value_and_jac` is given, and what their messages say."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr

from jaxjd import engine
from jaxjd._checks import dtype_of
from jaxjd._typing import PyTree
from jaxjd.jacobian._layout import Parameters

Method = Literal["auto", "dense", "chunked", "structured"]
ChunkSize = int | Literal["auto"] | None


def check_fun(fun: object) -> None:
    if not callable(fun):
        raise TypeError(
            f"`fun` must be the function that returns the losses. Got {fun!r}."
        )


def check_method(method: str) -> None:
    if not isinstance(method, str) or method not in get_args(Method):
        known = ", ".join(map(repr, get_args(Method)))
        raise ValueError(f"`method` must be one of {known}. Got {method!r}.")


def check_chunk_size(chunk_size: ChunkSize, method: str) -> None:
    if chunk_size is None:
        return
    integer = isinstance(chunk_size, int | np.integer)
    if isinstance(chunk_size, bool) or not (integer or chunk_size == "auto"):
        raise TypeError(
            f'`chunk_size` must be an integer, "auto" or None. Got {chunk_size!r}.'
        )
    if chunk_size != "auto" and chunk_size < 1:
        raise ValueError(f"`chunk_size` must be at least 1. Got {chunk_size}.")
    if method == "dense":
        raise ValueError(
            'With method="dense" all rows are kept, so `chunk_size` must be None. Got '
            f'{chunk_size!r}. Give method="chunked" to form a few rows at a time.'
        )


def check_memory(memory: int) -> None:
    if isinstance(memory, bool) or not isinstance(memory, int | np.integer):
        raise TypeError(f"`memory` must be an integer, in bytes. Got {memory!r}.")
    if memory < 0:
        raise ValueError(f"`memory` must not be negative. Got {memory}.")


def as_choices(
    contraction: PyTree[engine.Choice], parameters: Parameters
) -> list[engine.Choice]:
    """One choice per parameter, from a prefix tree of them."""
    choices = parameters.broadcast("contraction", contraction)
    for choice in choices:
        if choice not in get_args(engine.Choice):
            known = ", ".join(map(repr, get_args(engine.Choice)))
            raise ValueError(f"`contraction` must be one of {known}. Got {choice!r}.")
    return choices


def check_argnums(argnums: int | Sequence[int], num_args: int) -> list[int]:
    """One or several positions as a list, none of them negative."""
    if isinstance(argnums, int | np.integer):
        argnums = (argnums,)
    integers = isinstance(argnums, list | tuple) and all(
        isinstance(i, int | np.integer) for i in argnums
    )
    if not integers:
        raise TypeError(
            "`argnums` must be the position of an argument of `fun`, or several. Got "
            f"{argnums!r}. The arguments themselves go to the function that is "
            "returned: `jaxjd.value_and_jac(fun)(params)`."
        )
    for i in argnums:
        if not -num_args <= i < num_args:
            raise ValueError(
                f"`argnums` must be positions among the {num_args} positional "
                f"arguments that `fun` is called with. Got {i}."
            )
    positions = [int(i) % num_args for i in argnums]
    if not positions or len(set(positions)) < len(positions):
        raise ValueError(
            f"`argnums` must name one or more different arguments. Got {argnums}."
        )
    return positions


def as_parameters(tree: PyTree, position: int) -> PyTree:
    """Check that an argument can be differentiated; Python floats become arrays."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    if not leaves:
        raise ValueError(
            f"Argument {position} of `fun` must hold parameters to differentiate. Got "
            f"{tree!r}, without an array in it."
        )
    for path, leaf in leaves:
        dtype = dtype_of(leaf)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"The parameters, argument {position} of `fun`, must be real floating-"
                f"point arrays. Got {dtype or type(leaf).__name__} at "
                f"{keystr(path) or 'the top'}. Pass what is not to be differentiated "
                "as another argument."
            )
    return jax.tree.map(jnp.asarray, tree)


def check_in_axes(
    in_axes: Sequence[Any] | None, argnums: Sequence[int], num_args: int
) -> tuple[Any, ...] | None:
    if in_axes is None:
        return None
    advice = (
        "Give one entry per argument, None for the differentiated ones, for example "
        "`in_axes=(None, 0, 0)`."
    )
    if not isinstance(in_axes, list | tuple) or len(in_axes) != num_args:
        raise ValueError(
            f"`in_axes` must have one entry for each of the {num_args} arguments that "
            f"`fun` is called with. Got {in_axes!r}. {advice}"
        )
    for i in argnums:
        if jax.tree.leaves(in_axes[i]):
            raise ValueError(
                f"`in_axes` must be None for argument {i}, which is differentiated: "
                f"all examples share the parameters. Got {in_axes[i]!r}. {advice}"
            )
    if not jax.tree.leaves(tuple(in_axes)):
        raise ValueError(
            f"`in_axes` must give the axis of the examples in at least one argument. "
            f"Got {in_axes!r}. If `fun` returns the losses of all examples, leave "
            "`in_axes` out."
        )
    return tuple(in_axes)


def split_aux(output: Any) -> tuple[Any, Any]:
    if not isinstance(output, tuple) or len(output) != 2:
        raise TypeError(
            "With `has_aux=True`, `fun` must return a pair (losses, aux). "
            f"Got {type(output).__name__}."
        )
    return output


def check_arrays(losses: Any, aux: Any) -> None:
    """Check what `fun` returns before JAX does, whose error knows neither of them."""
    for what, tree in (("losses", losses), ("auxiliary output", aux)):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if dtype_of(leaf) is None:
                raise TypeError(
                    f"The {what} that `fun` returns must be arrays. Got "
                    f"{type(leaf).__name__} at {keystr(path) or 'the top'}. Metrics go "
                    "into auxiliary output, by `has_aux=True`; both hold arrays only."
                )


def check_losses(losses: PyTree[jax.ShapeDtypeStruct]) -> None:
    for path, loss in jax.tree_util.tree_leaves_with_path(losses):
        if not jnp.issubdtype(loss.dtype, jnp.floating):
            raise TypeError(
                "`fun` must return losses that are real floating-point arrays. "
                f"Got {loss.dtype} at {keystr(path) or 'the top'}."
            )


@contextlib.contextmanager
def explained(per_example: bool, args: Sequence[Any]) -> Iterator[None]:
    """Add to the errors of a per-example function what it was called with."""
    try:
        yield
    except Exception as error:
        if per_example:
            shapes = jax.tree.map(lambda x: list(jnp.shape(x)), tuple(args))
            error.add_note(
                "`in_axes` is given, so `fun` is called with ONE example. Its "
                f"arguments have the shapes {shapes}. If it is written for a batch, "
                "leave `in_axes` out."
            )
        raise
