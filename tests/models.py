"""Small models for the tests, and their Jacobians by brute force."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def parameters(dtype=jnp.float64) -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "hidden": (
            jax.random.normal(keys[0], (5, 3), dtype),
            jax.random.normal(keys[1], (3,), dtype),
        ),
        "scale": jax.random.normal(keys[2], (), dtype),
    }


def examples(number: int = 7, dtype=jnp.float64) -> tuple[jax.Array, jax.Array]:
    x, y = jax.random.split(jax.random.key(1))
    return (
        jax.random.normal(x, (number, 5), dtype),
        jax.random.normal(y, (number, 3), dtype),
    )


def hidden(params, x):
    weight, bias = params["hidden"]
    bias = jnp.broadcast_to(bias, (*x.shape[:-1], 3))
    return jnp.tanh(x @ weight + bias) * params["scale"]


def loss(params, x, y):
    """One loss for one example."""
    return jnp.sum((hidden(params, x) - y) ** 2)


def task_losses(params, x, y):
    """Three losses in two arrays for one example."""
    h = hidden(params, x)
    return {"fit": jnp.sum((h - y) ** 2), "moments": jnp.stack([h.sum(), (h**3).sum()])}


def batched(fun: Callable) -> Callable:
    return jax.vmap(fun, (None, 0, 0))


def matrix(jacobian_of_losses: Any, params: Any) -> jax.Array:
    """Flatten the pytree of `jax.jacrev` to [m, n], losses in row-major order."""
    sizes = [p.size for p in jax.tree.leaves(params)]
    structure = jax.tree.structure(params)
    rows = []
    for tree in jax.tree.leaves(
        jacobian_of_losses, is_leaf=lambda x: jax.tree.structure(x) == structure
    ):
        leaves = jax.tree.leaves(tree)
        rows.append(
            jnp.concatenate(
                [x.reshape(-1, n) for x, n in zip(leaves, sizes, strict=True)], axis=1
            )
        )
    return jnp.concatenate(rows)


def brute_force(fun: Callable, params: Any, *args: Any) -> jax.Array:
    """Compute the Jacobian [m, n] of a function that returns all losses."""
    return matrix(jax.jacrev(fun)(params, *args), params)


def ravel(tree: Any) -> jax.Array:
    """Flatten a pytree like the parameters to [n]."""
    return jnp.concatenate([x.ravel() for x in jax.tree.leaves(tree)])


def ravel_rows(tree: Any) -> jax.Array:
    """Flatten a pytree like the parameters, with a leading axis, to [m, n]."""
    return jnp.concatenate([x.reshape(len(x), -1) for x in jax.tree.leaves(tree)], 1)
