"""`value_and_jac` for flax.nnx models, with their random streams and statistics.

nnx models hold what they learn next to what they merely keep: keys of random streams,
running averages. Only the former are differentiated; the latter go through the function
once and are written back into the model, as `nnx.value_and_grad` does.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar, overload

import jax
import jax.numpy as jnp
from jax.tree_util import keystr
from jaxtyping import Array, Float, Int

from jaxjd import jacobian
from jaxjd._flax import BATCH_STATISTICS_ADVICE
from jaxjd.engine import forwarded

try:
    from flax import nnx
except ImportError as error:
    raise ImportError(
        "`jaxjd.nnx` needs flax. Install it with `pip install 'jaxjd[flax]'`."
    ) from error

P = ParamSpec("P")
L = TypeVar("L")  # Losses: an array or a pytree of arrays.
A = TypeVar("A")  # Auxiliary output.

# The name before flax 0.12.7 warns after it.
as_pure = getattr(nnx, "as_pure", None) or nnx.pure


class Jacobian(nnx.Module):
    """A [`jaxjd.Jacobian`][] in the form in which `nnx.Optimizer` takes gradients.

    `nnx.Optimizer.update` keeps of the gradients only the variables of the type that it
    optimises, so the Jacobian travels as the value of such a variable. It has the
    methods of [`jaxjd.Jacobian`][]; their trees of parameters are `nnx.State`.
    """

    def __init__(self, jacobian: jacobian.Jacobian, variable: type[nnx.Variable]):
        self.jacobian = variable(jacobian)

    def __getattr__(self, name: str) -> Any:
        if name in _PUBLIC:  # Only asked for what a Module does not have itself.
            return getattr(self.jacobian.get_value(), name)
        raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")

    def cross_gramian(self, other: Any) -> Float[Array, "m k"]:
        """As [`jaxjd.Jacobian.cross_gramian`][], with a Jacobian of either kind."""
        held = other.jacobian.get_value() if isinstance(other, Jacobian) else other
        return self.jacobian.get_value().cross_gramian(held)


_PUBLIC = {name for name in vars(jacobian.Jacobian) if not name.startswith("_")}


@overload
def value_and_jac(
    fun: Callable[P, L],
    argnums: int = 0,
    *,
    wrt: type[nnx.Variable] = nnx.Param,
    in_axes: Sequence[Any] | None = None,
    has_aux: Literal[False] = False,
    method: jacobian.Method = "auto",
    chunk_size: jacobian.ChunkSize = None,
    contraction: Any = "auto",
    memory: int = jacobian.MEMORY,
) -> Callable[P, tuple[L, Jacobian]]: ...
@overload
def value_and_jac(
    fun: Callable[P, tuple[L, A]],
    argnums: int = 0,
    *,
    wrt: type[nnx.Variable] = nnx.Param,
    in_axes: Sequence[Any] | None = None,
    has_aux: Literal[True],
    method: jacobian.Method = "auto",
    chunk_size: jacobian.ChunkSize = None,
    contraction: Any = "auto",
    memory: int = jacobian.MEMORY,
) -> Callable[P, tuple[tuple[L, A], Jacobian]]: ...
@overload
def value_and_jac(
    fun: Callable[P, Any],
    argnums: int = 0,
    *,
    wrt: type[nnx.Variable] = nnx.Param,
    in_axes: Sequence[Any] | None = None,
    has_aux: bool,
    method: jacobian.Method = "auto",
    chunk_size: jacobian.ChunkSize = None,
    contraction: Any = "auto",
    memory: int = jacobian.MEMORY,
) -> Callable[P, tuple[Any, Jacobian]]: ...
def value_and_jac(
    fun: Callable[..., Any],
    argnums: int = 0,
    *,
    wrt: type[nnx.Variable] = nnx.Param,
    in_axes: Sequence[Any] | None = None,
    has_aux: bool = False,
    method: jacobian.Method = "auto",
    chunk_size: jacobian.ChunkSize = None,
    contraction: Any = "auto",
    memory: int = jacobian.MEMORY,
) -> Callable[..., tuple[Any, Jacobian]]:
    """Evaluate the losses of an nnx model and their Jacobian: `nnx.value_and_grad`.

    The model's other variables are written back once: running averages if the function
    returns all the losses, and the counts of random streams. In a per-example function
    every example draws its own random numbers, and nothing else may be written.

    **Arguments:**

    - `fun`: as in [`jaxjd.value_and_jac`][], with a model among its arguments.
    - `argnums`: the position of the model.
    - `wrt`: the type of the variables to differentiate, the same that is given to
      `nnx.Optimizer`.
    - `in_axes`, `has_aux`, `method`, `chunk_size`, `contraction`, `memory`: as in
      [`jaxjd.value_and_jac`][].

    **Returns:** a function that takes the arguments of `fun`, keyword arguments too,
    and returns the losses (or the pair of losses and auxiliary output) and a
    [`jaxjd.nnx.Jacobian`][], which `nnx.Optimizer.update` takes in the place of
    gradients.

    **Raises:** as [`jaxjd.value_and_jac`][]; `TypeError` if the differentiated argument
    is not an nnx model or `wrt` not a type of variables; `ValueError` if a per-example
    function writes anything but random streams, batch statistics in particular.

    **Example:**

    >>> from flax import nnx
    >>> def losses(model):
    ...     return model(jnp.eye(2))[:, 0] ** 2
    >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    >>> values, jac = jaxjd.nnx.value_and_jac(losses)(model)
    >>> jac.num_losses
    2
    """
    jacobian.check_fun(fun)
    check_wrt(wrt)
    check_position(argnums)

    @functools.wraps(fun)
    def value_and_jac_fun(*args: Any, **kwargs: Any) -> tuple[Any, Jacobian]:
        pure = purified(fun, argnums, wrt, in_axes, has_aux, args)
        (losses, (aux, left)), jac = jacobian.value_and_jac(
            pure.fun,
            in_axes=pure.in_axes,
            has_aux=True,
            method=method,
            chunk_size=chunk_size,
            contraction=contraction,
            memory=memory,
        )(*pure.args, **kwargs)
        if pure.in_axes is not None:
            # Keys were made per example, counts are the same for all.
            left = jax.tree.map(lambda x: x[0], left)
            left = nnx.filter_state(left, nnx.RngCount)
        nnx.update(pure.model, left)
        return ((losses, aux) if has_aux else losses), Jacobian(jac, wrt)

    return value_and_jac_fun


def explain(
    fun: Callable[P, Any],
    argnums: int = 0,
    *,
    wrt: type[nnx.Variable] = nnx.Param,
    in_axes: Sequence[Any] | None = None,
    has_aux: bool = False,
    method: jacobian.Method = "auto",
    chunk_size: jacobian.ChunkSize = None,
    contraction: Any = "auto",
    memory: int = jacobian.MEMORY,
) -> Callable[P, jacobian.Explanation]:
    """Say what [`jaxjd.nnx.value_and_jac`][] does, as [`jaxjd.explain`][] does.

    **Arguments:** those of [`jaxjd.nnx.value_and_jac`][].

    **Returns:** a function that takes the arguments of `fun` and returns an
    [`jaxjd.Explanation`][] to print. It leaves the model as it is.

    **Raises:** as [`jaxjd.nnx.value_and_jac`][].

    **Example:**

    >>> from flax import nnx
    >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    >>> jaxjd.nnx.explain(lambda model: model(jnp.eye(2))[:, 0])(model).num_losses
    2
    """
    jacobian.check_fun(fun)
    check_wrt(wrt)
    check_position(argnums)

    @functools.wraps(fun)
    def explain_fun(*args: P.args, **kwargs: P.kwargs) -> jacobian.Explanation:
        pure = purified(fun, argnums, wrt, in_axes, has_aux, args)
        return jacobian.explain(
            pure.fun,
            in_axes=pure.in_axes,
            has_aux=True,
            method=method,
            chunk_size=chunk_size,
            contraction=contraction,
            memory=memory,
        )(*pure.args, **kwargs)

    return explain_fun


def check_wrt(wrt: object) -> None:
    if not isinstance(wrt, type) or not issubclass(wrt, nnx.Variable):
        raise TypeError(
            f"`wrt` must be a type of variables, such as `nnx.Param`. Got {wrt!r}."
        )


def check_position(argnums: object) -> None:
    if not isinstance(argnums, int):
        raise TypeError(
            f"`argnums` must be the position of the model. Got {argnums!r}."
        )


@dataclasses.dataclass(frozen=True)
class PureLosses:
    """An nnx loss function as a pure one: equal if function and model are."""

    fun: Callable[..., Any]
    graph: nnx.GraphDef
    wrt: type[nnx.Variable]
    position: int
    per_example: bool
    has_aux: bool

    def __call__(
        self,
        params: nnx.State,
        kept: nnx.State,
        example: Int[Array, ""],
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        given = own_keys(kept, example) if self.per_example else kept
        leaves, structure = jax.tree.flatten(given)

        def call(leaves: list[Any]) -> tuple[Any, Any]:
            # A state of its own: the model may share its variables with it.
            given = jax.tree.unflatten(structure, leaves)
            model = nnx.merge(self.graph, params, given)
            before, after = args[: self.position], args[self.position :]
            output = self.fun(*before, model, *after, **kwargs)
            _, _, left = nnx.split(model, self.wrt, ...)
            return output, left

        output, left = call(leaves)
        losses, aux = jacobian.split_aux(output) if self.has_aux else (output, None)
        if self.per_example:
            check_unchanged(given, left, lambda leaves: call(leaves)[1])
        return losses, (aux, left)


class Purified(NamedTuple):
    """A pure function, the axes and arguments for it, and the model they are from."""

    fun: PureLosses
    in_axes: tuple[Any, ...] | None
    args: tuple[Any, ...]
    model: nnx.Module


def purified(
    fun: Callable[..., Any],
    argnums: int,
    wrt: type[nnx.Variable],
    in_axes: Sequence[Any] | None,
    has_aux: bool,
    args: tuple[Any, ...],
) -> Purified:
    """**Raises:** as [`jaxjd.nnx.value_and_jac`][]."""
    (position,) = jacobian.check_argnums((argnums,), len(args))
    axes = jacobian.check_in_axes(in_axes, (position,), len(args))
    model = args[position]
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"Argument {position} of `fun` must be an nnx.Module. Got "
            f"{type(model).__name__}."
        )
    others = args[:position] + args[position + 1 :]
    graph, params, kept = nnx.split(model, wrt, ...)
    pure = PureLosses(fun, graph, wrt, position, axes is not None, has_aux)
    example = jnp.array(0)
    if axes is not None:
        other_axes = axes[:position] + axes[position + 1 :]
        example = jnp.arange(num_examples(others, other_axes))
        axes = (None, None, 0, *other_axes)
    return Purified(pure, axes, (as_pure(params), kept, example, *others), model)


def num_examples(args: Sequence[Any], in_axes: Sequence[Any]) -> int:
    """The length of the first mapped axis; the engine compares it with the others."""
    sizes: list[int] = []

    def visit(axis: int | None, subtree: Any) -> None:
        if axis is not None:
            sizes.extend(leaf.shape[axis] for leaf in jax.tree.leaves(subtree))

    jax.tree.map(visit, tuple(in_axes), tuple(args), is_leaf=lambda x: x is None)
    return sizes[0]


def own_keys(kept: nnx.State, example: Int[Array, ""]) -> nnx.State:
    """The variables with keys that belong to one example."""

    def fold_in(variable: Any) -> Any:
        if isinstance(variable, nnx.RngKey):
            return variable.replace(jax.random.fold_in(variable.get_value(), example))
        return variable

    return jax.tree.map(fold_in, kept, is_leaf=lambda x: isinstance(x, nnx.Variable))


def check_unchanged(
    before: nnx.State, after: nnx.State, again: Callable[[list[Any]], nnx.State]
) -> None:
    """Check that a per-example function writes nothing but counts of random streams.

    **Arguments:**

    - `before`, `after`: the variables when the function was called, and what it left.
    - `again`: from the arrays of `before` to `after`.

    **Raises:** `ValueError` if anything else was written.
    """
    known = values(before)
    written = {
        name: variable
        for name, (variable, leaves) in values(after).items()
        if not issubclass(variable, nnx.RngCount)
        and not same(known.get(name, (variable, []))[1], leaves)
    }
    if written:
        # `nnx.jit` and `nnx.remat` return every variable, as another array.
        unchanged = handed_through(before, again)
        written = {n: v for n, v in written.items() if n not in unchanged}
    for name, variable in written.items():
        advice = "Return it as auxiliary output."
        if issubclass(variable, nnx.BatchStat):
            advice = BATCH_STATISTICS_ADVICE
        raise ValueError(
            "`fun` is written for one example (`in_axes` is given), but it writes the "
            f"model's {variable.__name__} at {name}, which all examples share. {advice}"
        )


def values(state: nnx.State) -> dict[str, tuple[type[nnx.Variable], list[Any]]]:
    """The type and the arrays of every variable, by its path."""
    variables = jax.tree_util.tree_leaves_with_path(
        state, is_leaf=lambda x: isinstance(x, nnx.Variable)
    )
    return {keystr(path): (type(x), jax.tree.leaves(x)) for path, x in variables}


def same(left: Sequence[Any], right: Sequence[Any]) -> bool:
    return len(left) == len(right) and all(map(operator.is_, left, right))


def handed_through(
    before: nnx.State, again: Callable[[list[Any]], nnx.State]
) -> set[str]:
    """The names of the variables that a function returns as it got them."""
    leaves = jax.tree.leaves(before)
    closed, after = jax.make_jaxpr(again, return_shape=True)(leaves)
    sources = jax.tree.unflatten(
        jax.tree.structure(after),
        [-1 if n is None else n for n in forwarded(closed.jaxpr)],
    )
    places = jax.tree.unflatten(jax.tree.structure(before), range(len(leaves)))
    expected = values(places)
    return {name for name, found in values(sources).items() if found == expected[name]}
