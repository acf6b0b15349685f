"""What a user of the engine sees: `value_and_jac`, `jac`, and the lazy `Jacobian`."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import keystr
from jaxtyping import Array, Float, Key, PyTree

from jaxjd import engine
from jaxjd._misuse import ExplainsItself, guard

Method = Literal["auto", "dense", "chunked", "structured"]


@dataclasses.dataclass(frozen=True)
class Losses:
    """How the m losses are structured: static.

    The engine keeps the losses of one example side by side; the order that users see,
    the row-major order of the losses as they are returned, differs from it where a
    per-example function returns a pytree of several arrays.
    """

    structure: Any  # A jax.tree_util.PyTreeDef.
    shapes: tuple[tuple[int, ...], ...]
    num_examples: int | None

    @property
    def sizes(self) -> list[int]:
        return [math.prod(shape) for shape in self.shapes]

    @property
    def num_losses(self) -> int:
        return sum(self.sizes)

    def unflatten(self, vector: Float[Array, " m"]) -> PyTree[Float[Array, "..."]]:
        parts = jnp.split(vector, np.cumsum(self.sizes)[:-1])
        leaves = [x.reshape(s) for x, s in zip(parts, self.shapes, strict=True)]
        return jax.tree.unflatten(self.structure, leaves)

    def flatten(self, name: str, values: PyTree) -> Float[Array, " m"]:
        """One vector from values that are flat already or shaped like the losses."""
        m = self.num_losses
        if not isinstance(values, list | tuple | dict) and jnp.shape(values) == (m,):
            return jnp.asarray(values)
        leaves, structure = jax.tree.flatten(values)
        shapes = tuple(jnp.shape(leaf) for leaf in leaves)
        if structure != self.structure or shapes != self.shapes:
            expected = jax.tree.unflatten(self.structure, list(map(list, self.shapes)))
            raise ValueError(
                f"`{name}` must have shape ({m},) or be shaped like the losses, "
                f"{expected}. Got {jax.tree.map(lambda x: list(jnp.shape(x)), values)}."
            )
        return jnp.concatenate([jnp.ravel(leaf) for leaf in leaves])

    def from_engine(self, rows: Float[Array, "m ..."]) -> Float[Array, "m ..."]:
        if self.num_examples is None or len(self.shapes) == 1:
            return rows
        rest = rows.shape[1:]
        rows = rows.reshape(self.num_examples, -1, *rest)
        ends = np.cumsum([size // self.num_examples for size in self.sizes])[:-1]
        parts = jnp.split(rows, ends, axis=1)
        return jnp.concatenate([part.reshape(-1, *rest) for part in parts])

    def to_engine(self, vector: Float[Array, " m"]) -> Float[Array, " m"]:
        if self.num_examples is None or len(self.shapes) == 1:
            return vector
        parts = jnp.split(vector, np.cumsum(self.sizes)[:-1])
        rows = [part.reshape(self.num_examples, -1) for part in parts]
        return jnp.concatenate(rows, axis=1).ravel()


@dataclasses.dataclass(frozen=True)
class Parameters:
    """How the parameters are structured, and with respect to which J is taken: static.

    `kept` are positions of leaves. In trees the others are an `optax.MaskedNode`.
    """

    structure: Any  # A jax.tree_util.PyTreeDef.
    shapes: tuple[tuple[int, ...], ...]
    kept: tuple[int, ...]

    def unflatten(self, leaves: Sequence[Any]) -> PyTree:
        tree: list[Any] = [optax.MaskedNode()] * len(self.shapes)
        for position, leaf in zip(self.kept, leaves, strict=True):
            tree[position] = leaf
        return jax.tree.unflatten(self.structure, tree)

    def flatten(self, name: str, tree: PyTree) -> list[Array]:
        """The kept leaves of a tree like the parameters; the others may be anything."""
        expected = self.kept_shapes()
        try:
            leaves = self.structure.flatten_up_to(tree)
        except ValueError as error:
            raise ValueError(
                f"`{name}` must be structured like the parameters, {expected}. "
                f"Got {jax.tree.structure(tree)}."
            ) from error
        kept = [leaves[i] for i in self.kept]
        if [jnp.shape(x) for x in kept] != [self.shapes[i] for i in self.kept]:
            raise ValueError(
                f"`{name}` must have the shapes of the parameters, {expected}. "
                f"Got {self.unflatten([list(jnp.shape(x)) for x in kept])}."
            )
        return [jnp.asarray(x) for x in kept]

    def broadcast(self, name: str, prefix: PyTree) -> list[Any]:
        """One item per leaf, kept or not, from a tree that is a prefix of theirs."""
        items: list[Any] = [None] * len(self.shapes)

        def visit(item: Any, positions: PyTree) -> None:
            for position in jax.tree.leaves(positions):
                items[position] = item

        everything = jax.tree.unflatten(self.structure, range(len(self.shapes)))
        try:
            jax.tree.map(visit, prefix, everything)
        except ValueError as error:
            raise ValueError(
                f"`{name}` must be structured like the parameters or a prefix of them, "
                f"{everything}. Got {prefix}."
            ) from error
        return items

    def kept_shapes(self) -> PyTree:
        return self.unflatten([list(self.shapes[i]) for i in self.kept])


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["guard", "rows"],
    meta_fields=["losses", "parameters"],
)
@dataclasses.dataclass(frozen=True, repr=False)
class Jacobian(metaclass=ExplainsItself):
    """The Jacobian $J$ of m losses with respect to n parameters, a linear operator.

    Made by [`jaxjd.value_and_jac`][] and [`jaxjd.jac`][]. It computes nothing until it
    is asked to, and holds $J$ in memory only if made with `method="dense"`. It is a
    pytree: it may leave a `jit`, be donated, be carried by `jax.lax.scan`. Whatever is
    recomputed in its methods under one `jit`, XLA computes once.

    Not a gradient: of optax's transformations only an aggregator such as
    `jaxjd.upgrad()` takes it, so that comes first in a chain; anything else raises.
    """

    guard: Key[Array, "1 1"]
    rows: engine.Dense | engine.Chunked | engine.Structured
    losses: Losses
    parameters: Parameters

    @property
    def num_losses(self) -> int:
        """m, the number of losses, that is of rows."""
        return self.losses.num_losses

    def gramian(self) -> Float[Array, "m m"]:
        """$G = J J^\\top$, float32 or wider, symmetric to the bit."""
        columns = self.losses.from_engine(self.rows.gramian())
        return self.losses.from_engine(columns.T)

    def cross_gramian(self, other: "Jacobian") -> Float[Array, "m k"]:
        """$J_1 J_2^\\top$: inner products with the rows of another Jacobian.

        **Arguments:**

        - `other`: k losses, of any function, with respect to the same parameters.

        **Raises:** `ValueError` if the parameters differ in structure or shape.
        """
        if other.parameters != self.parameters:
            raise ValueError(
                "`other` must be taken with respect to the same parameters, "
                f"{self.parameters.kept_shapes()}. "
                f"Got {other.parameters.kept_shapes()}."
            )
        products = engine.products_by_blocks(self.rows, other.rows)
        return other.losses.from_engine(self.losses.from_engine(products).T).T

    def vjp(self, weights: PyTree[Float[Array, "..."]]) -> PyTree[Float[Array, "..."]]:
        """$J^\\top w$: the combination of the rows with these weights.

        **Arguments:**

        - `weights`: m numbers, as a vector or shaped like the losses.

        **Returns:** a pytree like the parameters, in their dtypes.

        **Raises:** `ValueError` if `weights` is shaped differently.
        """
        flat = self.losses.flatten("weights", weights)
        return self.parameters.unflatten(self.rows.vjp(self.losses.to_engine(flat)))

    def jvp(self, tangent: PyTree[Float[Array, "..."]]) -> PyTree[Float[Array, "..."]]:
        """$J d$: how the losses change along a direction in parameter space.

        **Arguments:**

        - `tangent`: a pytree like the parameters.

        **Returns:** m numbers, shaped like the losses.

        **Raises:** `ValueError` if `tangent` is not like the parameters.
        """
        change = self.rows.jvp(self.parameters.flatten("tangent", tangent))
        return self.losses.unflatten(self.losses.from_engine(change))

    def dense(self) -> PyTree[Float[Array, "m ..."]]:
        """All of $J$: a pytree like the parameters, each leaf [m, *shape]."""
        rows = [self.losses.from_engine(leaf) for leaf in self.rows.rows()]
        return self.parameters.unflatten(rows)

    def restrict(self, wrt: PyTree[bool]) -> "Jacobian":
        """The Jacobian with respect to some of the parameters only.

        **Arguments:**

        - `wrt`: a pytree of bools, like the parameters or a prefix of them.

        **Returns:** a Jacobian in whose trees the other parameters are an
        `optax.MaskedNode`, optax's placeholder for what it must not touch.

        **Raises:** `ValueError` if `wrt` is no such tree or keeps nothing.
        """
        flags = self.parameters.broadcast("wrt", wrt)
        chosen = [n for n, i in enumerate(self.parameters.kept) if flags[i]]
        if not chosen:
            raise ValueError(
                "`wrt` must keep at least one of the parameters. It keeps none of them."
            )
        kept = tuple(self.parameters.kept[n] for n in chosen)
        return dataclasses.replace(
            self,
            rows=self.rows.restrict(chosen),
            parameters=dataclasses.replace(self.parameters, kept=kept),
        )

    def __repr__(self) -> str:
        return (
            f"Jacobian(num_losses={self.num_losses}, "
            f"parameters={self.parameters.kept_shapes()})"
        )

    def __contains__(self, key: object) -> bool:
        # flax.training.train_state.TrainState looks for "_overwrite_with_gradient" in
        # the gradients that it is given. A Jacobian has no keys.
        del key
        return False


def value_and_jac(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    *,
    in_axes: Sequence[Any] | None = None,
    has_aux: bool = False,
    method: Method = "auto",
    chunk_size: int | None = None,
    contraction: PyTree[engine.Choice] = "auto",
) -> Callable[..., tuple[Any, Jacobian]]:
    """Evaluate a vector of losses and its Jacobian, as `jax.value_and_grad` does one.

    **Arguments:**

    - `fun`: a pure function that returns the losses: real floating-point arrays of any
      shape, or a pytree of them. m is their total size; in row-major order they are the
      rows of the Jacobian.
    - `argnums`: which arguments to differentiate, pytrees of floating-point arrays. If
      a tuple, the parameters are the tuple of these arguments.
    - `in_axes`: if given, `fun` is written for ONE example, and `in_axes` says which
      axis of each argument holds the examples, one entry per argument, as for
      `jax.vmap`; None for what all examples share, the differentiated arguments among
      it. The losses get a leading axis of examples. No example can then influence the
      loss of another.
    - `has_aux`: whether `fun` returns a pair of the losses and auxiliary output, which
      is returned beside them and also gets a leading axis of examples.
    - `method`: how the Jacobian is computed. `"structured"` forms no rows: one forward
      and one backward pass leave activations and their cotangents, from which inner
      products and combinations of rows follow; see [`jaxjd.explain`][]. `"chunked"`
      computes rows when they are needed. `"dense"` materialises all m of them.
      `"auto"` is `"structured"` for functions of one example, and for others without a
      `chunk_size` whose parameters outweigh the activations; else `"chunked"`.
    - `chunk_size`: how many rows, or the activations of how many losses, may be in
      memory at once; by default all. Never less than two rows, as two are needed to
      compare them, nor less than one example. Smaller needs less memory and more time:
      about `m / chunk_size` backward passes per row.
    - `contraction`: how the structured method computes the inner products of a
      parameter's gradients: `"pairs"`, from activations and cotangents of all pairs of
      positions; `"rows"`, by forming the gradients of this parameter; `"auto"`, the
      cheaper by operations and bytes. A pytree like the parameters or a prefix of them.
      A parameter that has only one way, as a bias has, keeps it. Anything but
      `"auto"` makes the method `"structured"`.

    **Returns:** a function that takes the arguments of `fun` and returns the losses
    (or the pair of losses and auxiliary output) and a [`jaxjd.Jacobian`][].

    **Raises:** when called, `ValueError` or `TypeError` if an argument above, a
    differentiated argument or a loss is not as described, if a per-example function
    uses batch normalisation in training mode, or if the structured method is to take
    in chunks what is no per-example function.
    """
    check_method(method)
    check_chunk_size(chunk_size)
    if contraction != "auto" and method not in ("auto", "structured"):
        raise ValueError(
            '`contraction` is of method="structured" only. '
            f"Got {contraction!r} for method={method!r}."
        )

    @functools.wraps(fun)
    def value_and_jac_fun(*args: Any) -> tuple[Any, Jacobian]:
        found = trace(fun, argnums, in_axes, has_aux, args)
        function, inputs, positions = found.function, found.inputs, found.positions
        m = found.losses.num_losses
        plan = structured_plan(found, method, chunk_size, contraction)
        if plan is not None:
            # The losses come from the forward pass that the Jacobian needs.
            rows, outputs = engine.structured(plan, inputs, chunk_size)
        else:
            if method == "dense":
                rows = engine.dense(function, inputs, positions)
            else:
                rows = engine.Chunked(inputs, function, positions, chunk_size, m)
            outputs = function.all_outputs(inputs)
        jacobian = Jacobian(guard(), rows, found.losses, found.parameters)
        loss_leaves, aux_leaves = outputs
        values = jax.tree.unflatten(found.losses.structure, loss_leaves)
        if has_aux:
            values = values, jax.tree.unflatten(found.aux_structure, aux_leaves)
        return values, jacobian

    return value_and_jac_fun


def jac(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    *,
    in_axes: Sequence[Any] | None = None,
    has_aux: bool = False,
    method: Method = "auto",
    chunk_size: int | None = None,
    contraction: PyTree[engine.Choice] = "auto",
) -> Callable[..., Any]:
    """The Jacobian of a vector of losses, as `jax.grad` is the gradient of one.

    The arguments are those of [`jaxjd.value_and_jac`][].

    **Returns:** a function that takes the arguments of `fun` and returns a
    [`jaxjd.Jacobian`][], or with `has_aux` the pair of it and the auxiliary output.

    **Raises:** as [`jaxjd.value_and_jac`][].
    """
    both = value_and_jac(
        fun,
        argnums,
        in_axes=in_axes,
        has_aux=has_aux,
        method=method,
        chunk_size=chunk_size,
        contraction=contraction,
    )

    @functools.wraps(fun)
    def jac_fun(*args: Any) -> Any:
        values, jacobian = both(*args)
        return (jacobian, values[1]) if has_aux else jacobian

    return jac_fun


def explain(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    *,
    in_axes: Sequence[Any] | None = None,
    has_aux: bool = False,
    contraction: PyTree[engine.Choice] = "auto",
) -> Callable[..., engine.Explanation]:
    """Say how `method="structured"` treats each parameter, and what that costs.

    The arguments are those of [`jaxjd.value_and_jac`][].

    **Returns:** a function that takes the arguments of `fun` and returns a table to
    print: per parameter the operations in which it is used, how inner products of its
    gradients are computed, the FLOPs and bytes of that, and, where its rows of the
    Jacobian are formed because no rule covers an operation, which one that is.

    **Raises:** as [`jaxjd.value_and_jac`][].
    """

    @functools.wraps(fun)
    def explain_fun(*args: Any) -> engine.Explanation:
        found = trace(fun, argnums, in_axes, has_aux, args)
        everything = found.parameters.unflatten(found.positions)
        names = [
            keystr(path) or "the parameter"
            for path, _ in jax.tree_util.tree_leaves_with_path(everything)
        ]
        choices = as_choices(contraction, found.parameters)
        plan = engine.plan(found.function, found.positions, choices)
        return engine.explain(plan, found.inputs, names)

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
) -> Traced:
    """**Raises:** as [`jaxjd.value_and_jac`][]."""
    single = isinstance(argnums, int)
    wanted = check_argnums((argnums,) if single else tuple(argnums), len(args))
    args = tuple(
        as_parameters(arg, i) if i in wanted else arg for i, arg in enumerate(args)
    )
    axes = check_in_axes(in_axes, wanted, len(args))

    def losses_and_aux(*args: Any) -> tuple[Any, Any]:
        return split_aux(fun(*args)) if has_aux else (fun(*args), None)

    function, inputs, places, example_losses, aux = engine.trace(
        losses_and_aux, args, axes, identity=fun
    )
    check_losses(example_losses)
    num_examples = function.num_examples(inputs)
    batch = () if num_examples is None else (num_examples,)
    shapes = tuple((*batch, *x.shape) for x in jax.tree.leaves(example_losses))
    losses = Losses(jax.tree.structure(example_losses), shapes, num_examples)
    if losses.num_losses == 0:
        raise ValueError(
            "`fun` must return at least one loss. "
            f"Got {jax.tree.map(lambda x: [*batch, *x.shape], example_losses)}."
        )

    place_of = jax.tree.unflatten(jax.tree.structure(args), places)
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


def structured_plan(
    found: Traced,
    method: Method,
    chunk_size: int | None,
    contraction: PyTree[engine.Choice],
) -> engine.Plan | None:
    """What the structured method is to do, or None if the method is another one."""
    if method not in ("auto", "structured"):
        return None
    choices = as_choices(contraction, found.parameters)
    plan = engine.plan(found.function, found.positions, choices)
    if found.function.axes is not None:
        return plan
    # Of a function of all losses nothing but rows can be taken in chunks.
    in_chunks = chunk_size is not None and chunk_size < found.losses.num_losses
    if method == "auto" and contraction == "auto":
        return plan if engine.saves_memory(plan) and not in_chunks else None
    if in_chunks:
        raise ValueError(
            "With the structured method, `chunk_size` needs a function of one example, "
            f"with `in_axes`. Got chunk_size={chunk_size}, in_axes=None. Give "
            'method="chunked", or leave `chunk_size` out.'
        )
    return plan


def check_method(method: str) -> None:
    if method not in get_args(Method):
        known = ", ".join(map(repr, get_args(Method)))
        raise ValueError(f"`method` must be one of {known}. Got {method!r}.")


def check_chunk_size(chunk_size: int | None) -> None:
    if chunk_size is None:
        return
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int | np.integer):
        raise TypeError(f"`chunk_size` must be an integer or None. Got {chunk_size!r}.")
    if chunk_size < 1:
        raise ValueError(f"`chunk_size` must be at least 1. Got {chunk_size}.")


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


def check_argnums(argnums: Sequence[int], num_args: int) -> list[int]:
    for i in argnums:
        if not -num_args <= i < num_args:
            raise ValueError(
                f"`argnums` must be positions among the {num_args} positional "
                f"arguments that `fun` is called with. Got {i}."
            )
    positions = [i % num_args for i in argnums]
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
        try:
            dtype = jnp.result_type(leaf)
        except TypeError:
            dtype = type(leaf).__name__
        if isinstance(dtype, str) or not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"The parameters, argument {position} of `fun`, must be real floating-"
                f"point arrays. Got {dtype} at {keystr(path) or 'the top'}. Pass "
                "what is not to be differentiated as another argument."
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


def check_losses(losses: PyTree[jax.ShapeDtypeStruct]) -> None:
    for path, loss in jax.tree_util.tree_leaves_with_path(losses):
        if not jnp.issubdtype(loss.dtype, jnp.floating):
            raise TypeError(
                "`fun` must return losses that are real floating-point arrays. "
                f"Got {loss.dtype} at {keystr(path) or 'the top'}."
            )
