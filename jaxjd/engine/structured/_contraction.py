"""Inner products of the gradients of one parameter, from its uses.

All uses of a parameter come in one form, `gradient[b, i, o] = Σ_t left[b, t, i] ·
right[b, t, o]`, for each of m examples and k losses. There are two ways to the inner
products of all pairs of gradients:

- "pairs": `Σ_b Σ_ts ⟨left_t, left_s⟩ ⟨right_t, right_s⟩`, over all pairs of positions
  of all pairs of examples, without any gradient in memory;
- "rows": form the gradients of this one parameter, its rows of J, and multiply them.

`choose` says which, from the shapes alone, unless the user does.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxjd._numerics import accumulation_dtype
from jaxjd.engine._products import contract
from jaxjd.engine.structured._rules import Sizes

Contraction = Literal["pairs", "rows", "kernel"]
Choice = Literal["auto", Contraction]

# How many multiplications and additions a core does while it moves one byte to or from
# memory. It is 5 to 20 for the processors in use, and no choice that matters depends on
# it.
FLOPS_PER_BYTE = 10


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a contraction costs: floating-point operations, and bytes moved."""

    flops: int
    bytes: int

    @property
    def time(self) -> int:
        return self.flops + FLOPS_PER_BYTE * self.bytes


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["left", "right"],
    meta_fields=["num_inputs"],
)
@dataclasses.dataclass(frozen=True)
class Factors:
    """All uses of a parameter that have the same form, for m examples and k losses.

    `left` is [m, b, t, i]. If its rows are one-hot, it is the integers [m, b, t], and
    `num_inputs` is i. `right` is [m, k, b, t, o].
    """

    left: Float[Array, "m b t i"] | Int[Array, "m b t"]
    right: Float[Array, "m k b t o"]
    num_inputs: int

    @property
    def one_hot(self) -> bool:
        return self.left.ndim == 3

    @property
    def num_rows(self) -> int:
        return self.right.shape[0] * self.right.shape[1]

    def sizes(self) -> Sizes:
        _, _, b, t, o = self.right.shape
        return Sizes(b, t, self.num_inputs, o)

    def split(self, parts: int) -> list["Factors"]:
        """Those of consecutive examples, about equally many in each part."""
        m = self.right.shape[0]
        bounds = [m * n // parts for n in range(parts + 1)]
        return [
            dataclasses.replace(self, left=self.left[a:z], right=self.right[a:z])
            for a, z in itertools.pairwise(bounds)
        ]


def joined(uses: Sequence[Factors]) -> Factors:
    """Several uses as one: their gradients add up, as over more positions."""
    if len(uses) == 1:
        return uses[0]
    return Factors(
        jnp.concatenate([use.left for use in uses], axis=2),
        jnp.concatenate([use.right for use in uses], axis=3),
        uses[0].num_inputs,
    )


def side_by_side(parameters: Sequence[Factors]) -> Factors:
    """Parameters that share their left factor, as one with all of their outputs."""
    if len(parameters) == 1:
        return parameters[0]
    right = jnp.concatenate([of_one.right for of_one in parameters], axis=4)
    return Factors(parameters[0].left, right, parameters[0].num_inputs)


def costs(
    sizes: Sizes, num_examples: int, num_losses: int, one_hot: bool, itemsize: int = 4
) -> dict[Contraction, Cost]:
    """What each way costs, for m examples of k losses each."""
    b, t, i, o = sizes.b, sizes.t, sizes.i, sizes.o
    places, rows = num_examples * t, num_examples * num_losses
    pairs = (places**2, (rows * t) ** 2)
    # The left factor is the same for all losses of an example, hence m T positions of
    # it, and m k T of the right one. All pairs of them are formed, and multiplied.
    if one_hot:  # Comparing indices is not arithmetic, and neither is scattering.
        by_pairs = 2 * b * pairs[1] * (1 + o)
        form, read = rows * b * t * o, places
    else:
        by_pairs = 2 * b * (pairs[0] * i + pairs[1] * (1 + o))
        form, read = 2 * rows * b * t * i * o, places * b * i
    gradients = rows * b * i * o
    read += rows * b * t * o
    # The kernel is multiplied with the right factors of every example and loss.
    kernel = 0 if one_hot else 2 * b * places**2 * i
    kernel += 2 * b * places * rows * t * o + 2 * b * rows**2 * t * o
    blurred = b * num_examples * rows * t * o
    return {
        "pairs": Cost(by_pairs, itemsize * (read + b * sum(pairs))),
        "kernel": Cost(kernel, itemsize * (read + b * pairs[0] + 2 * blurred)),
        "rows": Cost(form + 2 * rows * gradients, itemsize * (read + 3 * gradients)),
    }


def choose(
    sizes: Sizes,
    num_examples: int,
    num_losses: int,
    one_hot: bool,
    choice: Choice = "auto",
) -> Contraction:
    """The way that the user wants, or the cheaper one, by operations and bytes."""
    if choice != "auto":
        return choice
    of = costs(sizes, num_examples, num_losses, one_hot)
    return min(of, key=lambda way: of[way].time)


@jax.jit
def gradients(factors: Factors) -> Float[Array, "m k b i o"]:
    """The gradients themselves, float32 or wider."""
    left, right = factors.left, factors.right
    if factors.one_hot:
        scatter = partial(jax.ops.segment_sum, num_segments=factors.num_inputs)
        scatter = jax.vmap(scatter, (0, 0))  # Blocks.
        scatter = jax.vmap(scatter, (0, None))  # Losses.
        # A one-hot row without a one contributes nothing: it goes to a segment beyond
        # the last. A negative one would count from the end.
        places = jnp.where(left < 0, factors.num_inputs, left)
        return jax.vmap(scatter)(right.astype(accumulation_dtype(right)), places)
    if right.shape[1] == 1:
        # With examples and blocks in front, XLA multiplies the factors as they are.
        batch = (0, 1)
        return contract(left, right[:, 0], ((2,), (2,)), (batch, batch))[:, None]
    # An einsum would have its outputs in another order, and move them.
    found = contract(left, right, ((2,), (3,)), ((0, 1), (0, 2)))
    return jnp.moveaxis(found, 3, 1)


@jax.jit
def products_by_pairs(x: Factors, y: Factors) -> Float[Array, "mk nl"]:
    """Inner products of the gradients of `x` with those of `y`."""
    m, k, b, t, _ = x.right.shape
    n, h, _, s, _ = y.right.shape
    right = _inner(x.right, y.right).reshape(b, m, k, t, n, h, s)
    left = kernel(x, y).reshape(b, m, 1, t, n, 1, s).astype(right.dtype)
    return (left * right).sum((0, 3, 6)).reshape(m * k, n * h)


@jax.jit
def products_by_kernel(x: Factors, y: Factors) -> Float[Array, "mk nl"]:
    r"""The same, as $\sum_b \operatorname{tr}(\delta_i^\top K \delta_j)$.

    The losses of an example share its left factor, so for many losses of few examples
    the kernel K of the left factors is small, and one product with it for every right
    factor of `y` leaves nothing to do but inner products.
    """
    m, k, b, t, _ = x.right.shape
    n, h, _, s, o = y.right.shape
    K = kernel(x, y).reshape(b, m * t, n, s).transpose(2, 0, 1, 3)  # [n, b, m t, s]
    right = y.right.transpose(0, 2, 3, 1, 4).reshape(n, b, s, h * o)
    dtype = accumulation_dtype(x.right, y.right)
    weighted = contract(K.astype(dtype), right, ((3,), (2,)), ((0, 1), (0, 1)))
    weighted = weighted.reshape(n, b, m, t, h, o).transpose(2, 0, 4, 1, 3, 5)
    weighted = weighted.reshape(m, n * h, b * t * o)
    found = contract(
        x.right.reshape(m, k, b * t * o).astype(dtype),
        weighted,
        ((2,), (2,)),
        ((0,), (0,)),
    )
    return found.reshape(m * k, n * h)


# The ways that form no gradients.
PRODUCTS = {"pairs": products_by_pairs, "kernel": products_by_kernel}


@partial(jax.jit, static_argnums=1)
def squared_norms(x: Factors, choice: Choice = "auto") -> Float[Array, " mk"]:
    r"""$\|\sum_t a_t \delta_t^\top\|^2 = \sum_{ts} ⟨a_t, a_s⟩ ⟨\delta_t, \delta_s⟩$.

    By pairs of the positions of one example, or from its gradients, whichever takes
    fewer operations; from the gradients if `choice` is "rows".
    """
    m, k, _, t, o = x.right.shape
    i = x.num_inputs
    left_pairs = 0 if x.one_hot else t * t * i
    pairs, rows = left_pairs + k * t * t * o, k * (t * i * o + i * o)
    if choice == "rows" or (choice == "auto" and rows < pairs):
        formed = gradients(x).reshape(m * k, -1)
        return jnp.square(formed).sum(1)
    if x.one_hot:
        same = x.left[..., :, None] == x.left[..., None, :]
        left = same & (x.left >= 0)[..., None]
    else:
        left = _pairs_within(x.left)
    right = _pairs_within(x.right)
    return (left[:, None].astype(right.dtype) * right).sum((2, 3, 4)).ravel()


def _pairs_within(x: Float[Array, "... t n"]) -> Float[Array, "... t t"]:
    """Inner products of all positions, of the same example, loss and block."""
    if x.shape[-2] == 1:
        return jnp.square(x.astype(accumulation_dtype(x))).sum(-1)[..., None]
    batch, n = tuple(range(x.ndim - 2)), x.ndim - 1
    return contract(x, x, ((n,), (n,)), (batch, batch))


def kernel(x: Factors, y: Factors) -> Array:
    """Inner products of the left factors at all pairs of positions, [b, m, t, n, s]."""
    m, _, b, t, _ = x.right.shape
    n, _, _, s, _ = y.right.shape
    if x.one_hot:
        others = y.left.transpose(1, 0, 2)[None, :, None]
        same = x.left[:, :, :, None, None] == others
        same = same & (x.left >= 0)[:, :, :, None, None]
        return same.transpose(1, 0, 2, 3, 4)
    return _inner(x.left, y.left).reshape(b, m, t, n, s)


def _inner(x: Float[Array, "... b t n"], y: Float[Array, "... b s n"]) -> Array:
    """Inner products of all positions, [b, positions of x, positions of y]."""

    def by_block(z: Array) -> Array:
        return jnp.moveaxis(z, -3, 0).reshape(z.shape[-3], -1, z.shape[-1])

    return contract(by_block(x), by_block(y), ((2,), (2,)), ((0,), (0,)))
