"""Random functions that return several losses, for comparison with brute force.

A function is drawn by its seed: a trunk of a few operations, losses that take some of
its values, and the way in which the losses are put together. Losses may share all of
the trunk, a part of it or nothing; one may be computed from another, occur twice, be a
parameter itself, or depend on no parameter at all.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

T, d = 3, 4

_rng = np.random.default_rng(0)
PARAMS = {
    "w": _rng.normal(size=(d, d)) / 2,
    "v": _rng.normal(size=(d, d)) / 2,
    "b": _rng.normal(size=d),
    "layers": _rng.normal(size=(2, d, d)) / 2,
    "s": np.array(0.7),
    "free": _rng.normal(size=2),
    "unused": _rng.normal(size=(2, 1)),
}
X = _rng.normal(size=(T, d))
WHICH = np.array([2, 0, 2])  # Rows to look up: not differentiated.


@jax.custom_vjp
def doubled(x):
    """Its derivative is not that of the function, so that no other can pass for it."""
    return jnp.sin(x)


doubled.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (2 * g * jnp.cos(x),))


@jax.custom_jvp
def root(x):
    """The square root of 1 + x^2, by a loop that has no derivative."""
    y = 1 + x**2

    def step(state):
        n, z = state
        return n + 1, (z + y / z) / 2

    return lax.while_loop(lambda state: state[0] < 8, step, (0, y))[1]


@root.defjvp
def _root_jvp(primals, tangents):
    (x,), (t,) = primals, tangents
    y = root(x)
    return y, t * x / y


def counted(p, x):
    """A loop on what is not differentiated."""
    size = lax.stop_gradient(jnp.sum(p["b"] ** 2))
    steps = lax.while_loop(lambda n: n < size, lambda n: n + 1.0, jnp.float64(0.0))
    return x @ p["w"] / (1.0 + steps)


# From the parameters, two values [T, d] and integers to such a value.
OPERATIONS: dict[str, Callable] = {
    "dense": lambda p, x, y, i: jnp.tanh(x @ p["w"]),
    "transposed": lambda p, x, y, i: y @ p["w"].T,
    "bias": lambda p, x, y, i: x + p["b"][None],
    "scale": lambda p, x, y, i: y * p["s"],
    "normalised": lambda p, x, y, i: x @ (p["v"] / jnp.linalg.norm(p["v"])),
    "product": lambda p, x, y, i: x * jnp.sin(y),
    "attention": lambda p, x, y, i: jax.nn.softmax(x @ p["v"] @ y.T) @ x,
    "lookup": lambda p, x, y, i: x + p["v"][i],
    "jit": lambda p, x, y, i: jax.jit(lambda p: jnp.cos(x @ p["w"]) + y @ p["v"])(p),
    "custom_jvp": lambda p, x, y, i: root(x @ p["v"]) / 2,
    "custom_vjp": lambda p, x, y, i: doubled(x @ p["w"]),
    "remat": lambda p, x, y, i: jax.checkpoint(
        lambda x, w: jnp.sin(jnp.tanh(x @ w) @ w)
    )(x, p["w"]),
    "rnn": lambda p, x, y, i: lax.scan(
        lambda h, u: (jnp.tanh(h @ p["w"] + u), h), p["b"], y
    )[1],
    "layers": lambda p, x, y, i: lax.scan(
        lambda h, w: (jnp.tanh(h @ w), None), x, p["layers"]
    )[0],
    "cond": lambda p, x, y, i: lax.cond(
        x[0, 0] > 0, lambda: jnp.sin(x @ p["v"]), lambda: y * p["b"][None]
    ),
    "switch": lambda p, x, y, i: lax.switch(
        i[0], [lambda h: h, lambda h: h @ p["w"], lambda h: h * p["s"]], x
    ),
    "while": lambda p, x, y, i: counted(p, x),
    "fori": lambda p, x, y, i: lax.fori_loop(
        0, 2, lambda n, h: jnp.tanh(h @ p["layers"][0]) + y, x
    ),
    "vmap": lambda p, x, y, i: jax.vmap(lambda x: jnp.tanh(x @ p["w"]) * p["b"])(x),
    "stopped": lambda p, x, y, i: x * lax.stop_gradient(jnp.tanh(y)),
    "named": lambda p, x, y, i: jax.jit(lambda h: checkpoint_name(h, "features"))(
        jnp.tanh(x @ p["v"])
    ),
}


def slope(p, x):
    """With a derivative in it, as a physics-informed network has."""

    def u(x):
        return jnp.tanh(x @ p["w"]) @ p["b"]

    return jax.vmap(jax.grad(u))(x)[:, 0]


# From the parameters, a value, an earlier loss and integers to a loss of any shape.
LOSSES: dict[str, Callable] = {
    "mean": lambda p, x, loss, i: jnp.mean(x**2),
    "head": lambda p, x, loss, i: jnp.sum(x @ p["b"]),
    "positions": lambda p, x, loss, i: jnp.sum(x**2, axis=1),
    "matrix": lambda p, x, loss, i: jnp.sin(x[:2, :2]),
    "column": lambda p, x, loss, i: (x @ p["b"])[:, None],
    "penalty": lambda p, x, loss, i: jnp.sum(p["v"] ** 2),
    "free": lambda p, x, loss, i: jnp.sum(p["free"] ** 3),
    "constant": lambda p, x, loss, i: jnp.float64(3.0),
    "literal": lambda p, x, loss, i: 2.0,
    "data": lambda p, x, loss, i: jnp.asarray(X)[0],
    "scalar_parameter": lambda p, x, loss, i: p["s"],
    "vector_parameter": lambda p, x, loss, i: p["free"],
    "again": lambda p, x, loss, i: loss,
    "nested": lambda p, x, loss, i: jnp.log1p(jnp.asarray(loss) ** 2) * p["s"],
    "longer": lambda p, x, loss, i: jnp.sum(loss) * jnp.mean(x @ p["w"]),
    "vmap": lambda p, x, loss, i: jax.vmap(lambda x: jnp.sum(jnp.tanh(x @ p["w"])))(x),
    "looked_up": lambda p, x, loss, i: p["v"][i].sum(axis=1),
    "slope": lambda p, x, loss, i: slope(p, x),
    "scan": lambda p, x, loss, i: lax.scan(
        lambda h, u: (jnp.sin(h * p["free"][0] + u.sum()), h), p["s"], x
    )[1],
    "split": lambda p, x, loss, i: jax.jit(
        lambda p: (jnp.sum(p["free"]), jnp.mean(x @ p["w"]))
    )(p),
}


def together(losses: Sequence[Any]) -> Any:
    leaves = jax.tree.leaves(losses)
    return jnp.concatenate([jnp.ravel(jnp.asarray(x)) for x in leaves])


def scalars(losses: Sequence[Any]) -> Any:
    return jnp.stack([jnp.sum(jnp.asarray(x)) for x in jax.tree.leaves(losses)])


def weighted(losses):
    s = scalars(losses)
    return jnp.log1p(jnp.linspace(1.0, 2.0, len(s)) * s**2) / 7


def outer(losses):
    """Broadcasts scalars that were stacked, and stacks against each other."""
    s = scalars(losses)
    one = jnp.stack([s[0]])
    return s[:, None] * jnp.cos(s)[None], one[0] * s, jnp.sin(s) / one.reshape(1)


def activated(losses):
    """Functions of a stack, with rules of their own."""
    s = scalars(losses)
    return jax.nn.relu(s + 0.1), jax.nn.softplus(s), jnp.sort(s), jnp.clip(s, -1.0, 1.0)


def mixed(losses):
    s = scalars(losses)
    return jnp.concatenate([s[::-1], s.sum()[None], jnp.maximum(s, 0.1)])


# How losses are returned: from a list of them, which may hold tuples.
CONTAINERS: dict[str, Callable] = {
    "list": lambda losses: losses,
    "tuple": tuple,
    "dict": lambda losses: {f"loss{9 - n}": x for n, x in enumerate(losses)},
    "nested": lambda losses: {"z": (losses[0], None), "a": {"b": losses[1:]}},
    "empty": lambda losses: [jnp.zeros((0, 2)), *losses, jnp.zeros(0)],
    "concatenated": together,
    "stack": scalars,
    "weighted": weighted,
    "column": lambda losses: scalars(losses)[:, None],
    "reversed": lambda losses: together(losses)[::-1],
    "columns": lambda losses: jnp.stack([scalars(losses), weighted(losses)], axis=1),
    "rows": lambda losses: jnp.stack([scalars(losses), weighted(losses)]),
    "mixed": mixed,
    "outer": outer,
    "activated": activated,
    "twice": lambda losses: jax.jit(jax.jit(weighted))(losses) + scalars(losses),
    "checkpointed": lambda losses: (
        jax.checkpoint(scalars)(losses) ** 3 / scalars(losses)
    ),
    "masked": lambda losses: jnp.where(
        jnp.arange(len(scalars(losses))) > 0, scalars(losses), 0.0
    ),
    "single": lambda losses: scalars(losses).sum(),
    "two": lambda losses: (together(losses), scalars(losses)),
    "float32": lambda losses: {
        "a": losses[0],
        "b": scalars(losses).astype(jnp.float32),
    },
}


def branched(fun):
    return lambda p, x, i: lax.cond(i[0] > 1, fun, fun, p, x, i)


def scanned(fun):
    """The losses at three points, from the iterations of a loop."""

    def losses(p, x, i):
        def step(h, scale):
            return jnp.tanh(h @ p["w"]), fun(p, h * scale, i)

        return lax.scan(step, x, jnp.linspace(1.0, 2.0, 3))[1]

    return losses


def summed(fun):
    """The sums of the losses over a loop, which carries them."""

    def losses(p, x, i):
        def step(total, scale):
            return jax.tree.map(jnp.add, total, fun(p, x * scale, i)), None

        first = jax.tree.map(jnp.asarray, fun(p, x, i))
        return lax.scan(step, first, jnp.linspace(0.5, 2.0, 2))[0]

    return losses


def mapped(fun):
    def losses(p, x, i):
        return jax.vmap(lambda shift: fun(p, x + shift, i))(jnp.linspace(0.0, 1.0, 2))

    return losses


def custom(fun):
    """Twice the derivative, given by a rule."""

    @jax.custom_vjp
    def losses(p, x, i):
        return fun(p, x, i)

    def forward(p, x, i):
        values, pullback = jax.vjp(lambda p: fun(p, x, i), p)
        return values, pullback

    def backward(pullback, cotangent):
        (gradient,) = pullback(cotangent)
        return jax.tree.map(lambda g: 2 * g, gradient), None, None

    losses.defvjp(forward, backward)
    return losses


def custom_forward(fun):
    @jax.custom_jvp
    def losses(p, x, i):
        return fun(p, x, i)

    @losses.defjvp
    def _(primals, tangents):
        p, x, i = primals
        values, change = jax.jvp(lambda p: fun(p, x, i), (p,), (tangents[0],))
        return values, jax.tree.map(lambda t: 3 * t, change)

    return losses


# What may be around all of it.
WRAPPERS: dict[str, Callable] = {
    "plain": lambda fun: fun,
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "jit_remat": lambda fun: jax.jit(jax.checkpoint(fun)),
    "cond": branched,
    "scan": scanned,
    "carry": summed,
    "vmap": mapped,
    "custom_vjp": custom,
    "custom_jvp": custom_forward,
}


class Drawn(NamedTuple):
    """`fun` takes parameters, X and WHICH, and returns losses and auxiliary output.

    `named` are the places among its values of those that it names "features",
    outside of any loop or rule.
    """

    fun: Callable
    name: str
    named: tuple[int, ...]


def drawn(seed: int) -> Drawn:
    rng = np.random.default_rng(seed)

    def pick(options):
        options = list(options)
        return options[rng.integers(len(options))]

    steps = [
        (pick(OPERATIONS), *rng.integers(9, size=2)) for _ in range(rng.integers(1, 4))
    ]
    kinds = [
        (pick(LOSSES), *rng.integers(9, size=2)) for _ in range(rng.integers(1, 5))
    ]
    container = pick(CONTAINERS)
    # Half of the functions have nothing around them.
    wrapper = pick(["plain"] * (len(WRAPPERS) - 1) + list(WRAPPERS)[1:])

    def losses(p, x, i):
        given = p.get("given", {})
        p = {name: value for name, value in p.items() if name != "given"}
        values = [x, jnp.cos(x)]
        for name, back, other in steps:
            operands = values[-1 - back % len(values)], values[other % len(values)]
            value = OPERATIONS[name](p, *operands, i)
            # The losses are also functions of what is named, if it is given.
            values.append(given.get(len(values), value))
        found: list[Any] = []
        for name, back, other in kinds:
            earlier = found[other % len(found)] if found else jnp.sum(p["b"])
            earlier = jax.tree.leaves(earlier)[0]
            found.append(LOSSES[name](p, values[-1 - back % len(values)], earlier, i))
        return CONTAINERS[container](found)

    around = WRAPPERS[wrapper](losses)

    def fun(p, x, i):
        return around(p, x, i), {"sum": x.sum() * p["s"], "which": i}

    names = [name for name, *_ in (*steps, *kinds)]
    named = [n + 2 for n, (name, *_) in enumerate(steps) if name == "named"]
    return Drawn(
        fun,
        f"{wrapper}({container}({', '.join(names)}))",
        tuple(named) if wrapper == "plain" else (),
    )
