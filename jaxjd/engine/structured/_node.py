"""Values that are the same for all examples, as functions of the inputs.

Weights are cast, reshaped or normalised before they act on an example. A `Node` is the
result of that, kept as an expression: it can be evaluated and differentiated later,
outside of the loops and of the batch of examples in which it was found. The gradient of
a use is a gradient with respect to a node. From there it is pulled back to the
parameters (`pullback`).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxjd.engine import _jaxpr


class Level(NamedTuple):
    """A `scan` around a value: how many scans are around it, and its length."""

    depth: int
    length: int


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """A value that depends on inputs shared by all examples.

    - `leaves`: the positions, among the inputs of the function, of the parameters
      through which it can be differentiated. Empty for a constant.
    - `levels`: the scans by which it is sliced. In the body of a scan over stacked
      layers, the weights of one layer are a slice of a parameter. The node stands for
      all slices together, so its value has one leading axis for each level.
    - `key`: equal for nodes of equal value.
    - `isometry`: the one node of which it holds the same entries, in another order,
      type or sign. Inner products of gradients are then the same for both.
    """

    leaves: frozenset[int]
    levels: tuple[Level, ...]
    key: Any
    isometry: "Node | None" = None

    def evaluate(self, inputs: Sequence[Array], memo: dict[Any, Array]) -> Array:
        raise NotImplementedError

    def value(self, inputs: Sequence[Array], memo: dict[Any, Array]) -> Array:
        if self.key not in memo:
            memo[self.key] = self.evaluate(inputs, memo)
        return memo[self.key]

    @property
    def is_isometric(self) -> bool:
        """Whether inner products of gradients are those of a parameter itself."""
        node: Node | None = self
        while node is not None and not isinstance(node, Input):
            node = node.isometry
        return node is not None


@dataclasses.dataclass(frozen=True, eq=False)
class Input(Node):
    position: int = -1

    def evaluate(self, inputs, memo):
        return inputs[self.position]


@dataclasses.dataclass(frozen=True, eq=False)
class Constant(Node):
    array: Any = None

    def evaluate(self, inputs, memo):
        return jnp.asarray(self.array)


@dataclasses.dataclass(frozen=True, eq=False)
class Slice(Node):
    """What one iteration of a scan sees of the node `isometry`."""

    def evaluate(self, inputs, memo):
        assert self.isometry is not None
        # The sliced axis comes behind those of the scans further out, as the axis of
        # the innermost level must.
        return self.isometry.value(inputs, memo)


@dataclasses.dataclass(frozen=True, eq=False)
class Result(Node):
    jaxpr: Any = None
    eqn: Any = None
    operands: tuple[Node, ...] = ()
    index: int = 0

    def evaluate(self, inputs, memo):
        def apply(*operands):
            return _jaxpr.evaluate(self.jaxpr, self.eqn, operands)[self.index]

        # The equation was found for one slice. It is mapped over all of them, over the
        # innermost level first, because its axis is the last.
        for level in reversed(self.levels):
            axes = tuple(0 if level in node.levels else None for node in self.operands)
            apply = jax.vmap(apply, axes)
        return apply(*[node.value(inputs, memo) for node in self.operands])


def input_node(position: int, parameter: int | None) -> Node:
    """An input, which is the parameter with this number or none.

    The number is part of the key, because the same parameter may be at different
    positions among the inputs of two functions.
    """
    if parameter is None:
        return Input(frozenset(), (), ("input", position), position=position)
    key = ("parameter", parameter)
    return Input(frozenset([position]), (), key, position=position)


def constant_node(array: Any) -> Node:
    # The node keeps the array alive, so that no other array can get the same id.
    return Constant(frozenset(), (), ("constant", id(array)), array=array)


def slice_node(node: Node, level: Level) -> Node:
    levels = (*node.levels, level)
    return Slice(node.leaves, levels, ("slice", level, node.key), node)


def result_nodes(jaxpr: Any, eqn: Any, operands: Sequence[Node]) -> list[Node]:
    levels = tuple(sorted({level for node in operands for level in node.levels}))
    leaves = frozenset().union(*(node.leaves for node in operands))
    key = (_equation_key(eqn), tuple(node.key for node in operands))
    return [
        Result(
            leaves if _passes_gradient(eqn, variable.aval) else frozenset(),
            levels,
            (key, index),
            operands[0] if _is_isometry(eqn) else None,
            jaxpr,
            eqn,
            tuple(operands),
            index,
        )
        for index, variable in enumerate(eqn.outvars)
    ]


ISOMETRIES = {
    "reshape",
    "transpose",
    "squeeze",
    "expand_dims",
    "rev",
    "neg",
    "copy",
    "copy_p",
    "sharding_constraint",
    "reshard",
    "mesh_cast",
}


def _is_isometry(eqn: Any) -> bool:
    name = eqn.primitive.name
    if name == "convert_element_type":
        return all(_jaxpr.is_real(v.aval) for v in (*eqn.invars, *eqn.outvars))
    if name == "broadcast_in_dim":
        return _jaxpr.size(eqn.invars[0].aval) == _jaxpr.size(eqn.outvars[0].aval)
    return name in ISOMETRIES


def _passes_gradient(eqn: Any, aval: Any) -> bool:
    return eqn.primitive.name != "stop_gradient" and _jaxpr.is_differentiable(aval)


def _equation_key(eqn: Any) -> Any:
    key = (eqn.primitive.name, tuple(sorted(eqn.params.items(), key=lambda x: x[0])))
    try:
        hash(key)
    except TypeError:
        return id(eqn)
    return key


def pullback(
    nodes: Sequence[Node], inputs: Sequence[Array], leaves: Sequence[int]
) -> Any:
    """The map from cotangents of nodes to cotangents of parameters."""

    def values(*point: Array) -> list[Array]:
        replaced: Mapping[int, Array] = dict(zip(leaves, point, strict=True))
        current = [replaced.get(i, x) for i, x in enumerate(inputs)]
        memo: dict[Any, Array] = {}
        return [node.value(current, memo) for node in nodes]

    return jax.vjp(values, *[inputs[i] for i in leaves])[1]
