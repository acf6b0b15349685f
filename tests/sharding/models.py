"""Small models that are written once for one device, and for meshes of any kind.

With Explicit axes a function must say how the result of an ambiguous product is
sharded. `Layout.dot` says it, and does nothing else.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

NUM_DEVICES = 8
NUM_EXAMPLES = 32


class Layout(NamedTuple):
    """Which axes of a mesh the examples and the parameters are spread over."""

    mesh: Any
    examples: Any  # A name, several, or None.
    columns: Any  # For the last axis of a matrix of parameters.
    rows: Any  # For its axis before the last.

    @property
    def explicit(self) -> bool:
        return self.mesh is not None and AxisType.Explicit in self.mesh.axis_types

    def dot(self, x: Any, w: Any, *rest: Any) -> Any:
        """`x @ w`, summed over devices where w's rows are spread over them.

        `rest` is the sharding of the axes of x before the last.
        """
        if not self.explicit:
            return x @ w
        if self.gathers:
            w = self.whole(w)
        rest = (*rest, *[None] * (x.ndim - 1 - len(rest)))
        columns = jax.typeof(w).sharding.spec[-1]
        return jnp.matmul(x, w, out_sharding=self.spread(*rest, columns))

    def lookup(self, table: Any, places: Any) -> Any:
        if not self.explicit:
            return table[places]
        table = self.whole(table)
        columns = jax.typeof(table).sharding.spec[-1]
        return table.at[places].get(out_sharding=self.spread(None, columns))

    def whole(self, w: Any) -> Any:
        """A parameter on every device: FSDP in a function of a whole batch."""
        if self.explicit and self.gathers:
            return jax.sharding.reshard(w, self.spread())
        return w

    def spread(self, *spec: Any) -> NamedSharding:
        return NamedSharding(self.mesh.abstract_mesh, PartitionSpec(*spec))

    @property
    def gathers(self) -> bool:
        """Whether parameters are spread over the devices that hold examples."""
        return self.examples is not None and self.examples == self.rows

    def place(self, params: Any, examples: Any) -> tuple[Any, Any]:
        if self.mesh is None:
            return params, examples

        def parameter(w):
            spec = [None] * w.ndim
            # Odd matrices have their columns spread, the others their rows.
            if w.ndim >= 2 and self.rows and w.shape[-2] % 8 == 0 and w.shape[-1] < 32:
                spec[-2] = self.rows
            elif w.ndim >= 2 and self.columns and w.shape[-1] % 8 == 0:
                spec[-1] = self.columns
            return jax.device_put(w, NamedSharding(self.mesh, PartitionSpec(*spec)))

        batch = NamedSharding(self.mesh, PartitionSpec(self.examples))
        return jax.tree.map(parameter, params), jax.device_put(examples, batch)


def layouts(kind: AxisType) -> dict[str, Layout]:
    one = jax.make_mesh((NUM_DEVICES,), ("all",), axis_types=(kind,))
    two = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
    return {
        "data": Layout(one, "all", None, None),
        "FSDP": Layout(one, "all", "all", "all"),
        "tensor": Layout(one, None, "all", "all"),
        "2-D": Layout(two, "data", "model", "model"),
    }


class Model(NamedTuple):
    """`loss` takes a layout, the parameters and the examples.

    It is of one example, or of all of them if `in_axes` is None.
    """

    params: Any
    examples: Any
    loss: Callable[..., Any]
    in_axes: Any


def normal(random: np.random.Generator, *shape: int) -> np.ndarray:
    return random.normal(size=shape) / max(1, shape[0]) ** 0.5


def mlp() -> Model:
    random = np.random.default_rng(0)
    params = {
        "w1": normal(random, 6, 32),
        "b1": normal(random, 32),
        "w2": normal(random, 32, 8),
        "b2": normal(random, 8),
    }
    m = NUM_EXAMPLES
    examples = random.normal(size=(m, 6)), random.normal(size=(m, 8))

    def loss(layout, params, x, y):
        h = jnp.tanh(layout.dot(x, params["w1"]) + params["b1"])
        return jnp.sum((layout.dot(h, params["w2"]) + params["b2"] - y) ** 2)

    return Model(params, examples, loss, (None, 0, 0))


def cnn() -> Model:
    random = np.random.default_rng(1)
    params = {
        "kernel": normal(random, 3, 3, 2, 4),
        "second": normal(random, 3, 3, 4, 4),
        "w": normal(random, 64, 8),
    }
    m = NUM_EXAMPLES
    examples = random.normal(size=(m, 4, 4, 2)), random.normal(size=(m, 8))

    def loss(layout, params, x, y):
        for name in ("kernel", "second"):
            x = jax.lax.conv_general_dilated(
                x[None],
                params[name],
                (1, 1),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )[0]
            x = jnp.tanh(x)
        return jnp.sum((layout.dot(x.reshape(-1), params["w"]) - y) ** 2)

    return Model(params, examples, loss, (None, 0, 0))


def transformer() -> Model:
    random = np.random.default_rng(2)
    params = {
        "embed": normal(random, 11, 8),
        "scale": 1 + 0.1 * normal(random, 8),
        "q": normal(random, 8, 32),
        "k": normal(random, 8, 32),
        "v": normal(random, 8, 32),
        "o": normal(random, 32, 8),
        "up": normal(random, 8, 32),
        "down": normal(random, 32, 8),
    }
    tokens = random.integers(11, size=(NUM_EXAMPLES, 5))

    def loss(layout, params, tokens):
        x = layout.lookup(params["embed"], tokens[:-1])
        y = x * params["scale"] / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-3)
        q, k, v = (layout.dot(y, params[name]) for name in "qkv")
        scores = layout.dot(q, k.T) if not layout.explicit else scores_of(layout, q, k)
        x = x + layout.dot(jax.nn.softmax(scores) @ v, params["o"])
        h = jnp.tanh(layout.dot(x, params["up"]))
        x = x + layout.dot(h, params["down"])
        logits = jax.nn.log_softmax(x)
        targets = jax.nn.one_hot(tokens[1:] % 8, 8, dtype=x.dtype)
        return -jnp.mean(jnp.sum(logits * targets, -1))

    def scores_of(layout, q, k):
        return jnp.matmul(q, k.T, out_sharding=layout.spread(None, None))

    return Model(params, (tokens,), loss, (None, 0))


def heads() -> Model:
    """Losses of tasks: means over all examples, with a trunk that they share."""
    random = np.random.default_rng(3)
    names = "abcd"
    params = {
        "trunk": normal(random, 6, 32),
        "second": normal(random, 32, 8),
        "heads": {name: normal(random, 8) for name in names},
    }
    m = NUM_EXAMPLES
    examples = random.normal(size=(m, 6)), random.normal(size=(m, 4))

    def losses(layout, params, x, y):
        examples = layout.examples
        h = jnp.tanh(layout.dot(x, params["trunk"], examples))
        h = jnp.tanh(layout.dot(h, params["second"], examples))
        return {
            name: jnp.mean((h @ params["heads"][name] - y[:, n]) ** 2)
            for n, name in enumerate(names)
        }

    return Model(params, examples, losses, None)


MODELS = {"MLP": mlp, "CNN": cnn, "transformer": transformer, "heads": heads}
