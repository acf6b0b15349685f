"""Are parameters followed through everything that a function may contain?"""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from tests.engine.structured.conftest import NUM_EXAMPLES as m
from tests.engine.structured.conftest import normal

x1, x2 = normal(m, 4), normal(m, 5, 4)
square = {"w": normal(4, 4)}


def layer(p, h):
    return jnp.tanh(h @ p["w"])


def jitted(p, x):
    return jnp.sum(jax.jit(layer)(p, jax.jit(layer)(p, x)) ** 2)


def rematerialised(p, x):
    step = jax.checkpoint(layer, policy=jax.checkpoint_policies.dots_saveable)
    return jnp.sum(step(p, jax.checkpoint(layer)(p, step(p, x))) ** 2)


@jax.custom_jvp
def twice(x):
    return 2 * x


@twice.defjvp
def _(primals, tangents):
    return twice(*primals), 3 * tangents[0]  # Not its derivative: it must be used.


@jax.custom_vjp
def product(x, w):
    return x @ w


product.defvjp(
    lambda x, w: (x @ w, (x, w)),
    lambda saved, y: (5 * y @ saved[1].T, 7 * jnp.outer(saved[0], y)),
)


def custom_jvp_of_prelude(p, x):
    return jnp.sum(layer({"w": twice(p["w"])}, twice(x)) ** 2)


def custom_jvp_around(p, x):
    return jnp.sum(jnp.tanh(twice(p["b"] + x)))


def custom_vjp_around(p, x):
    return jnp.sum(jnp.tanh(product(x, p["w"])) ** 2)


def cond(p, x):
    return jnp.sum(
        lax.cond(x[0] > 0, layer, lambda p, h: h @ p["w"].T + p["b"], p, x) ** 2
    )


def switch_on_shared_value(p, x):
    index = lax.switch(1, [lambda: 0, lambda: 2])
    branches = [layer, lambda p, h: h, lambda p, h: h @ p["w"]]
    return jnp.sum(lax.switch(index, branches, p, x) ** 2)


def constant_in_scan(p, x):
    def step(h, x):
        h = jnp.tanh(h @ p["w"] + x @ p["u"].T + p["b"])
        return h, h

    h, hs = lax.scan(step, p["h"], x, reverse=True)
    return jnp.sum(h**2) + jnp.sum(hs[0])


def stacked_in_scan(p, x):
    def step(h, p):
        return jnp.tanh(h @ p["w"] + p["b"]), None

    return jnp.sum(lax.scan(step, x, p, unroll=2)[0] ** 2)


def prelude_in_scan(p, x):
    """Parameters are cast, transposed, scaled and masked inside of the body."""
    mask = jnp.arange(3.0)

    def step(h, sliced):
        w, scale = sliced
        h = jnp.tanh(h @ (w.T * scale) + h @ jax.nn.softplus(p["v"]))
        return h @ lax.transpose(p["v"], (1, 0)), None

    return jnp.sum(lax.scan(step, x, (p["w"], mask))[0] ** 2)


def carried_in_scan(p, x):
    """A parameter that is carried unchanged stays one; one that changes cannot."""

    def step(carry, _):
        h, w, v = carry
        return (jnp.tanh(h @ w + h @ v), w, 0.5 * v), None

    return jnp.sum(lax.scan(step, (x, p["w"], p["v"]), None, length=3)[0][0] ** 2)


def unrolled_from_zeros(p, x):
    """The first product is of a parameter and a constant, and only then meets `x`."""
    h = jnp.zeros(4)
    for step in range(2):
        h = jnp.tanh((h @ p["w"] + p["b"]) * 2 + x[step])
    return jnp.sum(h**2)


def constants_of_parameters(p, x):
    """Chosen by constants, met twice, inside of a loop and of a branch."""
    row = jnp.sin(p["w"][jnp.array([2, 0])]) + 1

    def step(h, x):
        return jnp.tanh(h + x * row[0] + lax.cond(x[0] > 0, lambda: row[1], lambda: x))

    return jnp.sum(lax.fori_loop(0, 2, lambda i, h: step(h, x[i]), x[0] * row[1]))


def counted_in_scan(p, x):
    """The layer is chosen by a counter."""

    def step(i, h):
        return jnp.tanh(h @ p["w"][i])

    return jnp.sum(lax.fori_loop(0, 3, step, x) ** 2)


def returned_from_scan(p, x):
    def step(h, w):
        return h @ w, w + p["v"]

    h, ws = lax.scan(step, x, p["w"])
    return jnp.sum(jnp.tanh(h @ ws[0] @ ws[2]))


def nested_scans(p, x):
    def outer(h, q):
        def inner(h, w):
            return jnp.tanh(h @ w.T @ q["c"] + h @ p["v"]), None

        h, _ = lax.scan(inner, h, q["w"])
        return jnp.tanh(h @ q["c"]), h

    h, hs = lax.scan(outer, x, {"w": p["w"], "c": p["c"]})
    return jnp.sum(h**2) + jnp.sum(hs)


def everything_nested(p, x):
    @jax.checkpoint
    def step(h, w):
        return lax.cond(
            h.sum() > 0, lambda: jax.jit(layer)({"w": w}, h), lambda: h @ p["v"]
        ), None

    return jnp.sum(jax.jit(lambda x: lax.scan(step, x, p["w"])[0])(x) ** 2)


def weight_norm(p, x):
    w = p["g"] * p["w"] / jnp.linalg.norm(p["w"], axis=0)
    return jnp.sum(jnp.tanh(x @ w) ** 2)


def low_rank(p, x):
    return jnp.sum(jnp.tanh(x @ (jnp.eye(4) + p["a"] @ p["b"])) ** 2)


def prelude_of_moves(p, x):
    """Casts, reshapes, transpositions, reversals: nothing changes in the products."""
    w = -jnp.flip(p["w"].reshape(2, 2, 4).transpose(2, 0, 1), 0).reshape(4, 4)
    return jnp.sum(jnp.tanh(x @ w) ** 2)


def prelude_of_slices(p, x):
    q, k = jnp.split(p["w"], 2, axis=1)
    return jnp.sum((x @ q) * (x @ k)) + jnp.sum(
        jnp.tanh(x @ p["w"][1:3, :2].T.repeat(2, 1).T)
    )


def prelude_of_concatenation(p, x):
    w = jnp.concatenate([p["a"], p["b"].T], axis=1)
    return jnp.sum(jnp.tanh(x @ w) ** 2)


def stopped(p, x):
    w = p["w"] + lax.stop_gradient(p["w"])
    return jnp.sum(jnp.tanh(x @ w @ lax.stop_gradient(p["w"])) ** 2)


def compared(p, x):
    """Decisions have no gradient."""
    return jnp.sum(jnp.tanh(x @ p["w"]) * (p["w"][0] > x[0]) * jnp.argmax(p["w"]))


def regularised(p, x):
    """A loss that adds what depends on parameters alone."""
    return jnp.sum(jnp.tanh(x @ p["w"]) ** 2) + 0.1 * jnp.sum(p["w"] ** 2)


def of_parameters_alone(p, x):
    return jnp.stack([jnp.sum(jnp.sin(p["w"])), jnp.sum(x @ p["v"])])


def unused(p, x):
    return jnp.sum(jnp.tanh(x @ p["w"]))


def complex_intermediates(p, x):
    spectrum = jnp.fft.fft(x) * p["b"] @ (p["w"] + 1j * p["w"].T)
    return jnp.sum(jnp.abs(spectrum) ** 2)


def spectral_weights(p, x):
    return jnp.sum(jnp.tanh(jnp.fft.rfft(p["w"], axis=0).real @ x) ** 2)


def chosen_expert(p, x):
    """A mixture of experts: the weights of one are gathered."""
    expert = jnp.argmax(x @ p["gate"])
    return (
        jnp.sum(jnp.tanh(x @ p["w"][expert]) ** 2)
        * jax.nn.softmax(x @ p["gate"])[expert]
    )


def dense_experts(p, x):
    gates = jax.nn.softmax(x @ p["gate"])
    return jnp.sum(
        jnp.einsum("e,ed->d", gates, jnp.tanh(jnp.einsum("d,edh->eh", x, p["w"])))
    )


stack = {"w": normal(3, 4, 4)}
v = {"v": normal(4, 4)}
b = {"b": normal(4)}
gate = {"gate": normal(4, 3)}
low = {"a": normal(4, 2), "b": normal(2, 4)}

CASES = {
    jitted: (square, x2),
    rematerialised: (square, x2),
    custom_jvp_of_prelude: (square, x1),
    custom_jvp_around: (b, x1, "b"),
    custom_vjp_around: (square, x1, "w"),
    cond: (square | b, x1, "b"),
    switch_on_shared_value: (square, x1),
    constant_in_scan: (
        square | {"u": normal(4, 4)} | b | {"h": normal(4)},
        x2,
        "b",
        "h",
    ),
    stacked_in_scan: (stack | {"b": normal(3, 4)}, x2, "b"),
    prelude_in_scan: (stack | v, x2),
    carried_in_scan: (square | v, x2, "v"),
    unrolled_from_zeros: (square | b, x2, "b"),
    constants_of_parameters: (square, x2),
    counted_in_scan: (stack, x1),
    returned_from_scan: (stack | v, x1, "v", "w"),
    nested_scans: ({"w": normal(2, 3, 4, 4), "c": normal(2, 4, 4)} | v, x2),
    everything_nested: (stack | v, x1),
    weight_norm: (square | {"g": normal(4)}, x2),
    low_rank: (low, x2),
    prelude_of_moves: (square, x2),
    prelude_of_slices: (square, x1),
    prelude_of_concatenation: (low | {"b": normal(2, 4)}, x2),
    stopped: (square, x1),
    compared: (square, x1),
    regularised: (square, x1, "w"),
    of_parameters_alone: (square | {"v": normal(4, 2)}, x1, "w"),
    unused: (square | v, x1),
    complex_intermediates: (square | b, x1, "b", "w"),
    spectral_weights: (square, x1),
    chosen_expert: (stack | gate, x1),
    dense_experts: (stack | gate, x1),
}


@pytest.mark.parametrize("fun", CASES, ids=lambda fun: fun.__name__)
def test_function(fun, agrees):
    params, x, *direct = CASES[fun]
    agrees(fun, params, x, direct=direct)


def test_examples_on_other_axes(agrees):
    def fun(p, x, shared, pair):
        return jnp.sum(jnp.tanh(x @ p["w"] + pair["a"]) * shared)

    agrees(
        fun,
        square,
        normal(5, 4, m),
        normal(4),
        {"a": normal(4, m), "b": normal(2)},
        in_axes=(None, 2, None, {"a": 1, "b": None}),
    )


def test_random_numbers_of_an_example(agrees):
    def fun(p, x, key):
        kept = jax.random.bernoulli(key, 0.5, (4,))
        return jnp.sum(jnp.tanh(jnp.where(kept, x, 0) @ p["w"]) ** 2)

    agrees(fun, square, x1, jax.random.split(jax.random.key(0), m))


def test_closed_over_arrays(agrees):
    scale, frozen = normal(4), normal(4, 4, seed=2)

    @functools.partial(jax.jit, inline=False)
    def inner(p, x):
        return jnp.sum(jnp.tanh(x @ (p["w"] @ frozen)) * scale)

    agrees(inner, square, x1)
