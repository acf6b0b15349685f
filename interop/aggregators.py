"""Compare the stateless methods of jaxjd and TorchJD, one row of a table each.

A row of `METHODS` says how each library makes the method, on which Jacobians the two
are compared, and how far apart they may be. Methods with a state are in
`interop.steps`; `upgrad`, `dualproj` and the plain sums are in `interop.weights`.

If a method is random, TorchJD draws the numbers and jaxjd is given the same ones.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torchjd.aggregation as reference
import torchjd.scalarization as scalarization
from jaxtyping import Array, Float, Int
from torch.overrides import TorchFunctionMode

import jaxjd
from jaxjd.transform._as_jacobian import as_jacobian
from jaxjd.transform._graddrop import drop_signs
from jaxjd.weighting._pcgrad import pcgrad_weights
from jaxjd.weighting._random import random_weights

from .bridge import to_jax, to_torch
from .check import Check
from .jacobians import Jacobian, comparable, normal
from .precision import Precision, jax_precision, torch_dtype
from .weights import relative_difference

Bounds = dict[Precision, float]
w = jaxjd.weighting


def counterpart(name: str) -> type | None:
    """TorchJD's class for a method of jaxjd, or None if TorchJD lacks the method.

    It is the weighting if both libraries have one, and otherwise the aggregator, or the
    scalarizer of a method that is only a function of the losses.
    """
    of_losses = hasattr(jaxjd.scalarization, name) and not hasattr(w, name)
    source = scalarization if of_losses else reference
    classes = {key.lower(): value for key, value in vars(source).items()}
    plain = {"conflict_free": "config"}.get(name, name.replace("_", ""))
    of_rows = classes.get(plain)
    if not hasattr(w, name):
        return of_rows
    return classes.get(f"{plain}weighting", of_rows)


class Inputs(NamedTuple):
    """What both libraries are given, as arrays of either. Each method takes one."""

    rows: Float[Any, "m n"]
    gramian: Float[Any, "m m"]
    cross_gramian: Float[Any, "m m"]
    """The products of the rows with the rows of another batch."""
    losses: Float[Any, " m"]
    """Positive numbers, one for each row."""


class Ours(NamedTuple):
    """A method of jaxjd: `update(inputs, draws, state) -> (weights or update, state)`.

    `draws` are the random numbers, or None if the method is not random.
    """

    init: Callable[[], Any]
    update: Callable[[Inputs, Any, Any], tuple[Array, Any]]


class Method(NamedTuple):
    """A row of the table.

    - `name`: the name of jaxjd's method, then a comma and anything else.
    - `ours`: called with m and n.
    - `theirs`: called with m and the dtype. The result is called with the input that
      the method `takes`.
    - `sequences`: the inputs, in float64. The state, if any, is kept within a sequence.
    - `draws`: converts the random tensors that TorchJD drew to the form `ours` takes.
    - `alone`: whether both libraries also accept a single loss.
    """

    name: str
    ours: Callable[[int, int], Ours]
    theirs: Callable[[int, torch.dtype], Callable[[torch.Tensor], torch.Tensor]]
    takes: Literal["rows", "gramian", "cross_gramian", "losses"]
    sequences: Callable[[], list[list[Inputs]]]
    bounds: Bounds
    draws: Callable[[list[torch.Tensor]], np.ndarray] | None = None
    quick: bool = True
    alone: bool = True


def checks() -> list[Check]:
    single = [[inputs(normal(1, 5))]]
    rows = [row for method in METHODS for row in with_alone(method, single)]
    return [check("method", row) for row in rows]


def with_alone(method: Method, single: list[list[Inputs]]) -> list[Method]:
    """The method as it is, and with one loss (not quick, because of compilation)."""
    if not method.alone:
        return [method]
    name = f"{method.name}, m = 1"
    return [
        method,
        method._replace(name=name, sequences=lambda: single, quick=False),
    ]


def check(group: str, method: Method) -> Check:
    difference = functools.partial(method_difference, method=method)
    return Check(group, method.name, difference, method.bounds, method.quick)


def method_difference(precision: Precision, *, method: Method) -> float:
    """The largest relative difference between the two results, over all inputs."""
    worst = 0.0
    dtype = torch_dtype(precision)
    with jax_precision(precision):

        @functools.cache  # All sequences of one shape share one program.
        def compiled(m: int, n: int) -> Ours:
            init, update = method.ours(m, n)
            return Ours(init, jax.jit(update))

        for sequence in method.sequences():
            m, n = sequence[0].rows.shape
            init, update = compiled(m, n)
            state, theirs = init(), method.theirs(m, dtype)
            for number, step in enumerate(sequence):
                tensors = Inputs(*(torch.from_numpy(x).to(dtype) for x in step))
                # JAX assumes that its arrays never change: give it its own memory.
                arrays = Inputs(*(to_jax(x.clone()) for x in tensors))
                torch.manual_seed(number)
                with (
                    Drawn() as drawn,
                    warnings.catch_warnings(action="ignore"),  # CVXPY warns: slow.
                ):
                    expected = theirs(getattr(tensors, method.takes))
                if bool(drawn.tensors) != (method.draws is not None):
                    raise RuntimeError(
                        f"{method.name}: jaxjd must be given every random number that "
                        f"TorchJD draws. TorchJD drew {len(drawn.tensors)} tensors."
                    )
                draws = method.draws(drawn.tensors) if method.draws else None
                result, state = update(arrays, draws, state)
                worst = max(worst, relative_difference(to_torch(result), expected))
    return worst


class Drawn(TorchFunctionMode):
    """A context that records every random tensor that torch makes."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[torch.Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        del types
        result = func(*args, **(kwargs or {}))
        if func in (torch.rand, torch.randn, torch.randperm):
            self.tensors.append(result)
        return result


def of_gramian(make: Callable[[int], jaxjd.Weighting]) -> Callable[[int, int], Ours]:
    def ours(m: int, n: int) -> Ours:
        del n
        weighting = make(m)
        return Ours(
            weighting.init,
            lambda inputs, draws, state: weighting.update(inputs.gramian, state),
        )

    return ours


def of_cross_gramian(
    make: Callable[[int], jaxjd.Weighting],
) -> Callable[[int, int], Ours]:
    def ours(m: int, n: int) -> Ours:
        del n
        weighting = make(m)
        return Ours(
            weighting.init,
            lambda inputs, draws, state: weighting.update(
                inputs.gramian, state, cross_gramian=inputs.cross_gramian
            ),
        )

    return ours


def of_rows(make: Callable[[int], Any]) -> Callable[[int, int], Ours]:
    """Wrap a transformation, which is given the rows themselves."""

    def ours(m: int, n: int) -> Ours:
        tx = make(m)
        params = jnp.zeros(n)
        return Ours(
            lambda: tx.init(params),
            lambda inputs, draws, state: tx.update(inputs.rows, state, params),
        )

    return ours


def of_draws(
    result: Callable[[Inputs, Any], Array],
) -> Callable[[int, int], Ours]:
    """Wrap a stateless function of the inputs and the random numbers."""
    return lambda m, n: Ours(
        tuple, lambda inputs, draws, state: (result(inputs, draws), state)
    )


def kinds(*names: str) -> Callable[[], list[list[Inputs]]]:
    """A method's sequences: the Jacobians of these kinds in `comparable()`."""

    def sequences() -> list[list[Inputs]]:
        every = comparable()
        return [[inputs(J) for J in every[name]] for name in names]

    return sequences


def inputs(jacobian: Jacobian, other: Jacobian | None = None) -> Inputs:
    second = jacobian if other is None else other
    losses = np.square(jacobian).mean(axis=1)
    return Inputs(jacobian, jacobian @ jacobian.T, jacobian @ second.T, losses)


def preference(m: int) -> list[float]:
    """A preference vector whose first entry is 0."""
    return [i / m for i in range(m)]


def preferred(m: int, dtype: torch.dtype) -> Float[torch.Tensor, " m"]:
    return torch.tensor(preference(m), dtype=dtype)


def leak(m: int) -> Float[np.ndarray, " m"]:
    return np.linspace(0, 1, m)


def permutations(drawn: list[torch.Tensor]) -> Int[np.ndarray, "m m"]:
    return np.stack([permutation.numpy() for permutation in drawn])


def only(drawn: list[torch.Tensor]) -> Float[np.ndarray, " n"]:
    (tensor,) = drawn
    return tensor.numpy()


def drop_signs_of_rows(leak: Callable[[int], Any]) -> Callable[[Inputs, Any], Array]:
    def result(inputs: Inputs, uniforms: Array) -> Array:
        m, n = inputs.rows.shape
        jacobian = as_jacobian(inputs.rows, jnp.zeros(n, inputs.rows.dtype))
        return drop_signs(jacobian, uniforms, leak(m))

    return result


def present(inputs: Inputs) -> Array:
    return jnp.ones(len(inputs.rows), bool)


# All have 12 losses, and 24 parameters for methods that take the rows: so each method
# compiles one program.
WIDE = ("random", "conflicting", "rank-deficient", "near-duplicate rows")
WIDE += ("row norms 1..1000", "one zero row", "trace below norm_eps")
SQUARE = ("random of rank 6", "duplicate rows", "opposed rows", "zero")
# Their rank does not depend on rounding, not even in float32.
CLEAR = ("random", "conflicting", "rank-deficient", "duplicate rows", "one zero row")
CLEAR += ("trace below norm_eps",)
# Not Pareto-stationary, and not so small that TorchJD treats them as zero.
PROGRESS = ("random", "conflicting", "rank-deficient")
DISTINCT = ("random", "conflicting", "rank-deficient", "row norms 1..1000")

# Sums and products of the inputs: nothing amplifies their rounding.
ROUNDING: Bounds = {"float32": 2e-6, "float64": 1e-14}
# Rounding times the condition number of the Jacobians, up to 1e3: ten times what was
# measured.
CONDITION: Bounds = {"float32": 1e-4, "float64": 1e-12}
# TorchJD's solvers stop at 1e-8 of their objectives, which leaves CAGrad's update up to
# 2e-4 off. `interop.optimality` measures which library is closer.
INTERIOR_POINT: Bounds = {"float32": 1e-3, "float64": 1e-3}
LEAST_SQUARES: Bounds = {"float32": 5e-5, "float64": 2e-6}

SCALE_MODES: tuple[Any, ...] = ("min", "median", "rmse")

METHODS = [
    Method(
        "mgda, 100 Frank-Wolfe steps",
        of_gramian(lambda m: jaxjd.weighting.mgda(frank_wolfe_steps=100)),
        lambda m, dtype: reference.MGDAWeighting(),
        "gramian",
        kinds(*DISTINCT, "one zero row", "trace below norm_eps"),
        CONDITION,
    ),
    *(
        Method(
            f"cagrad, c = {c:g}",
            of_rows(lambda m, c=c: jaxjd.cagrad(c)),
            lambda m, dtype, c=c: reference.CAGrad(c),
            "rows",
            kinds(*PROGRESS, "near-duplicate rows"),
            INTERIOR_POINT,
            quick=c == 0.5,
        )
        for c in (0.5, 2.0)
    ),
    *(
        Method(
            f"fairgrad, alpha = {alpha:g}",
            of_gramian(lambda m, alpha=alpha: jaxjd.weighting.fairgrad(alpha)),
            lambda m, dtype, alpha=alpha: reference.FairGradWeighting(alpha),
            "gramian",
            kinds(*PROGRESS),
            LEAST_SQUARES,
            quick=alpha == 2,
        )
        for alpha in (0.5, 1.0, 2.0)
    ),
    Method(
        "imtl_g",
        of_gramian(lambda m: jaxjd.weighting.imtl_g()),
        lambda m, dtype: reference.IMTLGWeighting(),
        "gramian",
        kinds(*CLEAR),
        CONDITION,
    ),
    *(
        Method(
            f"aligned_mtl, {mode}",
            of_gramian(
                lambda m, mode=mode: jaxjd.weighting.aligned_mtl(scale_mode=mode)
            ),
            lambda m, dtype, mode=mode: reference.AlignedMTLWeighting(None, mode),
            "gramian",
            kinds(*CLEAR),
            CONDITION,
        )
        for mode in SCALE_MODES
    ),
    Method(
        "aligned_mtl, preference",
        of_gramian(lambda m: jaxjd.weighting.aligned_mtl(preference(m))),
        lambda m, dtype: reference.AlignedMTLWeighting(preferred(m, dtype)),
        "gramian",
        kinds("random"),
        CONDITION,
        alone=False,
    ),
    Method(
        "conflict_free",
        of_rows(lambda m: jaxjd.conflict_free()),
        lambda m, dtype: reference.ConFIG(),
        "rows",
        kinds(*CLEAR, "row norms 1..1000"),
        CONDITION,
    ),
    Method(
        "conflict_free, preference",
        of_rows(lambda m: jaxjd.conflict_free(preference(m))),
        lambda m, dtype: reference.ConFIG(preferred(m, dtype)),
        "rows",
        kinds("random"),
        CONDITION,
        alone=False,
    ),
    *(
        Method(
            f"krum, {byzantine} byzantine, {selected} selected",
            of_gramian(lambda m, f=byzantine, k=selected: jaxjd.weighting.krum(f, k)),
            lambda m, dtype, f=byzantine, k=selected: reference.KrumWeighting(f, k),
            "gramian",
            kinds(*DISTINCT),
            ROUNDING,
            alone=False,
        )
        for byzantine, selected in ((0, 1), (3, 4), (0, 12))
    ),
    Method(
        "pcgrad, same permutations",
        of_draws(
            lambda inputs, orders: pcgrad_weights(
                inputs.gramian, present(inputs), orders
            )
        ),
        lambda m, dtype: reference.PCGradWeighting(),
        "gramian",
        kinds(*WIDE, *SQUARE),
        ROUNDING,
        draws=permutations,
    ),
    Method(
        "random, same normal numbers",
        of_draws(lambda inputs, normals: random_weights(normals, present(inputs))),
        lambda m, dtype: reference.Random().weighting,
        "rows",
        kinds("random"),
        ROUNDING,
        draws=only,
    ),
    Method(
        "graddrop, same uniform numbers",
        of_draws(drop_signs_of_rows(lambda m: None)),
        lambda m, dtype: reference.GradDrop(),
        "rows",
        kinds(*WIDE),
        ROUNDING,
        draws=only,
    ),
    Method(
        "graddrop, leak, same uniform numbers",
        of_draws(drop_signs_of_rows(lambda m: jnp.asarray(leak(m)))),
        lambda m, dtype: reference.GradDrop(leak=torch.tensor(leak(m), dtype=dtype)),
        "rows",
        kinds(*WIDE),
        ROUNDING,
        draws=only,
    ),
    *(
        Method(
            f"trimmed_mean, {trimmed}",
            of_rows(lambda m, trimmed=trimmed: jaxjd.trimmed_mean(trimmed)),
            lambda m, dtype, trimmed=trimmed: reference.TrimmedMean(trimmed),
            "rows",
            kinds(*WIDE),
            ROUNDING,
            alone=trimmed == 0,
        )
        for trimmed in (0, 3)
    ),
]
