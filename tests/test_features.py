"""Weights from the features: are they, and the update, what the chain rule says?"""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.ad_checkpoint import checkpoint_name
from numpy.testing import assert_allclose

import jaxjd
from tests import models
from tests.xla import NORMAL

rng = np.random.default_rng(0)
X = rng.normal(size=(5, 3))
PARAMS = {
    "first": rng.normal(size=(3, 4)),
    "second": rng.normal(size=(4, 4)),
    "heads": {"a": rng.normal(size=4), "b": rng.normal(size=(4, 2))},
    "shared": rng.normal(size=4),
    "unused": rng.normal(size=2),
}


def trunk(p):
    """Two values that the losses share, the second computed from the first."""
    x = jnp.asarray(X)
    first = jnp.tanh(x @ p["first"])
    second = jax.checkpoint(lambda h: jnp.sin(h @ p["second"]))(first)
    return [first, second]


def heads(p, features):
    """Each loss has a head of its own; one parameter of the heads is shared."""
    first, second = features
    return {
        "a": jnp.sum((second * p["shared"][None]) @ p["heads"]["a"]),
        "b": jnp.mean((first + second) @ p["heads"]["b"], axis=0) ** 2,
        "c": jnp.sum(p["shared"] ** 3),
    }


def losses(p):
    first = checkpoint_name(jnp.tanh(jnp.asarray(X) @ p["first"]), "first")
    second = jax.checkpoint(lambda h: jnp.sin(h @ p["second"]))(first)
    second = jax.jit(lambda h: checkpoint_name(h, "second"))(second)
    return heads(p, [first, second])


def flat(tree):
    return jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(tree)])


def of_features(names):
    """From parameters to (features, losses as a function of them)."""
    if names == ("second",):
        return lambda p: [trunk(p)[1]], lambda p, z: heads(p, [trunk(p)[0], z[0]])
    if names == ("first",):

        def later(p, z):
            second = jnp.sin(z[0] @ p["second"])
            return heads(p, [z[0], second])

        return lambda p: [trunk(p)[0]], later
    return trunk, heads


NAMES = [("first",), ("second",), ("first", "second")]


@pytest.mark.parametrize("names", NAMES, ids="-".join)
def test_equals_brute_force(x64, names):
    params = jax.tree.map(jnp.asarray, PARAMS)
    before, after = of_features(names)
    weighting = jaxjd.weighting.upgrad(noise_eps=0)
    tx = jaxjd.aggregate(weighting, features=names if len(names) > 1 else names[0])

    @jax.jit
    def everything(params):
        features = before(params)
        of_z = models.brute_force(lambda z: flat(after(params, z)), features)
        J = models.brute_force(lambda p: flat(losses(p)), params)
        found = []
        for method in ("auto", "dense", "chunked", "structured"):
            jac = jaxjd.jac(losses, method=method)(params)
            update, _ = tx.update(jac, tx.init(params), params)
            found.append((jac.features(names).gramian(), models.ravel(update)))
        wanted = of_z @ of_z.T, weighting(of_z @ of_z.T) @ J
        return wanted, found, jac.features(names).dense(), of_z

    wanted, found, rows, of_z = everything(params)
    for actual in found:
        for x, y in zip(actual, wanted, strict=True):
            assert_allclose(x, y, rtol=1e-9, atol=1e-11)
    assert_allclose(models.ravel_rows(rows), of_z, rtol=1e-11, atol=1e-13)


def test_features_of_one_name_are_a_list_in_order(x64):
    def losses(p):
        left = checkpoint_name(jnp.sin(p["a"]), "z")
        right = checkpoint_name(p["a"] ** 2 * p["b"], "z")
        return left.sum() * right.sum(), left @ right, 2.0

    params = {"a": jnp.arange(3.0), "b": jnp.float64(0.5)}
    left, right = jnp.sin(params["a"]), params["a"] ** 2 * params["b"]
    zeros = jnp.zeros(3)
    dense = jaxjd.jac(losses)(params).features("z").dense()
    expected = [
        jnp.stack([jnp.full(3, right.sum()), right, zeros]),
        jnp.stack([jnp.full(3, left.sum()), left, zeros]),
    ]
    for x, y in zip(dense, expected, strict=True):
        assert_allclose(x, y, rtol=1e-12)


def multitask(m, width=64, depth=3, dtype=jnp.float32):
    x = jnp.asarray(rng.normal(size=(32, width)), dtype)
    weights = jnp.asarray(rng.normal(size=(depth, width, width)) / width**0.5, dtype)
    params = {
        "trunk": list(weights),
        "heads": [jnp.full(width, i / m, dtype) for i in range(m)],
    }

    def losses(params):
        h = x
        for weight in params["trunk"]:
            h = jnp.tanh(h @ weight)
        h = checkpoint_name(h, "features")
        targets = [jnp.sin((i + 1) * x[:, i]) for i in range(m)]
        pairs = zip(params["heads"], targets, strict=True)
        return [jnp.mean((h @ head - y) ** 2) for head, y in pairs]

    return losses, params


def partitioned(**options):
    weighting = jaxjd.weighting.upgrad()
    return jaxjd.partition(
        {"shared": jaxjd.aggregate(weighting, **options), "own": jaxjd.sum()},
        {"trunk": "shared", "heads": "own"},
    )


def test_one_backward_pass_through_the_trunk():
    """For eight tasks as for one: what the sum of the losses takes, and a Gramian."""
    m, width = 8, 64
    losses, params = multitask(m, width)
    tx = partitioned(features="features")

    def update(params):
        jac = jaxjd.jac(losses)(params)
        return tx.update(jac, tx.init(params), params)[0]

    def gradient(params):
        return jax.grad(lambda p: sum(losses(p)))(params)

    def flops(fun):
        compiled = jax.jit(fun).lower(params).compile(NORMAL)
        return compiled.cost_analysis()["flops"]

    gramian = 2 * m**2 * 32 * width
    assert flops(update) <= 1.05 * (flops(gradient) + gramian)


@pytest.mark.parametrize("method", ["auto", "chunked"])
def test_one_forward_pass_through_the_trunk(method):
    """As by hand, where XLA does not merge two passes: behind norms and rectifiers."""
    x, width = jnp.asarray(rng.normal(size=(4, 8, 8, 16)), jnp.float32), 16 * 8 * 8
    params = {
        "trunk": list(jnp.asarray(rng.normal(size=(3, 3, 3, 16, 16)), jnp.float32)),
        "heads": list(jnp.asarray(rng.normal(size=(2, width)), jnp.float32)),
    }

    def trunk(kernels):
        h = x
        for kernel in kernels:
            dimensions = ("NHWC", "HWIO", "NHWC")
            h = jax.lax.conv_general_dilated(
                h, kernel, (1, 1), "SAME", dimension_numbers=dimensions
            )
            variance = jnp.maximum(0.0, jnp.var(h, (1, 2), keepdims=True))
            scale = jax.lax.rsqrt(variance + 1e-6)
            h = jax.nn.relu((h - h.mean((1, 2), keepdims=True)) * scale)
        return h.reshape(len(x), -1)

    def head(w, h):
        return jnp.mean((h @ w - 1.0) ** 2)

    def losses(params):
        h = checkpoint_name(trunk(params["trunk"]), "features")
        return [head(w, h) for w in params["heads"]]

    def weighting(gramian):
        return 1 / jnp.diag(gramian)

    tx = jaxjd.partition(
        {"shared": jaxjd.aggregate(weighting, features="features"), "own": jaxjd.sum()},
        {"trunk": "shared", "heads": "own"},
    )

    def update(params):
        values, jac = jaxjd.value_and_jac(losses, method=method)(params)
        return tx.update(jac, tx.init(params), params)[0], values

    def by_hand(params):
        h, pullback = jax.vjp(trunk, params["trunk"])
        both = jax.value_and_grad(head, (0, 1))
        values, gradients = zip(*[both(w, h) for w in params["heads"]], strict=True)
        rows = jnp.stack([row for _, row in gradients])
        flat = rows.reshape(2, -1)
        weights = weighting(flat @ flat.T)
        (shared,) = pullback((weights @ flat).reshape(h.shape))
        own = [of_head for of_head, _ in gradients]
        return {"trunk": shared, "heads": own}, list(values)

    found, expected = (
        jax.jit(function).lower(params).compile(NORMAL)
        for function in (update, by_hand)
    )
    convolutions = [x.as_text().count(" convolution(") for x in (found, expected)]
    assert convolutions[0] == convolutions[1] > 0
    assert found.cost_analysis()["flops"] <= 1.02 * expected.cost_analysis()["flops"]
    for a, b in zip(
        jax.tree.leaves(found(params)), jax.tree.leaves(expected(params)), strict=True
    ):
        assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_trains_in_a_scan(dtype):
    losses, params = multitask(3, width=8, depth=2, dtype=dtype)
    tx = optax.chain(partitioned(features="features"), optax.adam(1e-2))

    @jax.jit
    def trained(params):
        def step(carry, _):
            params, state, _ = carry
            values, jac = jaxjd.value_and_jac(losses)(params)
            updates, state = tx.update(jac, state, params)
            return (optax.apply_updates(params, updates), state, jac), flat(values)

        carry = params, tx.init(params), jaxjd.jac(losses)(params)
        return jax.lax.scan(step, carry, None, length=40)[1]

    values = trained(params).astype(jnp.float32)
    assert (values[-1] < values[0]).all()


def test_a_jacobian_with_features_can_be_copied_and_leaves_jit():
    losses, params = multitask(2, width=8, depth=1)
    jac = jax.jit(jaxjd.jac(losses))(params)
    expected = jac.features("features").gramian()
    for other in (copy.copy(jac), copy.deepcopy(jac), jax.tree.map(lambda x: x, jac)):
        assert_allclose(other.features("features").gramian(), expected)
    heads_only = jac.restrict({"trunk": False, "heads": True})
    assert_allclose(heads_only.features("features").gramian(), expected)


def test_nnx():
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.trunk = nnx.Linear(3, 8, rngs=rngs)
            self.head = nnx.Linear(8, 2, rngs=rngs)

        def __call__(self, x):
            return self.head(checkpoint_name(nnx.tanh(self.trunk(x)), "features"))

    def losses(model, x):
        y = model(x)
        return [jnp.mean((y[:, 0] - x[:, 0]) ** 2), jnp.mean((y[:, 1] + x[:, 0]) ** 2)]

    model, x = Net(nnx.Rngs(0)), jnp.asarray(X, jnp.float32)
    tx = jaxjd.aggregate(jaxjd.weighting.upgrad(), features="features")
    optimizer = nnx.Optimizer(model, optax.chain(tx, optax.sgd(0.1)), wrt=nnx.Param)
    values, jac = jaxjd.nnx.value_and_jac(losses)(model, x)
    optimizer.update(model, jac)
    after = losses(model, x)
    assert all(new < old for new, old in zip(after, values, strict=True))


def test_wrong_arguments(x64):
    params = jax.tree.map(jnp.asarray, PARAMS)
    jac = jaxjd.jac(losses)(params)
    with pytest.raises(ValueError, match=r"name 'thrid' by .*'first', 'second'"):
        jac.features(["first", "thrid"])
    with pytest.raises(TypeError, match=r"Got \[\]"):
        jac.features([])
    with pytest.raises(TypeError, match="Got 3"):
        jac.features(3)
    nothing = jaxjd.jac(lambda p: p["shared"])(params)
    with pytest.raises(ValueError, match="What it names there: nothing"):
        nothing.features("first")

    def hidden(p):
        return jax.checkpoint(lambda p: checkpoint_name(p["shared"], "z"))(p) ** 2

    with pytest.raises(ValueError, match=r"outside of loops, branches and"):
        jaxjd.jac(hidden)(params).features("z")

    def one(p, x):
        return checkpoint_name(x @ p["first"], "z").sum()

    per_example = jaxjd.jac(one, in_axes=(None, 0))(params, X)
    with pytest.raises(ValueError, match="no two examples share features"):
        per_example.features("z")

    def integers(p):
        which = checkpoint_name(jnp.argmax(p["shared"]), "z")
        return p["shared"][which], p["shared"].sum()

    with pytest.raises(TypeError, match="floating-point arrays. Got int"):
        jaxjd.jac(integers)(params).features("z")
    weighting = jaxjd.weighting.upgrad()
    with pytest.raises(ValueError, match="Give one"):
        jaxjd.aggregate(weighting, wrt=True, features="z")
    tx = functools.partial(jaxjd.aggregate(weighting, features="z").update, jac)
    with pytest.raises(ValueError, match="must name 'z'"):
        tx((), params)
