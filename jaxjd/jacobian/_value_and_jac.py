"""The entry points `value_and_jac`, `jac` and `explain`."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar, overload

import jax
from jax.tree_util import keystr
from jaxtyping import Array

from jaxjd import engine
from jaxjd._flax import forbid_batch_statistics
from jaxjd._typing import PyTree
from jaxjd.jacobian._checks import (
    ChunkSize,
    Method,
    as_choices,
    as_parameters,
    check_argnums,
    check_arrays,
    check_chunk_size,
    check_fun,
    check_in_axes,
    check_losses,
    check_memory,
    check_method,
    explained,
    split_aux,
)
from jaxjd.jacobian._explain import Explanation
from jaxjd.jacobian._jacobian import Jacobian
from jaxjd.jacobian._layout import Losses, Parameters, Source

P = ParamSpec("P")
L = TypeVar("L")  # Losses: an array or a pytree of arrays.
A = TypeVar("A")  # Auxiliary output.

MEMORY = 2**30


@overload
def value_and_jac(
    fun: Callable[P, L],
    argnums: int | Sequence[int] = 0,
    *,
    in_axes: Sequence[Any] | None = None,
    has_aux: Literal[False] = False,
    method: Method = "auto",
    chunk_size: ChunkSize = None,
    contraction: PyTree[engine.Choice] = "auto",
    memory: int = MEMORY,
) -> Callable[P, tuple[L, Jacobian]]: ...
@overload
def value_and_jac(
    fun: Callable[P, tuple[L, A]],
    argnums: int | Sequence[int] = 0,
    *,
    in_axes: Sequence[Any] | None = None,
    has_aux: Literal[True],
    method: Method = "auto",
    chunk_size: ChunkSize = None,
    contraction: PyTree[engine.Choice] = "auto",
    memory: int = MEMORY,
) -> Callable[P, tuple[tuple[L, A], Jacobian]]: ...
@overload
def value_and_jac(
    fun: Callable[P, Any],
    argnums: int | Sequence[int] = 0,
    *,
    in_axes: Sequence[Any] | None = None,
    has_aux: bool,
    method: Method = "auto",
    chunk_size: ChunkSize = None,
    contraction: PyTree[engine.Choice] = "auto",
    memory: int = MEMORY,
) -> Callable[P, tuple[Any, Jacobian]]: ...
def value_and_jac(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    *,
    in_axes: Sequence[Any] | None = None,
    has_aux: bool = False,
    method: Method = "auto",
    chunk_size: ChunkSize = None,
    contraction: PyTree[engine.Choice] = "auto",
    memory: int = MEMORY,
) -> Callable[..., tuple[Any, Jacobian]]:
    """Evaluate a vector of losses and its Jacobian, as `jax.value_and_grad` does one.

    **Arguments:**

    - `fun`: a pure function that returns the losses: real floating-point arrays of any
      shape, or a pytree of them. m is their total size; in row-major order they are the
      rows of the Jacobian. Every array that is returned counts as a loss: return
      anything else as auxiliary output, with `has_aux`.
    - `argnums`: which arguments to differentiate, pytrees of floating-point arrays. If
      a tuple, the parameters are the tuple of these arguments.
    - `in_axes`: if given, `fun` is written for ONE example, and `in_axes` says which
      axis of each argument holds the examples, one entry per positional argument, as
      for `jax.vmap`; None for what all examples share, the differentiated arguments
      among it. The losses get a leading axis of examples. No example can then influence
      the loss of another.
    - `has_aux`: whether `fun` returns a pair of the losses and auxiliary output, which
      is returned beside them and also gets a leading axis of examples.
    - `method`: how the Jacobian is computed. `"structured"` forms no rows: one forward
      and one backward pass leave activations and their cotangents, from which inner
      products and combinations of rows follow; see [`jaxjd.explain`][]. `"chunked"`
      computes rows when they are needed. `"dense"` computes all m rows and keeps them.
      `"auto"` is `"structured"` for functions of one example. For functions that return
      all the losses it is `"chunked"` with a `chunk_size`, and else `"dense"` or
      `"structured"`: whichever takes less time, by operations and bytes. Losses that
      such a function computes apart, as tasks or terms, are pulled back apart: each
      through what it depends on, and nothing else.
    - `chunk_size`: how many rows, or the activations of how many losses, may be in
      memory at once; by default all. Never less than two rows, as two are needed to
      compare them, nor less than one example. Smaller needs less memory and more time:
      about `m / chunk_size` backward passes per row. `"auto"` takes the largest whose
      temporary arrays fit into `memory`, by an estimate from shapes: it knows little of
      what XLA fuses and frees, so most steps take less. [`jaxjd.explain`][] says which
      one that is. If none fits, it is the smallest.
    - `contraction`: how the structured method computes the inner products of a
      parameter's gradients: `"pairs"`, from activations and cotangents of all pairs of
      positions; `"rows"`, by forming the gradients of this parameter; `"kernel"`, by
      multiplying the cotangents by the products of the activations, which the losses of
      an example share; `"auto"`, the cheapest by operations and bytes. A pytree like
      the parameters or a prefix of them. A parameter that has only one way, as a bias
      has, keeps it. Anything but `"auto"` makes the method `"structured"`.
    - `memory`: how many bytes `"auto"` may keep until the weights are known, beside the
      activations, in a function that returns all the losses: the rows of `"dense"`, or
      the cotangents of `"structured"`. By default 1 GiB. If only the slower method
      fits, it is taken; if neither does, the one that needs less. With
      `chunk_size="auto"`, how many bytes all temporary arrays of the Gramian and a
      combination of rows may take, on all devices together.

    **Returns:** a function that takes the arguments of `fun` and returns the losses
    (or the pair of losses and auxiliary output) and a [`jaxjd.Jacobian`][]. Keyword
    arguments are passed on to `fun`. They are not differentiated, and all examples
    share them.

    **Raises:** `ValueError` or `TypeError` if an argument above is not as described,
    or `chunk_size` is given to the dense method, which keeps all rows. When called, the
    same if a differentiated argument, a loss or the auxiliary output is not as
    described, if a per-example function uses batch normalisation in training mode, or
    if the structured method is to take a function of all losses in chunks.

    **Example:**

    >>> def losses(x):
    ...     return (x - jnp.array([1.0, -1.0])) ** 2
    >>> values, jac = jaxjd.value_and_jac(losses)(jnp.array(3.0))
    >>> values
    Array([ 4., 16.], dtype=float32)
    >>> jac.gramian()
    Array([[16., 32.],
           [32., 64.]], dtype=float32)
    """
    check_fun(fun)
    check_method(method)
    check_chunk_size(chunk_size, method)
    check_memory(memory)
    if contraction != "auto" and method not in ("auto", "structured"):
        raise ValueError(
            '`contraction` is of method="structured" only. '
            f"Got {contraction!r} for method={method!r}."
        )

    @functools.wraps(fun)
    def value_and_jac_fun(*args: Any, **kwargs: Any) -> tuple[Any, Jacobian]:
        found = trace(fun, argnums, in_axes, has_aux, args, kwargs)
        chosen = choose_method(found, method, chunk_size, contraction, memory)
        jacobian, (loss_leaves, aux_leaves) = evaluate(found, chosen)
        values = jax.tree.unflatten(found.losses.structure, loss_leaves)
        if has_aux:
            values = values, jax.tree.unflatten(found.aux_structure, aux_leaves)
        return values, jacobian

    return value_and_jac_fun


@overload
def jac(
    fun: Callable[P, Any],
    argnums: int | Sequence[int] = 0,
    *,
    in_axes: Sequence[Any] | None = None,
    has_aux: Literal[False] = False,
    method: Method = "auto",
    chunk_size: ChunkSize = None,
    contraction: PyTree[engine.Choice] = "auto",
    memory: int = MEMORY,
) -> Callable[P, Jacobian]: ...
@overload
def jac(
    fun: Callable[P, tuple[Any, A]],
    argnums: int | Sequence[int] = 0,
    *,
    in_axes: Sequence[Any] | None = None,
    has_aux: Literal[True],
    method: Method = "auto",
    chunk_size: ChunkSize = None,
    contraction: PyTree[engine.Choice] = "auto",
    memory: int = MEMORY,
) -> Callable[P, tuple[Jacobian, A]]: ...
@overload
def jac(
    fun: Callable[P, Any],
    argnums: int | Sequence[int] = 0,
    *,
    in_axes: Sequence[Any] | None = None,
    has_aux: bool,
    method: Method = "auto",
    chunk_size: ChunkSize = None,
    contraction: PyTree[engine.Choice] = "auto",
    memory: int = MEMORY,
) -> Callable[P, Any]: ...
def jac(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    *,
    in_axes: Sequence[Any] | None = None,
    has_aux: bool = False,
    method: Method = "auto",
    chunk_size: ChunkSize = None,
    contraction: PyTree[engine.Choice] = "auto",
    memory: int = MEMORY,
) -> Callable[..., Any]:
    """The Jacobian of a vector of losses, as `jax.grad` is the gradient of one.

    The arguments are those of [`jaxjd.value_and_jac`][].

    **Returns:** a function that takes the arguments of `fun` and returns a
    [`jaxjd.Jacobian`][], or with `has_aux` the pair of it and the auxiliary output.

    **Raises:** as [`jaxjd.value_and_jac`][].

    **Example:**

    >>> def loss(w, x, y):  # Of one example.
    ...     return (x @ w - y) ** 2
    >>> x, y = jnp.eye(2), jnp.zeros(2)
    >>> jaxjd.jac(loss, in_axes=(None, 0, 0))(jnp.ones(2), x, y).gramian()
    Array([[4., 0.],
           [0., 4.]], dtype=float32)
    """
    both = value_and_jac(
        fun,
        argnums,
        in_axes=in_axes,
        has_aux=has_aux,
        method=method,
        chunk_size=chunk_size,
        contraction=contraction,
        memory=memory,
    )

    @functools.wraps(fun)
    def jac_fun(*args: Any, **kwargs: Any) -> Any:
        values, jacobian = both(*args, **kwargs)
        return (jacobian, values[1]) if has_aux else jacobian

    return jac_fun


def explain(
    fun: Callable[P, Any],
    argnums: int | Sequence[int] = 0,
    *,
    in_axes: Sequence[Any] | None = None,
    has_aux: bool = False,
    method: Method = "auto",
    chunk_size: ChunkSize = None,
    contraction: PyTree[engine.Choice] = "auto",
    memory: int = MEMORY,
) -> Callable[P, Explanation]:
    """Say which method `value_and_jac` takes, why, and how it treats each parameter.

    The arguments are those of [`jaxjd.value_and_jac`][].

    **Returns:** a function that takes the arguments of `fun` and returns an
    [`jaxjd.Explanation`][] to print: the method and the reason for it; the structure of
    the losses; and how the structured method treats each parameter, whether it is taken
    or not: the operations in which the parameter is used, how inner products of its
    gradients are computed, the FLOPs and bytes of that, and, where its rows of the
    Jacobian are formed because no rule covers an operation, which one that is.

    **Raises:** as [`jaxjd.value_and_jac`][].

    **Example:**

    >>> def loss(w, x, y):
    ...     return (x @ w - y) ** 2
    >>> x, y = jnp.eye(2), jnp.zeros(2)
    >>> explanation = jaxjd.explain(loss, in_axes=(None, 0, 0))(jnp.ones(2), x, y)
    >>> explanation.method, explanation.reason
    ('structured', 'the function is written for one example')
    """
    check_fun(fun)
    check_method(method)
    check_chunk_size(chunk_size, method)
    check_memory(memory)

    @functools.wraps(fun)
    def explain_fun(*args: P.args, **kwargs: P.kwargs) -> Explanation:
        found = trace(fun, argnums, in_axes, has_aux, args, kwargs)
        chosen = choose_method(found, method, chunk_size, contraction, memory)
        plan = chosen.plan or plan_of(found, contraction)
        everything = found.parameters.unflatten(found.positions)
        names = [
            keystr(path) or "the parameter"
            for path, _ in jax.tree_util.tree_leaves_with_path(everything)
        ]
        table = engine.explain(plan, found.inputs, names)
        return Explanation(
            chosen.method,
            chosen.reason,
            chosen.chunk_size,
            chosen.estimate,
            found.losses.num_losses,
            found.losses.as_shapes(),
            tuple(
                piece.num_losses
                for piece in found.function.pieces(found.positions).pieces
            ),
            table,
        )

    return explain_fun


class Traced(NamedTuple):
    """A function of the user, traced and checked, at the point where it was called.

    `positions` are those of the differentiated parameters among the `inputs`.
    """

    function: engine.LossFunction
    inputs: list[Array]
    positions: tuple[int, ...]
    losses: Losses
    parameters: Parameters
    aux_structure: Any


def trace(
    fun: Callable[..., Any],
    argnums: int | Sequence[int],
    in_axes: Sequence[Any] | None,
    has_aux: bool,
    args: Sequence[Any],
    kwargs: dict[str, Any],
) -> Traced:
    """**Raises:** as [`jaxjd.value_and_jac`][]."""
    single = not isinstance(argnums, list | tuple)
    wanted = check_argnums(argnums, len(args))
    args = tuple(
        as_parameters(arg, i) if i in wanted else arg for i, arg in enumerate(args)
    )
    axes = check_in_axes(in_axes, wanted, len(args))
    if axes is not None:
        axes = (*axes, None)

    def losses_and_aux(*everything: Any) -> tuple[Any, Any]:
        *args, kwargs = everything
        per_example = axes is not None
        with forbid_batch_statistics(per_example), explained(per_example, args):
            output = fun(*args, **kwargs)
        losses, aux = split_aux(output) if has_aux else (output, None)
        check_arrays(losses, aux)
        return losses, aux

    everything = (*args, kwargs)
    function, inputs, places, example_losses, aux = engine.trace(
        losses_and_aux, everything, axes, identity=fun
    )
    check_losses(example_losses)
    num_examples = function.num_examples(inputs)
    batch = () if num_examples is None else (num_examples,)
    shapes = tuple((*batch, *x.shape) for x in jax.tree.leaves(example_losses))
    source = Source(num_examples, len(shapes))
    losses = Losses(jax.tree.structure(example_losses), shapes, (source,))
    if losses.num_losses == 0:
        raise ValueError(
            f"`fun` must return at least one loss. Got {losses.as_shapes()}."
        )

    place_of = jax.tree.unflatten(jax.tree.structure(everything), places)
    point = place_of[wanted[0]] if single else tuple(place_of[i] for i in wanted)
    positions = tuple(jax.tree.leaves(point))
    parameters = Parameters(
        jax.tree.structure(point),
        tuple(inputs[i].shape for i in positions),
        tuple(range(len(positions))),
    )
    return Traced(
        function, inputs, positions, losses, parameters, jax.tree.structure(aux)
    )


class Chosen(NamedTuple):
    """A method, why it is taken, and the plan of the structured one, if it was made.

    `estimate` is the bytes that a `chunk_size` is chosen by, if it is.
    """

    method: engine.Method
    reason: str
    plan: engine.Plan | None = None
    chunk_size: int | None = None
    estimate: int | None = None


def choose_method(
    found: Traced,
    method: Method,
    chunk_size: ChunkSize,
    contraction: PyTree[engine.Choice],
    memory: int,
) -> Chosen:
    """**Raises:** `ValueError` if the structured method is to take what it cannot."""
    fitting = chunk_size == "auto"
    size = None if isinstance(chunk_size, str) else chunk_size
    if method in ("dense", "chunked"):
        chosen = Chosen(method, "it was asked for", chunk_size=size)
        return in_budget(found, chosen, memory) if fitting else chosen
    plan = plan_of(found, contraction)
    asked = method == "structured"
    if found.function.axes is not None:
        why = "it was asked for" if asked else "the function is written for one example"
        chosen = Chosen("structured", why, plan, size)
        return in_budget(found, chosen, memory) if fitting else chosen
    # Of a function of all losses nothing but rows can be taken in chunks.
    in_chunks = fitting or (size is not None and size < found.losses.num_losses)
    if not asked and contraction == "auto":
        if fitting:
            return cheapest_in_budget(found, plan, memory)
        if in_chunks:
            why = "the function returns all losses, and `chunk_size` is given"
            return Chosen("chunked", why, plan, size)
        return cheapest(plan, memory)
    if in_chunks:
        raise ValueError(
            "With the structured method, `chunk_size` needs a function of one example, "
            f"with `in_axes`. Got chunk_size={chunk_size!r}, in_axes=None. Give "
            'method="chunked", or leave `chunk_size` out.'
        )
    why = "it was asked for" if asked else "`contraction` is given"
    return Chosen("structured", why, plan)


def cheapest(plan: engine.Plan, memory: int) -> Chosen:
    """The method for a function that returns all its losses."""
    kept, none = engine.with_rows(plan), engine.without_rows(plan)
    why = "the function returns all losses, and by operations and bytes "
    dense = Chosen("dense", why + "keeping their rows takes less time", plan)
    structured = Chosen("structured", why + "forming no rows takes less time", plan)
    of_both = [(kept, dense), (none, structured)]
    for estimate, choice in sorted(of_both, key=lambda x: x[0].cost.time):
        if estimate.memory <= memory:
            return choice
    # Rows that are not kept may be freed parameter by parameter.
    least = "structured" if none.memory < kept.memory else "chunked"
    why = f"this needs least memory, and either way takes more than {memory / 1e6:g} MB"
    return Chosen(least, why, plan)


def in_budget(found: Traced, chosen: Chosen, memory: int) -> Chosen:
    """The same method with the largest chunk that fits."""
    plan = chosen.plan or plan_of(found, "auto")
    rows = chosen.method != "structured"
    size, estimate = engine.largest_chunk(plan, found.inputs, rows, memory)
    return chosen._replace(plan=plan, chunk_size=size, estimate=estimate)


def cheapest_in_budget(found: Traced, plan: engine.Plan, memory: int) -> Chosen:
    """The method for a function that returns all its losses, in chunks if need be."""
    chosen = cheapest(plan, memory)
    rows = chosen.method != "structured"
    estimate = engine.of_whole(plan, found.inputs, rows)
    if chosen.method != "chunked" and estimate <= memory:
        return chosen._replace(estimate=estimate)
    why = "the function returns all losses, and they do not fit at once"
    return in_budget(found, Chosen("chunked", why, plan), memory)


def plan_of(found: Traced, contraction: PyTree[engine.Choice]) -> engine.Plan:
    choices = as_choices(contraction, found.parameters)
    return engine.plan(found.function, found.positions, choices)


def evaluate(
    found: Traced, chosen: Chosen
) -> tuple[Jacobian, tuple[list[Array], list[Array]]]:
    """The Jacobian; and the leaves of the losses and of the auxiliary output."""
    operator, derivative, outputs = passes(found, chosen)
    named = engine.named(found.function, found.inputs, found.positions, derivative)
    return Jacobian(operator, found.losses, found.parameters, named), outputs


def passes(
    found: Traced, chosen: Chosen
) -> tuple[engine.Operator, engine.Derivative | None, tuple[list[Array], list[Array]]]:
    """The operator; what it was made of; and the outputs of the function."""
    function, inputs, positions = found.function, found.inputs, found.positions
    chunk_size = chosen.chunk_size
    if chosen.method == "structured":
        assert chosen.plan is not None
        # The losses come from the forward pass that the Jacobian needs.
        operator, outputs = engine.structured(chosen.plan, inputs, chunk_size)
        return operator, None, outputs
    if engine.are_wrong(function, inputs):
        plan = plan_of(found, "auto")
        operator = engine.rows_by_chunks(plan, inputs, chunk_size)
        if chosen.method == "dense":
            rows = engine.stacked(operator.rows())
            operator = dataclasses.replace(rows, origin=operator)
        return operator, None, function.all_outputs(inputs)
    derivative = None
    if function.axes is None:
        derivative, outputs = engine.linearised(function, inputs, positions)
    else:
        outputs = function.all_outputs(inputs)
    operator = engine.Chunked(
        inputs, function, positions, chunk_size, derivative=derivative
    )
    if chosen.method == "dense":
        operator = dataclasses.replace(operator.in_memory(), origin=operator)
    return operator, derivative, outputs
