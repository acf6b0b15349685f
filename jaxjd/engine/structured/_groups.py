"""Products, gradients and weighted sums for a group of parameters, from their uses."""

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxjd._numerics import accumulation_dtype
from jaxjd._sharding import (
    as_examples,
    automatically,
    by_rows,
    entry_for,
    flat_rows,
    mesh_of,
    replicated,
    spec_by_rows,
    spec_of,
    spread,
)
from jaxjd.engine import _products
from jaxjd.engine.dense import with_examples_joined
from jaxjd.engine.structured import _contraction, _use
from jaxjd.engine.structured._backward import Pass
from jaxjd.engine.structured._contraction import Contraction, Factors
from jaxjd.engine.structured._node import Input, pullback
from jaxjd.engine.structured._plan import Group, Plan, form, joint

# Keep a parameter's rows only if they are at most this many times larger than its
# factors.
REUSED_PER_KEPT = 2

# On a CPU, rows are multiplied in at most so many parts, of at least so many examples,
# to compute only the upper triangle of their products. With smaller parts nothing is
# gained: such a product takes as long as it takes to read its operands. A GPU would
# have as much to do for each part as for all rows together.
MAX_PARTS, EXAMPLES_PER_PART = 4, 16


class Point(NamedTuple):
    """A function, where it is differentiated, and what the passes have left there.

    `leaves` are the positions in `inputs` of the parameters that are asked for. There
    are `num_losses` losses for each of `num_examples` examples.
    """

    plan: Plan
    inputs: Sequence[Array]
    passes: Pass
    leaves: tuple[int, ...]
    num_examples: int
    num_losses: int

    @property
    def num_rows(self) -> int:
        return self.num_examples * self.num_losses


def all_products(left: Point, right: Point) -> Float[Array, "a b"]:
    """Inner products of the gradients at one point with those at another.

    Both are of the same plan, and of the same parameters. On a mesh the products are
    spread by rows, as those of each group are: adding these up moves nothing.
    """
    dtype = accumulation_dtype(*[left.inputs[i] for i in left.leaves])
    total = jnp.zeros((left.num_rows, right.num_rows), dtype)
    # On a mesh, rows of the same losses are multiplied together, which takes one sum
    # over devices.
    on_mesh = mesh_of(left.passes) is not None
    formed: dict[tuple[int, ...], tuple[list[Array], list[Array]]] = {}
    for groups in left.plan.groups_of(left.leaves):
        x, losses = of_losses(left, groups)
        y = x if right is left else of_losses(right, groups)[0]
        if not losses:
            continue
        if on_mesh and contraction(x, groups) == "rows":
            rows = formed.setdefault(losses, ([], []))
            rows[0].extend(formed_rows(x, groups))
            rows[1].extend(
                rows[0][len(rows[1]) :] if y is x else formed_rows(y, groups)
            )
            continue
        found = products(x, y, groups).astype(dtype)
        total = _added(total, found, rows_of(left, losses), rows_of(right, losses))
    for losses, (rows, others) in formed.items():
        others = rows if right is left else others
        found = _products.products(rows, others).astype(dtype)
        total = _added(total, found, rows_of(left, losses), rows_of(right, losses))
    return total


def _added(
    total: Float[Array, "m k"],
    found: Float[Array, "a b"],
    rows: Int[np.ndarray, " a"],
    columns: Int[np.ndarray, " b"],
) -> Float[Array, "m k"]:
    if found.shape == total.shape:
        return total + found
    places = np.ix_(rows, columns)
    return automatically(lambda x, y: x.at[places].add(y), total, found)


def products_across_plans(left: Point, right: Point) -> Float[Array, "a b"]:
    """The same for two functions of the same parameters, one parameter at a time.

    Where both use it in the same form, and would contract that form in the same way,
    so are the two together. Else its rows are formed, and no others.
    """
    dtype = accumulation_dtype(*[left.inputs[i] for i in left.leaves])
    total = jnp.zeros((left.num_rows, right.num_rows), dtype)
    for mine, theirs in zip(left.leaves, right.leaves, strict=True):
        x, y = _of_parameter(left, mine), _of_parameter(right, theirs)
        if x is None or y is None:
            continue
        way = x.way if (x.form, x.way) == (y.form, y.way) else "rows"
        if way == "rows":
            found = _products.products([x.rows()], [y.rows()])
        else:
            pairs = [(of.point, [of.group]) for of in (x, y)]
            found = _with_factors(_contraction.PRODUCTS[way], *pairs)
        total = _added(total, found.astype(dtype), x.places, y.places)
    return total


class OneParameter(NamedTuple):
    """A parameter of a function, and those of its losses that depend on it.

    - `form`: equal for two functions that use it in one and the same form.
    - `way`: how its Gramian is computed.
    - `places`: which of all rows are those of these losses.
    """

    point: Point
    group: Group
    leaf: int
    form: Hashable
    way: Contraction
    places: Int[np.ndarray, " r"]

    def rows(self) -> Float[Array, "r ..."]:
        return gradients(self.point, self.group)[self.leaf]


def _of_parameter(point: Point, leaf: int) -> OneParameter | None:
    for group in point.plan.groups:
        if leaf not in group.leaves:
            continue
        some, losses = of_losses(point, [group])
        if not losses:
            return None
        shape = form(point.plan.uses[group.uses[0]]) if group.uniform else object()
        way = contraction(some, [group])
        return OneParameter(some, group, leaf, shape, way, rows_of(point, losses))
    return None


def squared_norms(point: Point) -> Float[Array, " a"]:
    """Squared norms of the gradients: the diagonal of their inner products."""
    dtype = accumulation_dtype(*[point.inputs[i] for i in point.leaves])
    total = jnp.zeros(point.num_rows, dtype)
    for groups in point.plan.groups_of(point.leaves):
        some, losses = of_losses(point, groups)
        if not losses:
            continue
        if groups[0].uniform:
            squared_norms_of = partial(
                _contraction.squared_norms, choice=groups[0].choice
            )
            found = replicated(_with_factors(squared_norms_of, (some, groups)))
        else:
            found = _products.squared_norms(list(gradients(some, groups[0]).values()))
        found = found.astype(dtype)
        if found.shape == total.shape:
            total += found
        else:
            total = total.at[rows_of(point, losses)].add(found)
    return total


def of_losses(point: Point, groups: Sequence[Group]) -> tuple[Point, tuple[int, ...]]:
    """The point of only those losses that depend on some groups, and which they are."""
    uses = {n for group in groups for n in group.uses}
    leaves = {leaf for group in groups for leaf in group.leaves}
    passes = point.passes
    losses = passes.losses_of(uses, leaves)

    def filled(array: Array, held: tuple[int, ...], axis: int) -> Array:
        """Zeros for those of the losses that do not depend on this use."""
        if held == losses:
            return array
        shape = list(array.shape)
        shape[axis] = len(losses)
        places = (slice(None),) * axis + (np.searchsorted(losses, held),)
        return automatically(
            lambda array: jnp.zeros(shape, array.dtype).at[places].set(array),
            array,
            spec=spec_of(jax.typeof(array)),
        )

    cotangents, direct = list(passes.cotangents), {}
    for n in uses:
        cotangents[n] = filled(cotangents[n], passes.reached[n], 0)
    for place, leaf in enumerate(passes.direct, len(cotangents)):
        if leaf in leaves:
            direct[leaf] = filled(passes.direct[leaf], passes.reached[place], 1)
    restricted = dataclasses.replace(passes, cotangents=cotangents, direct=direct)
    return point._replace(passes=restricted, num_losses=len(losses)), losses


def rows_of(point: Point, losses: Sequence[int]) -> Int[np.ndarray, " r"]:
    """The places of some of the losses of every example among all rows."""
    starts = np.arange(0, point.num_rows, point.num_losses)
    return (starts[:, None] + np.array(losses, int)[None]).ravel()


def contraction(point: Point, groups: Sequence[Group]) -> Contraction:
    """How the inner products of groups that share a left factor are computed."""
    if not groups[0].uniform:
        return "rows"
    sizes, one_hot = joint(point.plan, groups)
    m, k = point.num_examples, point.num_losses
    return _contraction.choose(sizes, m, k, one_hot, groups[0].choice)


def products(left: Point, right: Point, groups: Sequence[Group]) -> Float[Array, "a b"]:
    """Inner products of the gradients of groups at one point with those at another."""
    way = contraction(left, groups)
    if way != "rows":
        multiply = _contraction.PRODUCTS[way]
        if right is left:
            return _with_factors(lambda x: multiply(x, x), (left, groups))
        return _with_factors(multiply, (left, groups), (right, groups))
    if groups[0].uniform and right is left:
        return _of_parts(_products.gramian, _factors_of(left, groups))
    x = formed_rows(left, groups)
    y = x if right is left else formed_rows(right, groups)
    return _products.products(x, y)


def formed_rows(point: Point, groups: Sequence[Group]) -> list[Float[Array, "r ..."]]:
    """The gradients of groups that share a left factor, in any layout."""
    if groups[0].uniform:
        rows = [_blocks(point, groups)]
    else:
        (group,) = groups
        rows = list(gradients(point, group).values())
    if point.plan.function.axes is None:
        return rows
    return [flat_rows(as_examples(leaf)) for leaf in rows]


def gradients(point: Point, group: Group) -> dict[int, Float[Array, "mk ..."]]:
    """The gradients themselves, float32 or wider, per parameter."""

    def of_uses(same: Sequence[int]) -> Array:
        action = _use.action(point.plan.uses[same[0]])

        def formed(passes: Pass) -> Array:
            at = point._replace(passes=passes)
            factors = [_factors_of_use(at, n) for n in same]
            return _use.gradients(action, _contraction.joined(factors))

        spec = PartitionSpec(_where_examples(point), *_spec_of_node(point, same[0]))
        return automatically(formed, point.passes, spec=spec)

    def of_node(uses: Sequence[int]) -> Array:
        forms = _by(uses, lambda n: form(point.plan.uses[n]))
        return _sum(of_uses(same) for same in forms)

    direct = {
        leaf: with_examples_joined(x).astype(accumulation_dtype(x))
        for leaf, x in point.passes.direct.items()
    }
    of_nodes = [of_node(uses) for uses in _by_node(point, group)]
    return _to_leaves(point, group, of_nodes, direct, jax.vmap)


def combination(
    point: Point, groups: Sequence[Group], weights: Float[Array, "m k"]
) -> dict[int, Array]:
    """The weighted sum of the gradients, per parameter."""
    combined: dict[int, Array] = {}
    if not _reuses_rows(point, groups):
        for group in groups:
            combined |= _weighted_gradients(point, group, weights)
    elif groups[0].uniform:
        uses = [group.uses[0] for group in groups]
        sizes = [point.plan.uses[n].bilinear.sizes for n in uses]

        def of_rows(weights: Array, passes: Pass) -> list[Array]:
            factors = _factors_of(point._replace(passes=passes), groups)
            outputs = _of_parts(_products.combine_parts, factors, weights.ravel())
            split = jnp.split(outputs, np.cumsum([x.o for x in sizes])[:-1], axis=-1)
            actions = [_use.action(point.plan.uses[n]) for n in uses]
            return [_use.gradient(a, x) for a, x in zip(actions, split, strict=True)]

        specs = [_spec_of_node(point, n) for n in uses]
        found = automatically(of_rows, weights, point.passes, spec=specs)
        for group, gradient in zip(groups, found, strict=True):
            combined |= _to_leaves(point, group, [gradient], {}, lambda pull: pull)
    else:
        formed = gradients(point, groups[0])
        leaves = _products.combine(weights.ravel(), list(formed.values()))
        combined |= zip(formed, leaves, strict=True)
    return combined


def _weighted_gradients(
    point: Point, group: Group, weights: Float[Array, "m k"]
) -> dict[int, Array]:
    """One weight gradient per use."""

    def of_use(n: int) -> Array:
        use = point.plan.uses[n]
        recorded = [point.passes.recorded[i] for i in use.others]
        cotangent = point.passes.cotangents[n]
        cotangent = _weighted(weights, cotangent, len(use.levels))
        return _use.weighted_gradient(_use.action(use), recorded, cotangent)

    direct = {
        leaf: _weighted_sum(weights, x) for leaf, x in point.passes.direct.items()
    }
    of_nodes = [_sum(map(of_use, uses)) for uses in _by_node(point, group)]
    return _to_leaves(point, group, of_nodes, direct, lambda pull: pull)


def _factors(point: Point, uses: Sequence[int]) -> Factors:
    """Uses of the same form, as one."""
    return _contraction.joined([_factors_of_use(point, n) for n in uses])


def _factors_of_use(point: Point, n: int) -> Factors:
    use = point.plan.uses[n]
    recorded = [point.passes.recorded[i] for i in use.others]
    return _use.factors(_use.action(use), recorded, point.passes.cotangents[n])


def _with_factors(
    function: Callable[..., Array], *at: tuple[Point, Sequence[Group]]
) -> Array:
    """A function of the factors of groups that share a left one, at each point.

    On a mesh its result [m, ...] is spread by rows, as `spec_by_rows` says.
    """
    passes = [point.passes for point, _ in at]
    mesh, num_rows = mesh_of(passes), at[0][0].num_rows

    def of_passes(*passes: Pass) -> Array:
        current = zip(at, passes, strict=True)
        return function(
            *[
                _factors_of(x._replace(passes=own), groups)
                for (x, groups), own in current
            ]
        )

    spec = None if mesh is None else spec_by_rows(num_rows, mesh)
    return by_rows(automatically(of_passes, *passes, spec=spec))


def _where_examples(point: Point) -> Any:
    """The axes of the mesh that the examples are spread over, as types say it."""
    for x, axis in zip(point.inputs, point.plan.function.axes or (), strict=False):
        if axis is not None:
            aval = jax.typeof(x)
            entry = spec_of(aval)[axis]
            return entry_for(entry, point.num_examples, aval.sharding.mesh)
    return None


def _spec_of_node(point: Point, use: int) -> PartitionSpec:
    """How the gradient of one use is spread, as types say it."""
    action = _use.action(point.plan.uses[use])
    aval = action.jaxpr.eqns[0].invars[action.operand].aval
    return PartitionSpec(*[None] * len(action.lengths), *spec_of(aval))


def _factors_of(point: Point, groups: Sequence[Group]) -> Factors:
    """Groups that share a left factor, as one."""
    factors = [_factors(point, group.uses) for group in groups]
    return _contraction.side_by_side(factors)


def _blocks(point: Point, groups: Sequence[Group]) -> Float[Array, "mk b i o"]:
    """The rows of groups that share a left factor, the outputs of all together."""

    def formed(passes: Pass) -> Array:
        factors = _factors_of(point._replace(passes=passes), groups)
        blocks = _contraction.gradients(factors)
        return blocks.reshape(point.num_rows, *blocks.shape[2:])

    where = _where_examples(point)
    spec = PartitionSpec(where, None, None, None)
    return automatically(formed, point.passes, spec=spec)


@partial(jax.jit, static_argnums=0)
def _of_parts(
    function: Callable[..., Array], factors: Factors, *operands: Array
) -> Array:
    """`function(*operands, parts)` of rows in parts. The parts are formed one by one.

    The parts are arrays of their own because XLA would copy slices of a single one.
    """

    def of(number: int, factors: Factors) -> Array:
        blocks = [_contraction.gradients(part) for part in factors.split(number)]
        parts = [x.reshape(-1, *x.shape[2:]) for x in blocks]
        return function(*operands, parts)

    number = min(MAX_PARTS, factors.right.shape[0] // EXAMPLES_PER_PART)
    if mesh_of(factors) is not None:
        number = 1  # A part would be spread over few of the devices, hence moved.
    # With many positions, such as those of an image, nearly all of the time is spent on
    # the rows, and parts would only add to it.
    if number <= 1 or factors.sizes().t > 2 * factors.num_rows:
        return of(1, factors)
    return jax.lax.platform_dependent(
        factors, cpu=partial(of, number), default=partial(of, 1)
    )


def _reuses_rows(point: Point, groups: Sequence[Group]) -> bool:
    """Whether to combine the rows that the Gramian has formed.

    That reads each row once, where a weight gradient takes as many operations as the
    rows took. But the rows must then be kept until the weights are known, so they must
    not be much larger than what is kept anyway. Under one `jit` XLA finds that they are
    the same rows. If the Gramian comes from another computation, they are formed again.
    """
    uses = [n for group in groups for n in group.uses]
    if not uses or contraction(point, groups) != "rows":
        return False
    leaves = {leaf for group in groups for leaf in group.leaves}
    rows = point.num_rows * sum(point.inputs[leaf].size for leaf in leaves)
    operands = {n for use in uses for n in point.plan.uses[use].others}
    kept = sum(point.passes.recorded[n].size for n in operands)
    kept += sum(point.passes.cotangents[n].size for n in uses)
    return rows <= REUSED_PER_KEPT * kept


def _to_leaves(
    point: Point,
    group: Group,
    of_nodes: Sequence[Array],
    direct: dict[int, Array],
    mapped: Callable,
) -> dict[int, Array]:
    """Gradients of nodes, pulled back to the parameters, and those taken directly."""
    leaves = [leaf for leaf in group.leaves if leaf in point.leaves]
    gradients = {leaf: [direct[leaf]] for leaf in leaves if leaf in direct}
    if of_nodes:
        firsts = [point.plan.uses[uses[0]] for uses in _by_node(point, group)]
        nodes = [use.node for use in firsts]
        if all(isinstance(node, Input) for node in nodes):
            pulled = of_nodes
        else:
            cotangents = [
                x.astype(use.eqn.invars[use.operand].aval.dtype)
                for x, use in zip(of_nodes, firsts, strict=True)
            ]
            pull = pullback(nodes, point.inputs, leaves)
            pulled = mapped(pull)(cotangents)
        for leaf, gradient in zip(leaves, pulled, strict=True):
            gradients.setdefault(leaf, []).append(gradient)
    return {leaf: _sum(found) for leaf, found in gradients.items()}


def _by_node(point: Point, group: Group) -> list[list[int]]:
    return _by(group.uses, lambda n: point.plan.uses[n].node.key)


def _weighted(weights: Float[Array, "m k"], cotangent: Array, depth: int) -> Array:
    """The weighted sum over the losses of each example, in the cotangent's dtype."""
    weights = spread(weights, PartitionSpec(), mesh_of(cotangent))
    return automatically(
        lambda weights, cotangent: _weighted_on_devices(weights, cotangent, depth),
        weights,
        cotangent,
        spec=PartitionSpec(*spec_of(jax.typeof(cotangent))[1:]),
    )


def _weighted_on_devices(
    weights: Float[Array, "m k"], cotangent: Array, depth: int
) -> Array:
    m, k = weights.shape
    if m == 1:  # As a product: on a CPU, XLA is slow to add along the first axis.
        return _products.combine(weights[0], [cotangent])[0]
    ones = [1] * (cotangent.ndim - 2 - depth)
    weights = weights.T.reshape(k, *[1] * depth, m, *ones)
    return (weights * cotangent).sum(0).astype(cotangent.dtype)


def _weighted_sum(weights: Float[Array, "m k"], gradients: Array) -> Array:
    rows = with_examples_joined(gradients)
    return _products.combine(weights.ravel(), [rows])[0]


def _sum(arrays: Iterable[Array]) -> Array:
    first, *others = arrays
    for array in others:
        first = first + array
    return first


def _by(items: Iterable[int], key: Callable[[int], Hashable]) -> list[list[int]]:
    """Items of equal key, together."""
    groups: dict[Hashable, list[int]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())
