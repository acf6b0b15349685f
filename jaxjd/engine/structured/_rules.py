"""The primitives that are linear in a parameter, and what its gradient then is.

In `y = op(p, a)` let p be a parameter, a a value of one example, and δ the cotangent of
y. Each rule brings the gradient of p, which is `opᵀ(a, δ)`, into one and the same form,

    gradient[b, i, o] = Σ_t left(a)[b, t, i] · right(δ)[b, t, o]

where t counts positions (of a sequence, an image), i what goes in, o what comes out,
and b independent blocks (heads, groups of channels, experts). For a dense layer,
`y[t, o] = Σ_i a[t, i] p[i, o]`, left and right are the identity and b is 1.

`left` and `right` only move entries, or repeat those of a. So a rule is exact, and its
form is all that a contraction needs to know. A new primitive is one function here, and
one line in `RULES`.
"""

import dataclasses
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxjd.engine.structured import _jaxpr


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of the axes of the common form."""

    b: int
    t: int
    i: int
    o: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """How `gradient[b, i, o]` becomes an array like the parameter.

    Split b, i and o into the axes that they consist of, permute these, and join those
    that are one axis of the parameter.
    """

    split: tuple[int, ...]
    permutation: tuple[int, ...]
    shape: tuple[int, ...]

    def __call__(self, gradient: Float[Array, "b i o"]) -> Float[Array, "..."]:
        split = gradient.reshape(self.split)
        return split.transpose(self.permutation).reshape(self.shape)


@dataclasses.dataclass(frozen=True, eq=False)
class Bilinear:
    """One use of a parameter, in the common form.

    `left` takes the operands of the equation beside the parameter. With `one_hot`, row
    t of the left factor is zero but for a single one: a lookup is a product with such
    rows. Then `left` returns integers [b, t], the positions of the ones; those outside
    of 0..i-1 stand for rows without a one.

    `reading` is equal for uses whose `left` does the same to the same operands: for the
    gates of a recurrent cell, and queries, keys and values. None: not to be compared.
    """

    sizes: Sizes
    layout: Layout
    left: Callable[..., Float[Array, "b t i"] | Int[Array, "b t"]]
    right: Callable[[Array], Float[Array, "b t o"]]
    one_hot: bool = False
    reading: Hashable | None = None


def rule(eqn: Any, parameter: int) -> Bilinear | None:
    """The rule for an equation whose operand number `parameter` is the parameter.

    None if there is none, or none for what it is used for here.
    """
    find = RULES.get(eqn.primitive.name)
    avals = (eqn.invars[parameter].aval, *(v.aval for v in eqn.outvars))
    if find is None or not all(_jaxpr.is_real(aval) for aval in avals):
        return None
    return find(eqn, parameter)


def dot_general(eqn: Any, parameter: int) -> Bilinear | None:
    """`y[b, t, o] = Σ_i a[b, t, i] p[b, i, o]`, each letter any number of axes.

    b are the batch axes, i the contracted ones, t those that only a has, and o those
    that only p has. The gradient is `Σ_t a[b, t, i] δ[b, t, o]`.
    """
    (contracting, batch) = eqn.params["dimension_numbers"]
    other = 1 - parameter
    p, a = eqn.invars[parameter].aval, eqn.invars[other].aval
    if not jnp.issubdtype(a.dtype, jnp.floating):
        return None
    p_axes = batch[parameter], contracting[parameter]
    a_axes = batch[other], contracting[other]
    p_free, a_free = _rest(p.ndim, *p_axes), _rest(a.ndim, *a_axes)
    sizes = Sizes(
        _size(p, p_axes[0]), _size(a, a_free), _size(p, p_axes[1]), _size(p, p_free)
    )

    def left(*operands):
        a = operands[0].transpose(*a_axes[0], *a_free, *a_axes[1])
        return a.reshape(sizes.b, sizes.t, sizes.i)

    def right(cotangent):
        # The result has the free axes of the left-hand operand first.
        if parameter == 1:
            return cotangent.reshape(sizes.b, sizes.t, sizes.o)
        return cotangent.reshape(sizes.b, sizes.o, sizes.t).swapaxes(1, 2)

    layout = _layout(p, (*p_axes[0], *p_axes[1], *p_free))
    return Bilinear(sizes, layout, left, right, reading=a_axes)


def conv_general_dilated(eqn: Any, parameter: int) -> Bilinear | None:
    """A dense layer on windows: t are the positions of y, i the entries of a window.

    `y[t, o] = Σ_i window(a)[t, i] p[i, o]`, where i is a place in the window and an
    input channel. The groups of channels are the blocks b.
    """
    params = eqn.params
    if parameter != 1 or params["batch_group_count"] != 1:
        return None
    kernel, y = eqn.invars[1].aval, eqn.outvars[0].aval
    groups = params["feature_group_count"]
    a_spec, kernel_spec, y_spec = params["dimension_numbers"]
    window = tuple(kernel.shape[axis] for axis in kernel_spec[2:])
    out, channels = kernel.shape[kernel_spec[0]], kernel.shape[kernel_spec[1]]
    num_out = tuple(y.shape[axis] for axis in y_spec[2:])
    sizes = Sizes(
        groups,
        y.shape[y_spec[0]] * math.prod(num_out),
        math.prod(window) * channels,
        out // groups,
    )

    def left(a):
        """For each position of the result the window of `a` that it sees."""
        if not sizes.t:  # The window does not fit even once. It cannot be sliced.
            return jnp.zeros((groups, 0, sizes.i), a.dtype)
        # Channels last. Then holes between the entries (`lhs_dilation`), and a margin
        # around them, which is negative where `padding` crops.
        a = a.transpose(a_spec[0], *a_spec[2:], a_spec[1])
        holes = [dilation - 1 for dilation in params["lhs_dilation"]]
        padding = [
            (low, high, hole)
            for (low, high), hole in zip(params["padding"], holes, strict=True)
        ]
        zero = jnp.zeros((), a.dtype)
        a = jax.lax.pad(a, zero, [(0, 0, 0), *padding, (0, 0, 0)])
        strides = params["window_strides"]

        def shifted(offset):
            """What all windows see at one place in them: a strided slice."""
            start = [n * d for n, d in zip(offset, params["rhs_dilation"], strict=True)]
            limit = [
                first + (n - 1) * stride + 1
                for first, n, stride in zip(start, num_out, strides, strict=True)
            ]
            window = jax.lax.slice(
                a,
                (0, *start, 0),
                (a.shape[0], *limit, a.shape[-1]),
                (1, *strides, 1),
            )
            return window.reshape(sizes.t, groups, channels)

        # [t, groups, places in the window, channels of a group]
        patches = jnp.stack([shifted(offset) for offset in np.ndindex(*window)], 2)
        return patches.reshape(sizes.t, groups, sizes.i).swapaxes(0, 1)

    def right(cotangent):
        # The output channels of a group lie side by side.
        cotangent = cotangent.transpose(y_spec[0], *y_spec[2:], y_spec[1])
        return cotangent.reshape(sizes.t, groups, sizes.o).swapaxes(0, 1)

    # i is the places in the window and the channels of a group, in this order, and the
    # kernel's axis of output channels consists of b and o.
    split = (groups, *window, channels, out // groups)
    order = {kernel_spec[0]: (0, len(split) - 1), kernel_spec[1]: (len(split) - 2,)}
    order |= {axis: (1 + n,) for n, axis in enumerate(kernel_spec[2:])}
    permutation = tuple(n for axis in range(kernel.ndim) for n in order[axis])
    layout = Layout(split, permutation, kernel.shape)
    return Bilinear(sizes, layout, left, right)


def gather(eqn: Any, parameter: int) -> Bilinear | None:
    """Indexing that takes whole slices, such as the lookup in an embedding.

    `y[t, o] = p[index[t], o]`: o are the axes that are taken whole, i the indexed ones
    in row-major order, and t the places that are looked up.
    """
    numbers, slice_sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    p = eqn.invars[0].aval
    indexed = tuple(numbers.start_index_map)
    kept = _rest(p.ndim, indexed)
    if (
        parameter != 0
        or numbers.operand_batching_dims
        or set(numbers.collapsed_slice_dims) != set(indexed)
        or any(slice_sizes[axis] != p.shape[axis] for axis in kept)
    ):
        return None
    y = eqn.outvars[0].aval
    places = _rest(y.ndim, numbers.offset_dims)
    sizes = Sizes(1, _size(y, places), _size(p, indexed), _size(p, kept))
    limits = [p.shape[axis] for axis in indexed]
    clips = eqn.params["mode"] == jax.lax.GatherScatterMode.CLIP

    def left(indices):
        places = [_int32(indices[..., n], limit) for n, limit in enumerate(limits)]
        if clips:
            places = [
                jnp.clip(place, 0, limit - 1)
                for place, limit in zip(places, limits, strict=True)
            ]
        return _ravel(places, limits).reshape(1, sizes.t)

    def right(cotangent):
        cotangent = cotangent.transpose(*places, *numbers.offset_dims)
        return cotangent.reshape(1, sizes.t, sizes.o)

    layout = _layout(p, (*indexed, *kept))
    return Bilinear(sizes, layout, left, right, one_hot=True)


def dynamic_slice(eqn: Any, parameter: int) -> Bilinear | None:
    """A lookup of all places in the window, along the axes that it does not span."""
    if parameter != 0:
        return None
    p, window = eqn.invars[0].aval, eqn.params["slice_sizes"]
    indexed = tuple(axis for axis in range(p.ndim) if window[axis] < p.shape[axis])
    kept = _rest(p.ndim, indexed)
    limits = [p.shape[axis] for axis in indexed]
    lengths = [window[axis] for axis in indexed]
    sizes = Sizes(1, math.prod(lengths), math.prod(limits), _size(p, kept))

    def left(*starts):
        # A window that would not fit is moved until it does, by definition.
        places = [
            jnp.clip(_int32(starts[axis], p.shape[axis]), 0, p.shape[axis] - n)
            + jnp.arange(n, dtype=jnp.int32)
            for axis, n in zip(indexed, lengths, strict=True)
        ]
        flat = _ravel(jnp.meshgrid(*places, indexing="ij"), limits)
        return flat.reshape(1, sizes.t)

    def right(cotangent):
        return cotangent.transpose(*indexed, *kept).reshape(1, sizes.t, sizes.o)

    layout = _layout(p, (*indexed, *kept))
    return Bilinear(sizes, layout, left, right, one_hot=True)


RULES: dict[str, Callable[[Any, int], Bilinear | None]] = {
    "dot_general": dot_general,
    "conv_general_dilated": conv_general_dilated,
    "gather": gather,
    "dynamic_slice": dynamic_slice,
}


def _rest(ndim: int, *taken: Sequence[int]) -> tuple[int, ...]:
    """The other axes, in ascending order."""
    gone = {axis for axes in taken for axis in axes}
    return tuple(axis for axis in range(ndim) if axis not in gone)


def _size(aval: Any, axes: Sequence[int]) -> int:
    """The number of entries along these axes together."""
    return math.prod(aval.shape[axis] for axis in axes)


def _layout(p: Any, axes: Sequence[int]) -> Layout:
    """For a gradient with the axes of the parameter in the order `axes`."""
    split = tuple(p.shape[axis] for axis in axes)
    return Layout(split, tuple(int(axis) for axis in np.argsort(axes)), p.shape)


def _ravel(places: Sequence[Array], limits: Sequence[int]) -> Int[Array, "..."]:
    """Row-major positions in int32; -1 for those that lie outside of an axis."""
    flat, inside = jnp.zeros((), jnp.int32), jnp.ones((), bool)
    for place, limit in zip(places, limits, strict=True):
        inside = inside & (place >= 0) & (place < limit)
        flat = flat * limit + place
    return jnp.where(inside, flat, -1)


def _int32(index: Array, limit: int) -> Int[Array, "..."]:
    """An index along an axis of length `limit`, in int32.

    Its own type may be too narrow for the arithmetic (an int8 cannot hold the length of
    an axis of 300) or too wide for int32. An index outside of the axis stays outside.
    """
    info = jnp.iinfo(index.dtype)
    if info.bits >= 32:
        index = jnp.clip(index, max(info.min, -1), limit)
    return index.astype(jnp.int32)
