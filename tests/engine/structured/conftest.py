"""How is a structured Jacobian compared with a brute-force one?"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import keystr

from jaxjd import engine
from jaxjd.engine.structured import plan, structured

NUM_EXAMPLES = 3


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def quickly(fun, *args):
    """Compile and run once."""
    return jax.jit(fun)(*args)


def normal(*shape, seed=0):
    generator = np.random.default_rng([seed, *shape])
    # NumPy's, which stays float64 where modules are imported in JAX's default, float32.
    return np.asarray(generator.normal(size=shape))


def traced(fun, params, *examples, in_axes=None):
    """The structured Jacobian, and the names of parameters in its order."""
    axes = (None, *[0] * len(examples)) if in_axes is None else in_axes
    function, inputs, places, _, _ = engine.trace(
        lambda *args: (fun(*args), None), (params, *examples), axes, identity=fun
    )
    paths = [keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    found = plan(function, places[: len(paths)])
    jacobian, (losses, _) = structured(found, inputs)
    return jacobian, losses, paths


def brute_force(fun, params, *examples, in_axes=None):
    """The rows of the Jacobian, by `jax.jacrev`, losses of an example side by side."""
    axes = (None, *[0] * len(examples)) if in_axes is None else in_axes

    def losses(params):
        return jax.vmap(fun, axes)(params, *examples).ravel()

    return losses(params), jax.tree.leaves(jax.jacrev(losses)(params))


def relative(actual, expected):
    scale = jnp.abs(expected).max()
    return jnp.abs(actual - expected).max() / jnp.where(scale > 0, scale, 1)


def check(fun, params, *examples, direct=(), in_axes=None, tolerance=1e-9):
    """Compare Gramian, its diagonal, combination and losses with brute force.

    `direct` are the names of the parameters, and no others, that are perturbed
    themselves; None leaves it open. They are returned.
    """
    found = {}

    def errors(params, *examples):
        losses, rows = brute_force(fun, params, *examples, in_axes=in_axes)
        jacobian, own, paths = traced(fun, params, *examples, in_axes=in_axes)
        found["direct"] = {
            paths[jacobian.argnums.index(n)] for n in jacobian.plan.direct
        }
        flat = [leaf.reshape(len(losses), -1) for leaf in rows]
        gramian = sum(leaf @ leaf.T for leaf in flat)
        weights = normal(len(losses), seed=7)
        expected = [jnp.tensordot(weights, leaf, 1) for leaf in rows]
        combined = jacobian.vjp(weights)
        for x, y in zip(combined, expected, strict=True):
            assert x.shape == y.shape
            assert x.dtype == y.dtype
        # Relative to all parameters: a gradient may vanish in exact arithmetic.
        scale = jnp.max(jnp.stack([jnp.abs(x).max() for x in expected]))
        vjp = [jnp.abs(x - y).max() for x, y in zip(combined, expected, strict=True)]
        mine = jacobian.gramian()
        return {
            "losses": relative(jnp.concatenate(own, None).ravel(), losses),
            "gramian": relative(mine, gramian),
            "vjp": jnp.max(jnp.stack(vjp)) / jnp.where(scale > 0, scale, 1),
            "squared norms": relative(jacobian.squared_norms(), jnp.diag(gramian)),
            "asymmetry": jnp.abs(mine - mine.T).max(),
        }

    found_errors = jax.tree.map(float, quickly(errors, params, *examples))
    assert found_errors.pop("asymmetry") == 0
    assert all(error <= tolerance for error in found_errors.values()), found_errors
    if direct is not None:
        assert found["direct"] == {f"['{name}']" for name in direct}
    return found["direct"]


@pytest.fixture
def agrees():
    return check
