"""Does every rule give what brute force gives? One row per way to use a parameter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests.engine.structured.conftest import NUM_EXAMPLES as m
from tests.engine.structured.conftest import (
    brute_force,
    normal,
    quickly,
    relative,
    traced,
)


def dot(p, x):
    return jnp.sum(jnp.tanh(x @ p["w"]) ** 2)


def dot_left(p, x):
    return jnp.sum(jnp.tanh(p["w"] @ x) ** 2)


def dot_batched(p, x):
    return jnp.sum(jnp.tanh(jnp.einsum("btd,bdh->bth", x, p["w"])) ** 2)


def dot_batched_left(p, x):
    return jnp.sum(jnp.tanh(jnp.einsum("hdb,btd->htb", p["w"], x)) ** 2)


def dense_general(p, x):
    """Several axes contracted, in another order, several axes out."""
    return jnp.sum(jnp.tanh(jnp.einsum("tij,jhik->tkh", x, p["w"])) ** 2)


def both_operands(p, x):
    """Both operands of the second product are derived from the same parameter."""
    h = jnp.tanh(x @ p["w"])
    return jnp.sum(jnp.tanh(h @ p["w"].T) ** 2) + jnp.sum((h @ p["w"].T) @ p["w"])


def quadratic(p, x):
    return jnp.sum(jnp.tanh(x @ (p["w"] @ p["w"])) ** 2)


def bias_and_scale(p, x):
    y = jnp.tanh(x @ p["w"] + p["b"]) * p["scale"] / (2 + p["b"] ** 2)
    return jnp.sum(y) + p["temperature"] * jnp.sum(y**2)


def embedding(p, tokens):
    return jnp.sum(jnp.tanh(p["e"][tokens]) ** 2)


def embedding_clipped(p, tokens):
    return jnp.sum(jnp.tanh(p["e"].at[tokens].get(mode="clip")) ** 2)


def embedding_filled(p, tokens):
    y = p["e"].at[tokens].get(mode="fill", fill_value=0.5)
    return jnp.sum(jnp.tanh(y) ** 2)


def embedding_inner_axis(p, tokens):
    """The indexed axes are neither first nor adjacent."""
    y = p["e"][tokens, :, tokens[::-1]]
    return jnp.sum(jnp.tanh(y) ** 2)


def tied(p, tokens):
    h = p["e"][tokens]
    return jnp.sum(jax.nn.log_softmax(jnp.tanh(h) @ p["e"].T)[:, 0])


def one_row(p, token):
    return jnp.sum(jnp.tanh(p["e"][token]) ** 2)


def window(p, start):
    return jnp.sum(jnp.tanh(lax.dynamic_slice(p["e"], (start, 1), (2, 2))) ** 2)


def other_index_types(p, tokens):
    """Their type may not hold the length of the axis, nor fit into int32."""
    modes = (
        lax.GatherScatterMode.CLIP,
        lax.GatherScatterMode.FILL_OR_DROP,
        lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    )
    # Not by `jnp`'s indexing: it computes in the index's type before it looks up.
    numbers = lax.GatherDimensionNumbers((1,), (0,), (0,))
    last = p["e"].shape[0] - 1
    indices = (tokens, tokens, jnp.minimum(tokens, min(last, np.iinfo("int8").max)))
    rows = [
        lax.gather(p["e"], i[:, None], numbers, (1, 3), mode=mode, fill_value=0)
        for i, mode in zip(indices, modes, strict=True)
    ]
    start = (jnp.minimum(tokens[0], 100), jnp.zeros((), tokens.dtype))
    rows.append(lax.dynamic_slice(p["e"], start, (2, 2)))
    return sum(jnp.sum(jnp.tanh((n + 1) * row) ** 2) for n, row in enumerate(rows))


def in_many_places(p, x):
    """The same weight in unrolled steps, and once on the other side."""
    h = x[0]
    for step in range(3):
        h = jnp.tanh(h @ p["w"] + x[step])
    return jnp.sum((p["w"] @ h) ** 2)


def shared_operand(p, x):
    """Of several widths, once and in unrolled steps: read once for all of them."""
    y = jnp.tanh(x @ p["w"]) * (x @ p["v"]).sum()
    h = x[:, :3]
    for _ in range(2):
        h = jnp.tanh(h @ p["r"]) * jax.nn.sigmoid(h @ p["z"])
    return jnp.sum(y**2) + jnp.sum(h)


def shared_operand_read_otherwise(p, x):
    """The same operand, but not the same axis of it."""
    return jnp.sum(jnp.tanh(x @ p["w"]) ** 2) + jnp.sum(jnp.tanh(p["v"] @ x) ** 2)


def in_two_forms(p, x):
    """Laid out alike, but one product contracts an axis, the other one two."""
    one = jnp.einsum("tij,iko->tjko", x, p["w"])
    two = jnp.einsum("tij,ijo->to", x, p["w"])
    return jnp.sum(jnp.tanh(one) ** 2) + jnp.sum(jnp.tanh(two) ** 2)


def class_token(p, x):
    """Concatenation has no rule: the parameter itself is perturbed."""
    return jnp.sum(jnp.tanh(jnp.concatenate([p["c"][None], x]) @ p["w"]) ** 2)


def several_losses(p, x):
    """As many losses per example as there are rows in the result."""
    return jnp.sum(jnp.tanh(x @ p["w"] + p["b"]) ** 2, axis=1)


def several_losses_tied(p, tokens):
    return jnp.tanh(p["e"][tokens] @ p["e"].T)[:, 0]


tokens = np.array([[0, 3, 3, 6], [6, 1, 3, 2], [-1, 5, 0, 0]])
beyond = np.array([[0, 3, 9, 7], [6, -9, 3, 2], [-1, 5, 0, 0]])
w = {"w": normal(4, 5)}
square = {"w": normal(4, 4)}
e = {"e": normal(7, 3)}

CASES = {
    dot: (w, normal(m, 6, 4)),
    dot_left: ({"w": normal(5, 6)}, normal(m, 6, 4)),
    dot_batched: ({"w": normal(2, 4, 3)}, normal(m, 2, 5, 4)),
    dot_batched_left: ({"w": normal(3, 4, 2)}, normal(m, 2, 5, 4)),
    dense_general: ({"w": normal(3, 2, 4, 5)}, normal(m, 6, 4, 3)),
    both_operands: (w, normal(m, 6, 4)),
    quadratic: (square, normal(m, 4)),
    embedding: (e, tokens),
    embedding_clipped: (e, beyond),
    embedding_filled: (e, beyond),
    embedding_inner_axis: ({"e": normal(7, 2, 7)}, tokens),
    tied: (e, tokens),
    one_row: (e, tokens[:, 0]),
    window: (e, tokens[:, 0] % 6),
    in_many_places: (square, normal(m, 3, 4)),
    shared_operand: (
        {"w": normal(4, 5), "v": normal(4, 2), "r": normal(3, 3), "z": normal(3, 3)},
        normal(m, 6, 4),
    ),
    shared_operand_read_otherwise: (
        {"w": normal(4, 5), "v": normal(4, 4)},
        normal(m, 4, 4),
    ),
    in_two_forms: ({"w": normal(2, 3, 4)}, normal(m, 5, 2, 3)),
    several_losses: ({"w": normal(4, 5), "b": normal(5)}, normal(m, 6, 4), "b"),
    several_losses_tied: (e, tokens),
    class_token: ({"c": normal(4), "w": normal(4, 5)}, normal(m, 6, 4), "c"),
    bias_and_scale: (
        {
            "w": normal(4, 5),
            "b": normal(5),
            "scale": normal(5),
            "temperature": normal(),
        },
        normal(m, 6, 4),
        "b",
        "scale",
        "temperature",
    ),
}


@pytest.mark.parametrize("fun", CASES, ids=lambda fun: fun.__name__)
def test_rule(fun, agrees):
    params, x, *direct = CASES[fun]
    agrees(fun, params, x, direct=direct)


@pytest.mark.parametrize(
    ("dtype", "length"),
    [
        ("int8", 300),
        ("uint8", 300),
        ("int16", 40_000),
        ("uint16", 70_000),
        ("int32", 300),
        ("uint32", 300),
        ("int64", 300),
        ("uint64", 300),
    ],
)
def test_index_type(dtype, length):
    last = np.iinfo(dtype).max
    tokens = [[last, 3, 3], [1, 127, last], [last // 2, last, 7]]
    params = {"e": normal(length, 3)}
    # By int32, as some versions of JAX transpose narrow lookups wrongly. What is beyond
    # the table stays beyond it.
    wide = np.minimum(np.array(tokens, object), length + 5).astype("int32")

    def gramians(params):
        jacobian, _, _ = traced(other_index_types, params, np.array(tokens, dtype))
        (rows,) = brute_force(other_index_types, params, wide)[1]
        return jacobian.gramian(), jnp.tensordot(rows, rows, ((1, 2), (1, 2)))

    actual, wanted = quickly(gramians, params)
    assert relative(actual, wanted) < 1e-12


CONVOLUTIONS = {
    "1d": ((3, 4, 5), (9, 4), {}),
    "2d_strided": ((3, 2, 4, 5), (7, 6, 4), {"window_strides": (2, 1)}),
    "3d": ((2, 2, 1, 2, 3), (4, 3, 3, 2), {"padding": "VALID"}),
    "padded_unevenly": ((3, 2, 4, 5), (5, 4, 4), {"padding": ((2, 0), (0, 1))}),
    "cropped": ((3, 2, 4, 5), (7, 6, 4), {"padding": ((-1, 1), (0, -2))}),
    "dilated": ((3, 2, 4, 5), (9, 7, 4), {"rhs_dilation": (2, 3)}),
    "transposed": (
        (3, 2, 4, 5),
        (4, 5, 4),
        {"lhs_dilation": (2, 3), "padding": ((1, 2), (0, 1))},
    ),
    "transposed_and_cropped": (
        (2, 1, 4, 5),
        (4, 5, 4),
        {"lhs_dilation": (2, 3), "padding": ((-1, 2), (-2, -3))},
    ),
    "cropped_to_nothing": (
        (3, 2, 4, 5),
        (7, 6, 4),
        {"padding": ((-4, -1), (0, 0)), "window_strides": (2, 1)},
    ),
    "grouped": ((3, 2, 2, 6), (5, 4, 4), {"feature_group_count": 2}),
    "depthwise": ((3, 2, 1, 8), (5, 4, 4), {"feature_group_count": 4}),
    "everything": (
        (3, 2, 2, 6),
        (7, 6, 4),
        {
            "window_strides": (2, 1),
            "padding": ((1, 2), (0, 1)),
            "lhs_dilation": (2, 1),
            "rhs_dilation": (1, 2),
            "feature_group_count": 2,
        },
    ),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(name, agrees):
    kernel, image, options = CONVOLUTIONS[name]
    spatial = "DHW"[-(len(image) - 1) :]
    numbers = (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")
    options = {"window_strides": (1,) * len(spatial), "padding": "SAME", **options}

    def fun(p, x):
        y = lax.conv_general_dilated(
            x[None], p["w"], dimension_numbers=numbers, **options
        )
        return jnp.sum(jnp.tanh(y) ** 2)

    agrees(fun, {"w": normal(*kernel)}, normal(m, *image))


def test_convolution_with_channels_first(agrees):
    def fun(p, x):
        y = lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", feature_group_count=2)
        return jnp.sum(jnp.tanh(y) ** 2)

    agrees(fun, {"w": normal(6, 2, 3, 2)}, normal(m, 2, 4, 5, 3))


def test_convolution_of_a_parameter(agrees):
    """The parameter is the image, and the kernel comes from the example: no rule."""

    def fun(p, x):
        y = lax.conv_general_dilated(p["w"][None, None], x[None, None], (1,), "SAME")
        return jnp.sum(jnp.tanh(y) ** 2)

    agrees(fun, {"w": normal(8)}, normal(m, 3), direct=["w"])
