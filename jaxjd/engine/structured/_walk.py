"""Walk through the function of one example, and find where it uses parameters.

A walk evaluates a jaxpr, equation by equation, and tells two kinds of values apart:

- shared values, which are the same for all examples: parameters, constants, and what is
  computed from them alone. These have a `Node`, which says how to compute them again;
- values of the example, which have none.

An equation with both kinds among its operands is where a parameter acts on an example.
Let it be `y = op(p, a)`, with p a parameter (or computed from parameters) and a of the
example. There are two ways to get the gradient of p:

- The equation has a rule, so it is linear in p. The walk computes `y + ε` instead, with
  a perturbation ε = 0 that is an argument of the walk. The loss depends on ε as it does
  on y, so its gradient with respect to ε is `δ = ∂loss/∂y`, the cotangent of y. By the
  chain rule the gradient of p through this equation is `opᵀ(a, δ)`, where opᵀ is the
  transpose of op(·, a). The walk records a. This is a `Use`.
- The equation has no rule. Then the parameter itself is perturbed, `p + ε`, in this
  equation and in all others without a rule. The gradient with respect to this ε is that
  of the example, exact whatever the equations are, but as large as p. These parameters
  are called direct.

Each path from a parameter to the loss leads through exactly one perturbation, so the
gradients of all uses and the direct one add up to the whole gradient.

A walk is taken twice. The first one finds the uses, hence the shapes of the
perturbations. It evaluates nothing, because the jaxpr already says which shapes its
values have: in place of an array it has anything with a shape and a dtype. The second
walk evaluates the function, as a function of the perturbations too, with respect to
which it is then differentiated.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxjd._sharding import abstract, explicit_spec, zeros_like
from jaxjd.engine import _jaxpr
from jaxjd.engine._perturb import perturb
from jaxjd.engine.structured import _node
from jaxjd.engine.structured._node import Level, Node
from jaxjd.engine.structured._rules import Bilinear, rule


class Origin(NamedTuple):
    """How a shared value was computed: an equation, its operands, which result it is.

    An equation without a rule needs the value for perturbed parameters. It is computed
    from here, when it turns out to be needed.
    """

    jaxpr: Any
    eqn: Any
    operands: "list[Value]"
    index: int


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """A value in the walk. It is hashed by identity.

    - `array`: the value itself, for parameters that are not perturbed. In a first walk,
      its shape and dtype.
    - `node`: which function of the inputs it is, if it is shared; None if it is of the
      example. All perturbations of the latter are in `array` already.
    - `perturbed`: a shared value for perturbed parameters, if `origin` is None: an
      input of the function or of a loop's body.
    - `origin`: how any other shared value was computed.
    """

    array: Any
    node: Node | None = None
    perturbed: Any = None
    origin: Origin | None = None

    @property
    def has_gradient(self) -> bool:
        """Whether this is a parameter, or computed from parameters alone."""
        return self.node is not None and bool(self.node.leaves)


@dataclasses.dataclass(frozen=True, eq=False)
class Use:
    """A parameter, as `node`, acts on the example in an equation that has a rule.

    - `operand`: which operand of the equation the parameter is.
    - `others`: where the other operands are among the recorded ones.
    - `levels`: the scans around the equation. Recorded operands and cotangents have one
      leading axis for each: an iteration is a use of its own, with its own a and δ.
    - `perturbation`: shape, with the axes of `levels`, and dtype of the result.
    """

    jaxpr: Any
    eqn: Any
    operand: int
    others: tuple[int, ...]
    node: Node
    levels: tuple[Level, ...]
    bilinear: Bilinear
    perturbation: jax.ShapeDtypeStruct


class Walk:
    """One walk through a jaxpr, and all that it finds.

    `perturbations` holds one array for each use, in the order in which they are found.
    Without it, this is a first walk. `levels` are the scans around the jaxpr.

    Afterwards, `uses` are the uses; `recorded` their other operands, each once however
    many uses share it; and `direct` says for each parameter that must be perturbed
    itself in which primitives.
    """

    def __init__(
        self,
        perturbations: Sequence[Array] | None = None,
        levels: tuple[Level, ...] = (),
    ):
        self.is_first = perturbations is None
        self.perturbations = perturbations or []
        self.levels = levels
        self.uses: list[Use] = []
        self.recorded: list[Any] = []
        self.places: dict[Value, int] = {}
        self.direct: dict[int, set[str]] = {}
        # Shared values for perturbed parameters, each computed once per walk. A second
        # copy would be perturbed by uses of its own.
        self.perturbed_copies: dict[Value, Array] = {}

    def run(self, jaxpr: Any, operands: Sequence[Value]) -> list[Value]:
        """Evaluate a jaxpr on values for its constants, then its arguments."""
        variables = (*jaxpr.constvars, *jaxpr.invars)
        values = dict(zip(variables, operands, strict=True))

        def read(variable):
            if _jaxpr.is_literal(variable):
                return literal(variable)
            return values[variable]

        for eqn in jaxpr.eqns:
            results = self.equation(jaxpr, eqn, [read(v) for v in eqn.invars])
            values.update(zip(eqn.outvars, results, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def equation(self, jaxpr: Any, eqn: Any, operands: list[Value]) -> list[Value]:
        name = eqn.primitive.name
        # A call is walked through even if all of its operands are shared: the nodes of
        # its single equations say more than one of the whole call would.
        if name in _jaxpr.CALLS and any(value.has_gradient for value in operands):
            jaxpr, consts = _jaxpr.called(eqn)
            return self.run(jaxpr, [*map(constant, consts), *operands])
        if all(value.node is not None for value in operands):
            return self.shared_equation(jaxpr, eqn, operands)
        if not any(value.has_gradient for value in operands):
            return example(self.evaluate(jaxpr, eqn, [v.array for v in operands]))
        # Parameters and the example are operands of the same equation.
        if name == "scan":
            return self.scan(eqn, operands)
        if name == "cond":
            return self.cond(eqn, operands)
        if name in _jaxpr.REMAT:
            return self.remat(eqn, operands)
        return self.mixed_equation(jaxpr, eqn, operands)

    def mixed_equation(
        self, jaxpr: Any, eqn: Any, operands: list[Value]
    ) -> list[Value]:
        """A parameter acts on the example in a primitive without a body."""
        if not any(_jaxpr.is_differentiable(v.aval) for v in eqn.outvars):
            return example(self.evaluate(jaxpr, eqn, [v.array for v in operands]))
        result = self.apply_rule(jaxpr, eqn, operands)
        if result is not None:
            return example([result])
        arrays = [self.perturbed_array(v, eqn.primitive.name) for v in operands]
        return example(self.evaluate(jaxpr, eqn, arrays))

    def evaluate(self, jaxpr: Any, eqn: Any, arrays: Sequence[Any]) -> list[Any]:
        if self.is_first:
            return [variable.aval for variable in eqn.outvars]
        return _jaxpr.evaluate(jaxpr, eqn, arrays)

    def shared_equation(
        self, jaxpr: Any, eqn: Any, operands: list[Value]
    ) -> list[Value]:
        """An equation that no example touches."""
        nodes = _node.result_nodes(jaxpr, eqn, [v.node for v in operands if v.node])
        arrays = self.evaluate(jaxpr, eqn, [v.array for v in operands])
        return [
            Value(array, node, origin=Origin(jaxpr, eqn, operands, index))
            for index, (array, node) in enumerate(zip(arrays, nodes, strict=True))
        ]

    def apply_rule(self, jaxpr: Any, eqn: Any, operands: list[Value]) -> Array | None:
        """The perturbed result of an equation, or None if no rule fits it."""
        places = [n for n, value in enumerate(operands) if value.has_gradient]
        # With parameters in two places the result is not linear in them.
        bilinear = rule(eqn, places[0]) if len(places) == 1 else None
        if bilinear is None:
            return None
        node = operands[places[0]].node
        assert node is not None
        (result,) = self.evaluate(jaxpr, eqn, [v.array for v in operands])
        shape = (*(level.length for level in self.levels), *result.shape)
        perturbation = abstract(shape, typeof(result))
        others = [v for n, v in enumerate(operands) if n != places[0]]
        use = Use(
            jaxpr,
            eqn,
            places[0],
            tuple(map(self.record, others)),
            node,
            self.levels,
            bilinear,
            perturbation,
        )
        perturbations = self.perturbations_of([use])
        return result if self.is_first else perturb(result, perturbations[0])

    def record(self, operand: Value) -> int:
        """Where an operand is among those recorded."""
        # Values tell operands apart, not arrays: outside of `jit` two constants may be
        # one array, which a walk on abstract values cannot know.
        if operand not in self.places:
            self.places[operand] = len(self.recorded)
            self.recorded.append(operand.array)
        return self.places[operand]

    def perturbations_of(self, uses: Sequence[Use]) -> list[Array]:
        """Note uses, and return the perturbations of their results.

        A first walk has none.
        """
        first = len(self.uses)
        self.uses.extend(uses)
        # The second walk meets the same uses in the same order as the first.
        return list(self.perturbations[first : len(self.uses)])

    def perturbed_array(self, value: Value, reason: str) -> Array:
        """What an equation without a rule takes: computed from perturbed parameters."""
        if not value.has_gradient:
            return value.array
        if value not in self.perturbed_copies:
            self.perturbed_copies[value] = self.perturbed_copy(value, reason)
        return self.perturbed_copies[value]

    def perturbed_copy(self, value: Value, reason: str) -> Array:
        if value.origin is None:
            assert value.node is not None
            for leaf in value.node.leaves:
                self.direct.setdefault(leaf, set()).add(reason)
            return value.perturbed
        jaxpr, eqn, operands, index = value.origin
        # A parameter that a rule applies to need not be perturbed itself, although no
        # example is in this equation: a recurrent layer's first step may be a product
        # of its weights and a state of zeros.
        result = self.apply_rule(jaxpr, eqn, operands)
        if result is not None:
            return result
        arrays = [self.perturbed_array(operand, reason) for operand in operands]
        return self.evaluate(jaxpr, eqn, arrays)[index]

    def enter_body(
        self, findings: "Findings", lengths: tuple[int, ...] = ()
    ) -> list[Array]:
        """Note what a first walk through a body has found, and return perturbations.

        What the body records has further leading axes of these lengths. Until it is
        known, its shapes stand among the recorded operands.
        """
        first = len(self.recorded)
        self.recorded.extend(
            abstract((*lengths, *x.shape), typeof(x)) for x in findings.recorded
        )
        uses = [
            dataclasses.replace(use, others=tuple(first + n for n in use.others))
            for use in findings.uses
        ]
        return self.perturbations_of(uses)

    def leave_body(
        self, body: "Walk", results: Sequence[Value], reason: str
    ) -> list[Array]:
        """What a body returns to this walk, after the walk through the body.

        All of it is of the example then, so parameters among it are perturbed.
        """
        arrays = [body.perturbed_array(value, reason) for value in results]
        for leaf, reasons in body.direct.items():
            self.direct.setdefault(leaf, set()).update(reasons)
        return arrays

    def scan(self, eqn: Any, operands: list[Value]) -> list[Value]:
        """The same scan of a body that also takes perturbations and returns records.

        Perturbations are scanned, one slice for each iteration, so that the cotangents
        of all iterations come out stacked; what is recorded is stacked likewise.
        """
        num_consts, num_carry = _jaxpr.scan_operands(eqn)
        body, body_consts = _jaxpr.called(eqn)
        level = Level(len(self.levels), eqn.params["length"])
        levels = (*self.levels, level)
        # Constants are the same values inside. They keep their nodes, so parameters
        # among them (the weights of a recurrent layer) meet their rules there.
        consts = [*map(constant, body_consts), *operands[:num_consts]]
        init = operands[num_consts : num_consts + num_carry]
        scanned = operands[num_consts + num_carry :]
        # What is carried and never changed is a constant, and may stay a parameter.
        carried_in = body.invars[num_consts : num_consts + num_carry]
        changes = [
            before is not after
            for before, after in zip(carried_in, body.outvars[:num_carry], strict=True)
        ]
        first = [
            self.perturbed_array(value, "scan (carried)") if changed else None
            for value, changed in zip(init, changes, strict=True)
        ]

        def step(walk, carry, slices):
            carry = [
                value if array is None else Value(array)
                for value, array in zip(init, carry, strict=True)
            ]
            # A slice of a parameter (the weights of one of the stacked layers) is an
            # input of the body. Its node is the slice of the whole, and it comes in two
            # versions, with and without the parameter's own perturbation.
            slices = [
                Value(
                    array,
                    None if value.node is None else _node.slice_node(value.node, level),
                    array if perturbed is None else perturbed,
                )
                for value, (array, perturbed) in zip(scanned, slices, strict=True)
            ]
            results = walk.run(body, [*consts, *carry, *slices])
            arrays = self.leave_body(
                walk,
                [
                    value if n >= num_carry or changes[n] else Value(None)
                    for n, value in enumerate(results)
                ],
                "scan (returned)",
            )
            return arrays[:num_carry], (arrays[num_carry:], walk.recorded)

        copies = [recompute_perturbed(value) for value in scanned]
        slices = [
            (value.array, None if copy is value.array else copy)
            for value, copy in zip(scanned, copies, strict=True)
        ]
        one = jax.tree.map(slice_of, slices)
        findings = explore(step, levels, first, one)
        place = len(self.recorded)
        perturbations = self.enter_body(findings, (level.length,))

        def with_perturbations(carry, xs):
            return step(Walk(xs[1], levels), carry, xs[0])

        if self.is_first:
            avals = [variable.aval for variable in eqn.outvars]
            carry, stacked = avals[:num_carry], avals[num_carry:]
        else:
            carry, (stacked, self.recorded[place:]) = jax.lax.scan(
                with_perturbations,
                first,
                (slices, perturbations),
                length=level.length,
                reverse=eqn.params["reverse"],
                unroll=eqn.params["unroll"],
            )
        carried = [
            Value(array) if changed else value
            for value, array, changed in zip(init, carry, changes, strict=True)
        ]
        return [*carried, *example(stacked)]

    def cond(self, eqn: Any, operands: list[Value]) -> list[Value]:
        """The same branches, each with its own perturbations and records."""
        index, *operands = operands
        branches = [_jaxpr.opened(branch) for branch in eqn.params["branches"]]

        def branch(walk, jaxpr, consts):
            results = walk.run(jaxpr, [*map(constant, consts), *operands])
            return self.leave_body(walk, results, "cond (returned)"), walk.recorded

        findings = [
            explore(functools.partial(branch, jaxpr=jaxpr, consts=consts), self.levels)
            for jaxpr, consts in branches
        ]
        place = len(self.recorded)
        perturbations = [self.enter_body(of_branch) for of_branch in findings]
        if self.is_first:
            return example([variable.aval for variable in eqn.outvars])

        def one_of_all(n):
            # All branches return what each of them records; it is zero, as is its
            # cotangent, for those not taken.
            def taken():
                everything = [
                    [zeros_like(typeof(x)) for x in of_branch.recorded]
                    for of_branch in findings
                ]
                walk = Walk(perturbations[n], self.levels)
                results, everything[n] = branch(walk, *branches[n])
                return results, everything

            return taken

        results, recorded = jax.lax.switch(
            index.array, [one_of_all(n) for n in range(len(branches))]
        )
        self.recorded[place:] = [operand for branch in recorded for operand in branch]
        return example(results)

    def remat(self, eqn: Any, operands: list[Value]) -> list[Value]:
        """The same body, rematerialised with its perturbations.

        What it records is kept all the same, but nothing else of it is.
        """
        jaxpr, consts = _jaxpr.called(eqn)

        def body(walk):
            results = walk.run(jaxpr, [*map(constant, consts), *operands])
            return self.leave_body(walk, results, "remat (returned)"), walk.recorded

        place = len(self.recorded)
        perturbations = self.enter_body(explore(body, self.levels))
        if self.is_first:
            return example([variable.aval for variable in eqn.outvars])
        results, self.recorded[place:] = jax.checkpoint(
            lambda perturbations: body(Walk(perturbations, self.levels)),
            prevent_cse=eqn.params["prevent_cse"],
            policy=eqn.params["policy"],
        )(perturbations)
        return example(results)


class Findings(NamedTuple):
    """What a first walk finds: `Walk.uses`, `.recorded` and `.direct`."""

    uses: list[Use]
    recorded: list[Any]
    direct: dict[int, set[str]]


def explore(
    body: Callable[..., Any], levels: tuple[Level, ...], *operands: Any
) -> Findings:
    """A first walk through `body(walk, *operands)`, which evaluates nothing."""
    walk = Walk(levels=levels)
    body(walk, *operands)
    return Findings(walk.uses, walk.recorded, walk.direct)


def typeof(value: Any) -> Any:
    """The type of an array, or what stands for one in a first walk."""
    return jax.typeof(value) if isinstance(value, jax.Array | np.ndarray) else value


def slice_of(stacked: Any) -> jax.ShapeDtypeStruct:
    """The type of what one iteration of a scan sees."""
    aval = typeof(stacked)
    spec = explicit_spec(aval)
    if spec is None:
        return jax.ShapeDtypeStruct(aval.shape[1:], aval.dtype)
    sharding = NamedSharding(aval.sharding.mesh, PartitionSpec(*spec[1:]))
    return jax.ShapeDtypeStruct(aval.shape[1:], aval.dtype, sharding=sharding)


def constant(array: Any) -> Value:
    return Value(array, _node.constant_node(array), array)


def literal(variable: Any) -> Value:
    array = np.asarray(variable.val, variable.aval.dtype)
    return Value(array, _node.constant_node(variable.val), array)


def example(arrays: Sequence[Any]) -> list[Value]:
    return [Value(array) for array in arrays]


def recompute_perturbed(value: Value, memo: dict[Value, Array] | None = None) -> Array:
    """A value for perturbed parameters, without any use being noted.

    For what is scanned: whether its slices need the perturbation is seen in the body.
    In a first walk, or where no parameter of it is direct, this is `value.array`.
    """
    if not value.has_gradient:
        return value.array
    if value.origin is None:
        return value.perturbed
    memo = {} if memo is None else memo
    if value not in memo:
        jaxpr, eqn, operands, index = value.origin
        arrays = [recompute_perturbed(operand, memo) for operand in operands]
        unchanged = all(
            array is operand.array
            for array, operand in zip(arrays, operands, strict=True)
        )
        memo[value] = (
            value.array if unchanged else _jaxpr.evaluate(jaxpr, eqn, arrays)[index]
        )
    return memo[value]
