"""A batch that is taken in parts gives the update of the whole batch."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxjd
from tests.xla import NORMAL


def task_losses(params, x):
    for weight in params["trunk"]:
        x = jnp.tanh(x @ weight)
    return {f"task {i}": jnp.mean((x @ params["heads"][:, i]) ** 2) for i in range(3)}


def in_parts(params, x):
    of_part = jax.checkpoint(lambda part: task_losses(params, part))
    of_parts = jax.lax.map(of_part, x.reshape(16, -1, *x.shape[1:]))
    return jax.tree.map(lambda x: x.mean(0), of_parts)


def test_parts_of_a_batch():
    width = 64
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "trunk": [jax.random.normal(key, (width, width)) / 8 for key in keys[:2]],
        "heads": jax.random.normal(keys[2], (width, 3)),
    }
    x = jax.random.normal(keys[3], (2048, width))

    def compiled(fun):
        def step(params, x):
            jac = jaxjd.jac(fun)(params, x)
            tx = jaxjd.upgrad()
            return jac.gramian(), tx.update(jac, tx.init(params), params)[0]

        return jax.jit(step).lower(params, x).compile(NORMAL)

    whole, parts = compiled(task_losses), compiled(in_parts)
    for a, b in zip(
        jax.tree.leaves(parts(params, x)),
        jax.tree.leaves(whole(params, x)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * np.abs(b).max())
    memory = [c.memory_analysis().temp_size_in_bytes for c in (parts, whole)]
    # The activations of one part of 16, and the rows.
    rows = 3 * sum(4 * leaf.size for leaf in jax.tree.leaves(params))
    activations = 2 * 4 * 2048 * width
    assert memory[0] < 2 * rows + activations
    assert memory[1] > 2 * activations
