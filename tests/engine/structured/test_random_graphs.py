"""Does any composition of a few operations agree with brute force?"""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from tests.engine.structured.conftest import check, normal

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

m, T, d = 2, 3, 4

# Each takes the parameters, and values [T, d] of the example, and returns such a value.
OPERATIONS = {
    "dense": lambda p, x, y: x @ p["w"],
    "transposed": lambda p, x, y: y @ p["w"].T,
    "cast": lambda p, x, y: x @ p["w"].astype(jnp.float32).astype(x.dtype),
    "low_rank": lambda p, x, y: x @ (p["w"][:, :2] @ p["v"][:2]),
    "normalised": lambda p, x, y: y @ (p["v"] / jnp.linalg.norm(p["v"])),
    "bias": lambda p, x, y: x + p["b"],
    "scale": lambda p, x, y: y * jnp.tanh(p["b"]),
    "nonlinear": lambda p, x, y: jnp.tanh(x) * y,
    "sum": lambda p, x, y: x - 0.5 * y,
    "attention": lambda p, x, y: jax.nn.softmax(x @ p["v"] @ y.T) @ x,
    "lookup": lambda p, x, y: x + p["v"][jnp.argmax(y, axis=-1)],
    "convolution": lambda p, x, y: lax.conv(x.T[None], p["k"], (1,), "SAME")[0].T,
    "maximum": lambda p, x, y: jnp.maximum(x, p["b"]),
    "remat": lambda p, x, y: jax.checkpoint(lambda x: jnp.sin(x @ p["w"]))(x),
    "scan": lambda p, x, y: lax.scan(
        lambda h, w: (jnp.tanh(h @ w @ p["v"]), None), x, jnp.stack([p["w"], p["v"]])
    )[0],
    "cond": lambda p, x, y: lax.cond(
        x[0, 0] > 0, lambda: jnp.sin(x @ p["v"]), lambda: y * p["b"]
    ),
}
PARAMS = {"w": normal(d, d), "v": normal(d, d, seed=1), "b": normal(d)}
PARAMS |= {"k": normal(d, d, 3)}


@hypothesis.settings(
    max_examples=12,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[hypothesis.Phase.generate],  # Shrinking compiles, and takes minutes.
    suppress_health_check=list(hypothesis.HealthCheck),
)
@hypothesis.given(
    steps=st.lists(
        st.tuples(st.sampled_from(sorted(OPERATIONS)), st.integers(0, 3)),
        min_size=2,
        max_size=5,
    ),
    per_position=st.booleans(),
)
def test_random_graph(steps, per_position):
    def fun(params, x):
        values = [x, jnp.cos(x)]
        for name, back in steps:
            y = values[-1 - back % len(values)]
            values.append(OPERATIONS[name](params, values[-1], y))
        losses = (values[-1] ** 2).sum(axis=1)
        return losses if per_position else losses.sum()

    to_float32 = any(name == "cast" for name, _ in steps)
    tolerance = 1e-5 if to_float32 else 1e-9
    check(fun, PARAMS, normal(m, T, d), direct=None, tolerance=tolerance)
