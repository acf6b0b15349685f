"""What is communicated, what is refused, and where results are, on 4 devices."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxjd
from benchmarks._collectives import collectives
from tests.weighting import registry
from tests.xla import NORMAL

KINDS = [AxisType.Auto, AxisType.Explicit]


def mesh_of_four(kind=AxisType.Auto, shape=(4,), names=("data",)):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape))


def place(mesh, tree, *spec):
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*spec)))


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) / math.sqrt(shape[0])


def sequences(num_losses=16):
    """Two layers on sequences, whose gradients are cheapest to contract as rows."""
    params = {"up": normal(0, 16, 32), "down": normal(1, 32, 16)}
    x = normal(2, num_losses, 32, 16)

    def loss(params, x):
        return jnp.sum(jnp.tanh(x @ params["up"]) @ params["down"] * x[::-1])

    return params, x, loss


def step(loss, params, x):
    losses, jac = jaxjd.value_and_jac(loss, in_axes=(None, 0))(params, x)
    weights = jaxjd.weighting.upgrad()(jac.gramian())
    return losses, weights, jac.vjp(weights)


def test_solver_does_not_communicate():
    params, x, loss = sequences()
    mesh = mesh_of_four()
    placed = place(mesh, params), place(mesh, x, "data")
    compiled = jax.jit(functools.partial(step, loss)).lower(*placed).compile()
    hlo = compiled.as_text()
    assert " while(" in hlo
    assert not any(one.in_loop for one in collectives(hlo))
    losses, weights, update = compiled(*placed)
    assert np.ptp(weights) > 0.01  # There are conflicts.
    assert losses.sharding.spec == PartitionSpec("data")
    expected = jax.jit(functools.partial(step, loss))(params, x)[2]
    for name in params:
        np.testing.assert_allclose(update[name], expected[name], rtol=2e-5, atol=1e-6)


def test_rows_move_once():
    """An all-to-all of this device's share, and sums of m², n and 2m numbers."""
    params, x, loss = sequences(32)
    mesh = mesh_of_four()
    m, n = len(x), sum(p.size for p in params.values())

    @jax.jit
    def update(params, x):
        jac = jaxjd.jac(loss, in_axes=(None, 0), contraction="rows")(params, x)
        return jac.vjp(jaxjd.weighting.upgrad()(jac.gramian()))

    hlo = update.lower(place(mesh, params), place(mesh, x, "data")).compile()
    moved = sum(one.num_bytes for one in collectives(hlo.as_text()))
    assert moved <= 4 * (m * n // 4 + m * m + n + 2 * m)


def test_some_rows():
    """They are spread as the examples are, if the devices divide their number."""
    params, x, loss = sequences(8)
    mesh = mesh_of_four(AxisType.Explicit)

    @jax.jit
    def taken(params, x):
        return {
            (method, number): jaxjd.jac(loss, in_axes=(None, 0), method=method)(
                params, x
            )._operator.rows_at(jnp.arange(8 - number, 8))
            for method in ("structured", "dense", "chunked")
            for number in (1, 4)
        }

    found = taken(place(mesh, params), place(mesh, x, "data"))
    for (_, number), leaves in found.items():
        names = "data" if number == 4 else None
        for leaf in leaves:
            assert leaf.sharding.spec == PartitionSpec(names, None, None)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
        found,
        taken(params, x),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_precondition_by_rms(kind):
    """Its products need rows, of one parameter after another."""
    params, x, loss = sequences(8)
    mesh = mesh_of_four(kind)
    tx = jaxjd.precondition_by_rms(jaxjd.upgrad())

    @jax.jit
    def update(params, x):
        jac = jaxjd.jac(loss, in_axes=(None, 0))(params, x)
        updates, state = tx.update(jac, tx.init(params), params)
        return updates, state.nu

    found = update(place(mesh, params), place(mesh, x, "data"))
    for actual, expected in zip(found, update(params, x), strict=True):
        for name in params:
            np.testing.assert_allclose(
                actual[name], expected[name], rtol=1e-4, atol=1e-6
            )


@pytest.mark.parametrize("kind", KINDS)
def test_many_rows(kind):
    """A device holds one matrix [m, m], which is gathered once.

    The weights are contracted by pairs, the scales and the biases as rows.
    """
    m = 1024
    params = {"w": normal(0, 8, 16), "b": normal(1, 16), "scale": normal(2, 16)}
    x = normal(3, m, 8)

    def loss(params, x):
        h = jnp.tanh(x @ params["w"] + params["b"])
        return jnp.sum(h * params["scale"])

    @jax.jit
    def gramian(params, x):
        return jaxjd.jac(loss, in_axes=(None, 0))(params, x).gramian()

    mesh = mesh_of_four(kind, (2, 2), ("data", "model"))
    placed = place(mesh, params), place(mesh, x, ("data", "model"))
    compiled = gramian.lower(*placed).compile()
    moved = sum(one.num_bytes for one in collectives(compiled.as_text()))
    # What is summed over devices, made symmetric, and gathered; the rest is the rows.
    assert moved <= 4 * (m * m // 4 + m * m // 4 + m * m + 100 * m)
    assert compiled.memory_analysis().temp_size_in_bytes <= 4 * (2 * m * m + 100 * m)
    found = compiled(*placed)
    np.testing.assert_array_equal(found, found.T)
    np.testing.assert_allclose(found, gramian(params, x), rtol=1e-5, atol=1e-5)


def test_chunks_are_shared_out():
    """A chunk is computed by all devices, each of them its own examples."""
    params, x, loss = sequences()
    mesh = mesh_of_four()

    @jax.jit
    def gramian(params, x):
        make = jaxjd.jac(loss, in_axes=(None, 0), chunk_size=8, contraction="rows")
        return make(params, x).gramian()

    def flops(*args):
        return gramian.lower(*args).compile(NORMAL).cost_analysis()["flops"]

    alone = flops(params, x)
    assert flops(place(mesh, params), place(mesh, x, "data")) < 0.35 * alone


@pytest.mark.parametrize("kind", KINDS)
def test_update_is_spread_as_the_parameters(kind):
    """Rows on the devices of their entries, with examples on all devices."""
    params = {"w": normal(0, 8, 12), "v": normal(1, 12)}
    x = normal(2, 6, 8)

    def losses(params, x):
        h = jnp.tanh(x @ params["w"])
        return {"a": jnp.mean(h @ params["v"]), "b": jnp.mean(h**2)}

    mesh = mesh_of_four(kind, (4,), ("model",))
    placed = {
        "w": place(mesh, params["w"], None, "model"),
        "v": place(mesh, params["v"], "model"),
    }
    x = place(mesh, x)

    @jax.jit
    def update(params, x):
        jac = jaxjd.jac(losses, method="dense")(params, x)
        return jac.vjp(jaxjd.weighting.upgrad()(jac.gramian()))

    if kind == AxisType.Explicit:

        def losses(params, x):
            h = jnp.tanh(x @ params["w"])
            spec = NamedSharding(mesh.abstract_mesh, PartitionSpec(None))
            scores = jnp.matmul(h, params["v"], out_sharding=spec)
            return {"a": jnp.mean(scores), "b": jnp.mean(h**2)}

    with (
        jax.set_mesh(mesh) if hasattr(jax, "set_mesh") else jax.sharding.use_mesh(mesh)
    ):
        compiled = update.lower(placed, x).compile()
    assert "all-gather" not in compiled.as_text()
    found = compiled(placed, x)
    for name in params:
        assert found[name].sharding.is_equivalent_to(
            placed[name].sharding, placed[name].ndim
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name",
    [
        "upgrad",
        "mgda",
        *[
            pytest.param(name, marks=pytest.mark.slow)
            for name in registry.WEIGHTINGS
            if name not in ("upgrad", "mgda")
        ],
    ],
)
def test_weights_of_a_spread_gramian(name, kind):
    rows = normal(0, 7, 5)
    gramian = rows @ rows.T
    mesh = mesh_of_four(kind)
    weighting = registry.weighting(name, 7)

    @jax.jit
    def weights(gramian):
        found, _ = weighting.update(
            gramian, weighting.init(), **registry.extra_args(name, gramian)
        )
        # One array on the mesh, whatever the weights are.
        return found + 0 * gramian.sum()

    padded = np.zeros((8, 8), np.float32)
    padded[:7, :7] = gramian

    @jax.jit
    def of_part(spread):
        return weights(jax.sharding.reshard(spread, whole)[:7, :7])

    whole = NamedSharding(mesh.abstract_mesh, PartitionSpec())
    if kind == AxisType.Auto:
        actual = jax.jit(lambda g: weights(g[:7, :7]))(place(mesh, padded, "data"))
    else:
        actual = of_part(place(mesh, padded, "data"))
    np.testing.assert_allclose(actual, weights(gramian), rtol=2e-4, atol=1e-5)


def test_inside_shard_map():
    """J is that of the losses of one device, and JAX's checks need not be off."""
    params, x, loss = sequences()
    mesh = mesh_of_four()

    def local(params, x):
        losses, weights, update = step(loss, params, x)
        return losses, weights, jax.tree.map(lambda g: g[None], update)

    spec = PartitionSpec("data")
    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=(PartitionSpec(), spec), out_specs=spec
    )
    _, weights, update = jax.jit(mapped)(params, x)
    _, expected, expected_update = jax.jit(functools.partial(step, loss))(
        params, x[4:8]
    )
    np.testing.assert_allclose(weights[4:8], expected, rtol=1e-4, atol=1e-5)
    for name in params:
        np.testing.assert_allclose(
            update[name][1], expected_update[name], rtol=1e-4, atol=1e-5
        )


def test_xla_gets_convolutions_wrong():
    """If this fails, XLA is mended, and `jaxjd/engine/_convolutions.py` may go.

    It must be right with the oldest JAX that is supported.
    """
    kernel, x = normal(0, 3, 3, 2, 4), normal(1, 4, 4, 4, 2)

    def loss(kernel, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(
            x[None], kernel, (1, 1), "SAME", dimension_numbers=numbers
        )
        return jnp.sum(y**2)

    gradients = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))
    right = gradients(kernel, x)
    wrong = gradients(kernel, place(mesh_of_four(), x, "data"))
    assert np.abs(wrong - right).max() > 0.1 * np.abs(right).max()


class TestRefusals:
    def test_two_meshes(self):
        one = mesh_of_four()
        other = mesh_of_four(names=("rows",))
        params, x, loss = sequences()
        with pytest.raises(ValueError, match="must be on one mesh.*data"):
            jaxjd.jac(loss, in_axes=(None, 0))(
                place(one, params), place(other, x, "rows")
            )

    def test_chunks_of_convolutions_that_devices_cannot_share(self):
        mesh = mesh_of_four(shape=(2, 2), names=("data", "model"))
        kernel, x = normal(0, 3, 3, 2, 4), normal(1, 8, 4, 4, 2)

        def loss(kernel, x):
            numbers = ("NHWC", "HWIO", "NHWC")
            y = jax.lax.conv_general_dilated(
                x[None], kernel, (1, 1), "SAME", dimension_numbers=numbers
            )
            return jnp.sum(y**2)

        make = jaxjd.jac(loss, in_axes=(None, 0), chunk_size=4)
        with pytest.raises(ValueError, match="`chunk_size` must .* a multiple of 4"):
            jax.jit(lambda k, x: make(k, x).gramian())(
                place(mesh, kernel), place(mesh, x, "data")
            )

    def test_convolutions_without_a_rule(self):
        """A parameter as the image."""
        mesh = mesh_of_four()

        def loss(image, kernel):
            numbers = ("NHWC", "HWIO", "NHWC")
            y = jax.lax.conv_general_dilated(
                image, kernel, (1, 1), "SAME", dimension_numbers=numbers
            )
            return jnp.sum(y**2)

        image, kernels = normal(0, 1, 4, 4, 2), normal(1, 4, 3, 3, 2, 4)
        with pytest.raises(NotImplementedError, match="wrong per-example gradients"):
            jaxjd.jac(loss, in_axes=(None, 0))(
                place(mesh, image), place(mesh, kernels, "data")
            )


def test_a_state_that_is_spread():
    """The optimizer's state follows the parameters, over a whole training loop."""
    params, x, loss = sequences()
    mesh = mesh_of_four()
    tx = optax.chain(jaxjd.upgrad(), optax.adam(1e-2))

    @jax.jit
    def train(params, state, x):
        def one(carry, _):
            params, state = carry
            losses, jac = jaxjd.value_and_jac(loss, in_axes=(None, 0))(params, x)
            updates, state = tx.update(jac, state, params)
            return (optax.apply_updates(params, updates), state), losses.mean()

        return jax.lax.scan(one, (params, state), length=3)

    placed = place(mesh, params, "data")
    (spread, _), losses = train(placed, tx.init(placed), place(mesh, x, "data"))
    (alone, _), expected = train(params, tx.init(params), x)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    for name in params:
        np.testing.assert_allclose(spread[name], alone[name], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_checkpoint_on_another_mesh(tmp_path):
    """A state is saved from four devices, restored onto two, and trains on."""
    ocp = pytest.importorskip("orbax.checkpoint")
    params, x, loss = sequences()
    tx = optax.chain(jaxjd.upgrad(), optax.adam(1e-2))

    @jax.jit
    def step(params, state, x):
        jac = jaxjd.jac(loss, in_axes=(None, 0))(params, x)
        updates, state = tx.update(jac, state, params)
        return optax.apply_updates(params, updates), state

    four = mesh_of_four()
    two = jax.make_mesh(
        (2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2]
    )
    placed = place(four, params, "data")
    saved = step(placed, tx.init(placed), place(four, x, "data"))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", saved)
        checkpointer.wait_until_finished()
        like = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(
                a.shape,
                a.dtype,
                sharding=NamedSharding(two, PartitionSpec(*["data"] * (a.ndim > 0))),
            ),
            saved,
        )
        restored = checkpointer.restore(tmp_path / "state", like)
    jax.tree.map(np.testing.assert_array_equal, restored, saved)
    on = step(*saved, place(four, x, "data"))
    again = step(*restored, place(two, x, "data"))
    for name in params:
        np.testing.assert_allclose(on[0][name], again[0][name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_flax():
    """nnx and linen need nothing but arrays that are spread."""
    nnx = pytest.importorskip("flax.nnx")
    linen = pytest.importorskip("flax.linen")
    mesh = mesh_of_four()
    x, y = normal(0, 8, 4), normal(1, 8, 2)

    def of_linen(x, y):
        module = linen.Dense(2)
        params = module.init(jax.random.key(0), x[0])

        def loss(params, x, y):
            return jnp.sum((module.apply(params, x) - y) ** 2)

        jac = jaxjd.jac(loss, in_axes=(None, 0, 0))(params, x, y)
        return jaxjd.upgrad().update(jac, jaxjd.upgrad().init(params), params)[0]

    def of_nnx(x, y):
        model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(
            model, optax.chain(jaxjd.upgrad(), optax.sgd(0.1)), wrt=nnx.Param
        )

        def losses(model):
            return jnp.sum((model(x) - y) ** 2, axis=1)

        _, jac = jaxjd.nnx.value_and_jac(losses)(model)
        optimizer.update(model, jac)
        return nnx.state(model, nnx.Param)

    for train in (of_linen, of_nnx):
        compiled = jax.jit(train)
        spread = compiled(*place(mesh, (x, y), "data"))
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
            jax.tree.leaves(spread),
            jax.tree.leaves(compiled(x, y)),
        )
