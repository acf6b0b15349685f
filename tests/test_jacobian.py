"""`value_and_jac` and `Jacobian` agree with Jacobians by brute force."""

import copy
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import jaxjd
from tests import models
from tests.xla import NORMAL

pytestmark = pytest.mark.usefixtures("x64")

# Every method, and chunk sizes that divide the 21 losses of 7 examples or do not, that
# are smaller than one example's losses, or larger than 21.
METHODS = [("dense", None), ("auto", None), ("chunked", None), ("structured", None)]
CHUNKS = [("chunked", size) for size in (1, 2, 5, 8, 21)]
OF_EXAMPLES_ONLY = [("structured", size) for size in (1, 5, 8)]
CHUNKS += [*OF_EXAMPLES_ONLY, ("structured", 40)]
# Both sides are float64; sums of a few hundred terms of order one.
close = functools.partial(assert_allclose, rtol=1e-11, atol=1e-11)


def check_operator(jac: jaxjd.Jacobian, expected: jax.Array) -> None:
    """Check all methods of a Jacobian with respect to `models.parameters()`."""
    m, n = expected.shape
    weights = jax.random.normal(jax.random.key(2), (m,), expected.dtype)
    direction = jax.random.normal(jax.random.key(3), (n,), expected.dtype)
    params = models.parameters()
    tangent = jax.flatten_util.ravel_pytree(params)[1](direction)

    @jax.jit  # Compile once for all methods.
    def compute(jac):
        return (
            jac.gramian(),
            jac.vjp(weights),
            jac.jvp(tangent),
            jac.dense(),
            jac.cross_gramian(jac),
            jac.squared_norms(),
        )

    gramian, combination, change, dense, cross, squared_norms = compute(jac)
    assert jac.num_losses == m
    close(gramian, expected @ expected.T)
    assert_array_equal(gramian, gramian.T)
    close(models.ravel(combination), weights @ expected)
    assert jax.tree.structure(combination) == jax.tree.structure(params)
    close(models.ravel(change), expected @ direction)
    close(models.ravel_rows(dense), expected)
    close(cross, expected @ expected.T)
    close(squared_norms, (expected**2).sum(1))


@pytest.mark.parametrize(
    ("per_example", "method", "chunk_size"),
    [(True, *how) for how in METHODS + CHUNKS]
    + [(False, *how) for how in METHODS + CHUNKS if how not in OF_EXAMPLES_ONLY],
)
def test_task_losses_of_examples(per_example, method, chunk_size):
    params, (x, y) = models.parameters(), models.examples()
    together = models.batched(models.task_losses)
    losses, jac = jaxjd.value_and_jac(
        models.task_losses if per_example else together,
        in_axes=(None, 0, 0) if per_example else None,
        method=method,
        chunk_size=chunk_size,
    )(params, x, y)
    jax.tree.map(close, losses, together(params, x, y))
    check_operator(jac, models.brute_force(together, params, x, y))


def test_one_loss_per_example():
    params, (x, y) = models.parameters(), models.examples()
    losses, jac = jaxjd.value_and_jac(models.loss, in_axes=(None, 0, 0))(params, x, y)
    together = models.batched(models.loss)
    close(losses, together(params, x, y))
    check_operator(jac, models.brute_force(together, params, x, y))


def test_losses_of_any_shape():
    params, (x, y) = models.parameters(), models.examples()

    def losses(params):
        error = models.hidden(params, x) - y
        return [error**2, (error.sum(), error.mean(axis=0)[None])]

    jac = jaxjd.jac(losses)(params)
    assert jac.num_losses == 21 + 1 + 3
    check_operator(jac, models.brute_force(losses, params))
    weights = jax.tree.map(jnp.ones_like, losses(params))
    close(models.ravel(jac.vjp(weights)), models.ravel(jac.vjp(jnp.ones(25))))


def test_a_scalar_loss_is_one_row():
    params, (x, y) = models.parameters(), models.examples()

    def mean(params):
        return models.batched(models.loss)(params, x, y).mean()

    value, jac = jaxjd.value_and_jac(mean)(params)
    assert value.shape == ()
    assert jac.num_losses == 1
    gradient = jax.grad(mean)(params)
    jax.tree.map(close, jac.vjp(jnp.ones(1)), gradient)
    close(jac.gramian(), [[models.ravel(gradient) @ models.ravel(gradient)]])


def test_argnums():
    params, (x, y) = models.parameters(), models.examples()
    together = models.batched(models.loss)
    by_position = jaxjd.jac(lambda y, x, p: together(p, x, y), argnums=2)(y, x, params)
    from_the_end = jaxjd.jac(lambda y, x, p: together(p, x, y), -1)(y, x, params)
    expected = models.brute_force(together, params, x, y)
    check_operator(by_position, expected)
    check_operator(from_the_end, expected)
    # Arguments are returned in the order of `argnums`.
    both = jaxjd.jac(lambda y, x, p: together(p, x, y), argnums=(2, 1))(y, x, params)
    wrt_x = jax.jacrev(together, argnums=1)(params, x, y).reshape(7, -1)
    rows = both.dense()
    close(models.ravel_rows(rows[0]), expected)
    close(rows[1].reshape(7, -1), wrt_x)
    close(both.gramian(), expected @ expected.T + wrt_x @ wrt_x.T)


@pytest.mark.parametrize("per_example", [True, False])
def test_auxiliary_output(per_example):
    params, (x, y) = models.parameters(), models.examples()

    def loss(params, x, y):
        return models.loss(params, x, y), {"hidden": models.hidden(params, x)}

    fun = loss if per_example else models.batched(loss)
    in_axes = (None, 0, 0) if per_example else None
    transform = functools.partial(jaxjd.value_and_jac, in_axes=in_axes, has_aux=True)
    (losses, aux), jac = transform(fun)(params, x, y)
    expected_losses, expected_aux = models.batched(loss)(params, x, y)
    close(losses, expected_losses)
    close(aux["hidden"], expected_aux["hidden"])
    jac_only, aux_again = jaxjd.jac(fun, in_axes=in_axes, has_aux=True)(params, x, y)
    close(aux_again["hidden"], expected_aux["hidden"])
    close(jac.gramian(), jac_only.gramian())


def test_arguments_that_are_no_arrays_pass_through():
    params, (x, y) = models.parameters(), models.examples()

    def losses(params, x, y, power, which, activation):
        assert power == 3
        assert which == "cube"
        return jnp.sum(activation(models.hidden(params, x) - y) ** power, axis=1)

    args = (params, x, y, 3, "cube", jnp.sin)
    jac = jaxjd.jac(losses)(*args)
    expected = jax.jacrev(lambda p: losses(p, *args[1:]))(params)
    check_operator(jac, models.matrix(expected, params))


@pytest.mark.parametrize("in_axes", [(None, 1, 0), (None, -1, 0)])
def test_examples_along_another_axis(in_axes):
    params, (x, y) = models.parameters(), models.examples()
    for chunk_size in (None, 4):
        jac = jaxjd.jac(models.loss, in_axes=in_axes, chunk_size=chunk_size)(
            params, x.T, y
        )
        expected = models.brute_force(models.batched(models.loss), params, x, y)
        check_operator(jac, expected)


def test_prefixes_of_arguments_in_in_axes():
    params, (x, y) = models.parameters(), models.examples()
    shift = jnp.ones(3)

    def loss(params, batch, constants):
        return models.loss(params, batch["x"], batch["y"] + constants["shift"])

    args = (params, {"x": x, "y": y}, {"shift": shift, "names": "not an array"})
    expected = models.brute_force(
        models.batched(models.loss), params, x, y + shift[None]
    )
    check_operator(jaxjd.jac(loss, in_axes=(None, 0, None))(*args), expected)
    partly = (None, {"x": 0, "y": 0}, None)
    check_operator(jaxjd.jac(loss, in_axes=partly)(*args), expected)


def test_parameters_that_no_loss_depends_on():
    x, _ = models.examples()
    params = {"used": jnp.ones(5), "unused": jnp.ones((2, 2))}
    jac = jaxjd.jac(lambda p: jnp.tanh(x @ p["used"]))(params)
    assert not jac.dense()["unused"].any()
    assert not jac.vjp(jnp.ones(7))["unused"].any()


def test_restrict():
    params, (x, y) = models.parameters(), models.examples()
    together = models.batched(models.task_losses)
    expected = models.brute_force(together, params, x, y)[:, :18]
    for method in ("dense", "chunked", "structured"):
        jac = jaxjd.jac(models.task_losses, in_axes=(None, 0, 0), method=method)(
            params, x, y
        )
        # A prefix of the parameters, as optax.masked takes it.
        part = jac.restrict({"hidden": True, "scale": False})
        close(part.gramian(), expected @ expected.T)
        update = part.vjp(jnp.ones(21))
        assert update["scale"] == optax.MaskedNode()
        close(models.ravel(update), expected.sum(0))
        close(models.ravel_rows(part.dense()), expected)
        direction = jnp.arange(18.0)
        tangent = {"hidden": (direction[:15].reshape(5, 3), direction[15:]), "scale": 0}
        close(models.ravel(part.jvp(tangent)), expected @ direction)
        # Restrict again, to part of the remaining leaves.
        bias = part.restrict({"hidden": (False, True), "scale": True})
        close(bias.gramian(), expected[:, 15:] @ expected[:, 15:].T)
        with pytest.raises(ValueError, match="`wrt` must keep at least one of"):
            part.restrict({"hidden": False, "scale": True})
        with pytest.raises(ValueError, match="`wrt` must be structured like"):
            part.restrict({"hidden": True})


def test_cross_gramian_of_two_batches():
    params = models.parameters()
    together = models.batched(models.loss)
    (x1, y1), (x2, y2) = models.examples(7), models.examples(4)
    first, second = (
        models.brute_force(together, params, x, y) for x, y in [(x1, y1), (x2, y2)]
    )
    for chunk_size in (None, 4):
        jac = functools.partial(
            jaxjd.jac, models.loss, in_axes=(None, 0, 0), chunk_size=chunk_size
        )
        dense = jac(method="dense", chunk_size=None)(params, x2, y2)
        cross = jac()(params, x1, y1).cross_gramian(dense)
        close(cross, first @ second.T)
    other = jaxjd.jac(lambda p: p)(jnp.ones(2))
    with pytest.raises(
        ValueError, match="`other` must be taken with respect to the same"
    ):
        jac()(params, x1, y1).cross_gramian(other)


class TestBoundaries:
    """A Jacobian is a pytree: transformations do not change its value."""

    def jac(self, x, y, params):
        return jaxjd.jac(models.loss, in_axes=(None, 0, 0))(params, x, y)

    def expected(self, x, y, params):
        jacobian = models.brute_force(models.batched(models.loss), params, x, y)
        return jacobian @ jacobian.T

    def test_leaves_jit_with_closed_over_tracers(self):
        params, (x, y) = models.parameters(), models.examples()

        @jax.jit
        def make(params, x, y):
            scaled = 2 * x
            labels = jnp.argmax(y, axis=1)  # Integer tracers must not leak either.

            def losses(params):
                hidden = models.hidden(params, scaled)
                return jnp.take_along_axis(hidden, labels[:, None], axis=1)[:, 0]

            return jaxjd.jac(losses)(params)

        jac = make(params, x, y)

        def plain(params):
            return models.hidden(params, 2 * x)[jnp.arange(7), jnp.argmax(y, axis=1)]

        check_operator(jac, models.brute_force(plain, params))

    def test_is_carried_by_scan(self):
        params, (x, y) = models.parameters(), models.examples()
        batches = jnp.stack([x, 2 * x, 3 * x])

        def step(jac, batch):
            return self.jac(batch, y, params), jac.gramian()

        last, gramians = jax.lax.scan(step, self.jac(x, y, params), batches)
        close(gramians[2], self.expected(2 * x, y, params))
        close(last.gramian(), self.expected(3 * x, y, params))

    def test_does_not_compile_again_for_the_same_function(self):
        params, (x, y) = models.parameters(), models.examples()
        traces = []

        @jax.jit
        def gramian(jac):
            traces.append(jac)
            return jac.gramian()

        close(gramian(self.jac(x, y, params)), self.expected(x, y, params))
        close(gramian(self.jac(2 * x, y, params)), self.expected(2 * x, y, params))
        assert len(traces) == 1

    def test_other_functions_are_not_confused(self):
        params, (x, y) = models.parameters(), models.examples()
        gramian = jax.jit(lambda jac: jac.gramian())
        for power in (1.0, 2.0):

            def losses(p, power=power):
                return models.batched(models.loss)(p, x, y) ** power

            gradients = models.brute_force(losses, params)
            close(gramian(jaxjd.jac(losses)(params)), gradients @ gradients.T)

    def test_is_donated(self):
        params, (x, y) = models.parameters(), models.examples()
        donate = jax.jit(lambda jac: jac.vjp(jnp.ones(7)), donate_argnums=0)
        expected = models.brute_force(models.batched(models.loss), params, x, y).sum(0)
        jac = self.jac(x, y, params)
        with pytest.warns(UserWarning, match="donated buffers were not usable"):
            update = donate(jac)  # No output can reuse the data's buffers.
        close(models.ravel(update), expected)

    def test_vmap_over_batches(self):
        params, (x, y) = models.parameters(), models.examples()
        xs = jnp.stack([x, 2 * x])
        jacs = jax.vmap(lambda x: self.jac(x, y, params))(xs)
        gramians = jax.vmap(lambda jac: jac.gramian())(jacs)
        close(gramians[1], self.expected(2 * x, y, params))
        inside = jax.vmap(lambda x: self.jac(x, y, params).gramian())(xs)
        close(inside, gramians)

    def test_gradient_through_a_gramian(self):
        params, (x, y) = models.parameters(), models.examples()

        def conflict(params):
            return self.jac(x, y, params).gramian().sum()

        def by_hand(params):
            gradient = jax.grad(lambda p: models.batched(models.loss)(p, x, y).sum())
            return sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient(params)))

        jax.tree.map(close, jax.grad(conflict)(params), jax.grad(by_hand)(params))

    def test_sharded_examples(self):
        params, (x, y) = models.parameters(), models.examples(8)
        mesh = jax.sharding.Mesh(jax.devices(), ("batch",))
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
        xs, ys = jax.device_put((x, y), sharding)
        for chunk_size in (None, 4):

            @jax.jit
            def gramian(params, x, y, chunk_size=chunk_size):
                make = jaxjd.jac(
                    models.loss, in_axes=(None, 0, 0), chunk_size=chunk_size
                )
                return make(params, x, y).gramian()

            close(gramian(params, xs, ys), self.expected(x, y, params))


def test_a_function_with_its_own_backward_pass_only():
    """`jvp` must not need forward mode, which a `jax.custom_vjp` lacks."""

    @jax.custom_vjp
    def cube(x):
        return x**3

    cube.defvjp(lambda x: (x**3, x), lambda x, g: (3 * x**2 * g,))
    x, _ = models.examples()
    params = jnp.arange(5.0) / 5
    expected = jax.jacrev(lambda p: (x @ p) ** 3)(params)
    for chunk_size in (None, 3):
        jac = jaxjd.jac(lambda p: cube(x @ p), chunk_size=chunk_size)(params)
        close(jac.gramian(), expected @ expected.T)
        close(jac.jvp(params), expected @ params)


@pytest.mark.parametrize("method", ["dense", "chunked", "structured"])
def test_tangents_and_weights_of_other_dtypes(method):
    """A direction in float32, as of an average, beside parameters in bfloat16."""
    params = {"a": jnp.arange(3, dtype=jnp.bfloat16), "b": jnp.bfloat16(2.0)}
    jac = jaxjd.jac(lambda p: (p["a"] * p["b"], p["b"] ** 2), method=method)(params)
    for dtype in (jnp.float32, jnp.int32, jnp.bfloat16):
        direction = {"a": jnp.ones(3, dtype), "b": jnp.ones((), dtype)}
        of_a, of_b = jac.jvp(direction)
        np.testing.assert_array_equal(of_a.astype(float), [2, 3, 4])
        np.testing.assert_array_equal(of_b.astype(float), 4)
        update = jac.vjp((jnp.ones(3, dtype), jnp.ones((), jnp.float32)))
        np.testing.assert_array_equal(update["a"].astype(float), [2, 2, 2])
        np.testing.assert_array_equal(update["b"].astype(float), 3 + 4)


def test_low_precision_accumulates_in_float32():
    """The Gramian of bfloat16 rows has no rounding error except that of the rows."""
    x = jax.random.normal(jax.random.key(0), (6, 4096), jnp.bfloat16)
    params = jnp.zeros(4096, jnp.bfloat16)
    for method in ("dense", "chunked"):
        jac = jaxjd.jac(lambda p: x @ p, method=method)(params)
        gramian = jac.gramian()
        assert gramian.dtype == jnp.float32
        rows = x.astype(jnp.float64)
        # 4096 products summed in float32: eps * sqrt(4096) = 4e-6.
        assert_allclose(gramian, rows @ rows.T, rtol=1e-5, atol=1e-5 * 4096)
        assert jac.vjp(jnp.ones(6)).dtype == jnp.bfloat16


def test_the_forward_pass_is_compiled_once():
    """Losses, Gramian and update in one jit share the forward pass."""
    params, (x, y) = models.parameters(), models.examples()

    def step(params, x, y):
        losses, jac = jaxjd.value_and_jac(models.loss, in_axes=(None, 0, 0))(
            params, x, y
        )
        return losses, jac.vjp(jac.gramian().sum(0))

    text = jax.jit(step).lower(params, x, y).compile(NORMAL).as_text()
    assert text.count(" tanh(") == 1


def test_chunks_bound_the_memory():
    """Temporary memory grows with `chunk_size`, not with the number of losses."""

    def temporary(m: int, chunk_size: int | None) -> int:
        data = jax.random.normal(jax.random.key(0), (m, 20), jnp.float32)

        def losses(params):
            return data @ jnp.tanh(params).sum(0)

        def step(params):
            jac = jaxjd.jac(losses, chunk_size=chunk_size)(params)
            return jac.vjp(jac.gramian().sum(0))

        params = jnp.ones((10_000, 20), jnp.float32)
        compiled = jax.jit(step).lower(params).compile(NORMAL)
        return compiled.memory_analysis().temp_size_in_bytes

    row = 4 * 10_000 * 20
    assert temporary(128, None) > 128 * row
    # Two blocks of 4 rows, intermediate derivatives, and a few more n-vectors.
    assert temporary(128, 8) < 32 * row
    assert temporary(256, 8) < 1.1 * temporary(64, 8)


def test_chunks_bound_the_memory_of_activations():
    """For a per-example function, chunks bound the memory of the forward pass too."""
    width = 20_000

    def loss(params, x):
        return jnp.sum(jnp.tanh(jnp.sin(x * params)))  # Stores `width` numbers.

    def temporary(m: int, chunk_size: int | None) -> int:
        def step(params, x):
            make = jaxjd.jac(loss, in_axes=(None, 0), chunk_size=chunk_size)
            jac = make(params, x)
            return jac.vjp(jac.gramian().sum(0))

        params = jnp.ones(width, jnp.float32)
        x = jnp.ones((m, 1), jnp.float32)
        compiled = jax.jit(step).lower(params, x).compile(NORMAL)
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(128, None) > 128 * 4 * width
    # Only the Gramian and a copy of it grow.
    assert temporary(256, 8) - temporary(64, 8) < 2 * 4 * 256**2


@pytest.mark.parametrize("batch", [16, 2048])
def test_losses_of_tasks_need_no_rows_where_parameters_outweigh_activations(batch):
    depth, width, m = 4, 128, 4

    def losses(params, x):
        for weight in params["trunk"]:
            x = jnp.tanh(x @ weight)
        if batch == 16:
            return jnp.mean((x @ params["heads"]) ** 2, axis=0)
        return [jnp.mean((x @ params["heads"][:, i]) ** 2) for i in range(m)]

    def temporary(method: str) -> int:
        def step(params, x):
            jac = jaxjd.jac(losses, method=method)(params, x)
            return jac.vjp(jac.gramian()[0])

        trunk = [jnp.ones((width, width), jnp.float32)] * depth
        params = {"trunk": trunk, "heads": jnp.ones((width, m), jnp.float32)}
        x = jnp.ones((batch, width), jnp.float32)
        compiled = jax.jit(step).lower(params, x).compile(NORMAL)
        return compiled.memory_analysis().temp_size_in_bytes

    if batch == 16:  # The memory is about m times the largest leaf.
        assert temporary("auto") == temporary("structured")
        assert temporary("auto") < m * 4 * width**2 < temporary("chunked")
    else:
        # The rows, which are kept, are small beside the activations.
        assert temporary("auto") == temporary("dense")
        assert temporary("auto") < 1.1 * temporary("structured")


class TestContraction:
    @pytest.mark.parametrize(
        "contraction",
        ["pairs", "rows", {"hidden": ("pairs", "rows"), "scale": "auto"}],
    )
    @pytest.mark.parametrize("chunk_size", [None, 3])
    def test_any_choice_is_exact(self, contraction, chunk_size):
        params, (x, y) = models.parameters(), models.examples()
        jac = jaxjd.jac(
            models.loss,
            in_axes=(None, 0, 0),
            chunk_size=chunk_size,
            contraction=contraction,
        )(params, x, y)
        together = models.batched(models.loss)
        check_operator(jac, models.brute_force(together, params, x, y))

    @pytest.mark.parametrize("way", ["pairs", "rows"])
    def test_the_choice_is_explained(self, way):
        params, (x, y) = models.parameters(), models.examples()
        explanation = jaxjd.explain(
            models.loss,
            in_axes=(None, 0, 0),
            contraction={"hidden": way, "scale": "auto"},
        )(params, x, y)
        ways = {of.name: of.contraction for of in explanation.parameters.entries}
        assert ways["['hidden'][0]"] == way
        assert ways["['hidden'][1]"] == "rows"  # A bias has no other way.

    def test_refused(self):
        params, (x, y) = models.parameters(), models.examples()
        with pytest.raises(ValueError, match="`contraction` .*'pairs' for method='den"):
            jaxjd.jac(models.loss, method="dense", contraction="pairs")
        make = functools.partial(jaxjd.jac, models.loss, in_axes=(None, 0, 0))
        with pytest.raises(ValueError, match="must be one of 'auto', .*Got 'gram'"):
            make(contraction="gram")(params, x, y)
        with pytest.raises(ValueError, match="`contraction` must be structured like"):
            make(contraction={"hidden": "rows"})(params, x, y)

    def test_a_choice_makes_the_method_structured(self):
        jac = jaxjd.jac(lambda p: p @ jnp.ones((2, 3)), contraction="rows")
        assert "method='structured'" in repr(jac(jnp.ones(2)))


class TestErrors:
    def test_method(self):
        message = "`method` must be one of 'auto', 'dense', 'chunked', 'str.*Got 'fast'"
        with pytest.raises(ValueError, match=message):
            jaxjd.jac(models.loss, method="fast")

    @pytest.mark.parametrize(("size", "error"), [(0, ValueError), (2.5, TypeError)])
    def test_chunk_size(self, size, error):
        with pytest.raises(error, match=f"`chunk_size` must be .* Got {size}"):
            jaxjd.jac(models.loss, chunk_size=size)

    def test_chunks_of_rows_that_are_kept(self):
        with pytest.raises(ValueError, match='"dense" all rows are kept.*Got 2. Give'):
            jaxjd.jac(models.loss, method="dense", chunk_size=2)

    @pytest.mark.parametrize(("memory", "error"), [(-1, ValueError), (1e9, TypeError)])
    def test_memory(self, memory, error):
        with pytest.raises(error, match=f"`memory` must .*Got {memory}"):
            jaxjd.explain(models.loss, memory=memory)

    @pytest.mark.parametrize("fun", [3.0, {"a": jnp.ones(2)}])
    def test_fun(self, fun):
        for make in (jaxjd.value_and_jac, jaxjd.explain):
            with pytest.raises(TypeError, match="`fun` must be the function that retu"):
                make(fun)

    @pytest.mark.parametrize("argnums", ["p", 0.5, None, ("p",), {"w": jnp.ones(2)}])
    def test_parameters_in_the_place_of_argnums(self, argnums):
        with pytest.raises(TypeError, match=r"`argnums` must be the pos.*fun.\(params"):
            jaxjd.jac(lambda p: p, argnums)(jnp.ones(2))

    def test_argnums_of_numpy(self):
        jac = jaxjd.jac(lambda x, p: x * p, np.int64(1))(1.0, jnp.ones(2))
        close(jac.dense(), np.eye(2))

    @pytest.mark.parametrize("leaf", ["text", object(), np.array("text"), float])
    def test_losses_and_metrics_that_are_no_arrays(self, leaf):
        with pytest.raises(TypeError, match=r"losses that `fun` ret.* Got .* at \[1\]"):
            jaxjd.jac(lambda p: (p, leaf))(jnp.ones(2))
        with pytest.raises(TypeError, match=r"auxiliary output .* Got .* at \['a'\]"):
            jaxjd.jac(lambda p: (p, {"a": leaf}), has_aux=True)(jnp.ones(2))

    @pytest.mark.parametrize("axis", ["0", 0.5, True])
    def test_in_axes_that_are_no_integers(self, axis):
        with pytest.raises(TypeError, match=f"hold integers and None. Got {axis!r} fo"):
            jaxjd.jac(lambda p, x: p @ x, in_axes=(None, axis))(jnp.ones(2), np.eye(2))

    def test_products_with_what_is_not_real(self):
        params = {"a": jnp.ones(3), "b": jnp.ones(2)}
        jac = jaxjd.jac(lambda p: p)(params)
        with pytest.raises(
            TypeError, match="`weights` must hold real numbers. Got str"
        ):
            jac.vjp("mean")
        with pytest.raises(TypeError, match=r"`weights` .* Got complex\w+ at \['b'\]"):
            jac.vjp(params | {"b": np.ones(2, complex)})
        with pytest.raises(TypeError, match=r"`tangent` .* Got str at \['a'\]"):
            jac.jvp(params | {"a": "text"})
        for wrt in ("a", lambda p: True, {"a": "x", "b": 1}, jnp.array([True, False])):
            with pytest.raises(TypeError, match="`wrt` must hold bools, .* Got"):
                jac.restrict(wrt)

    def test_chunks_of_all_losses_without_rows(self):
        make = functools.partial(jaxjd.jac, lambda p: p, method="structured")
        with pytest.raises(ValueError, match="`chunk_size` needs a function of one ex"):
            make(chunk_size=2)(jnp.ones(3))
        assert make(chunk_size=3)(jnp.ones(3)).num_losses == 3

    def test_argnums(self):
        with pytest.raises(ValueError, match="`argnums` must be positions among the 1"):
            jaxjd.jac(lambda p: p, argnums=1)(jnp.ones(2))
        with pytest.raises(
            ValueError, match="`argnums` must name one or more different"
        ):
            jaxjd.jac(lambda p: p, argnums=(0, 0))(jnp.ones(2))

    def test_no_parameters(self):
        with pytest.raises(
            ValueError, match="Argument 0 of `fun` must hold parameters"
        ):
            jaxjd.jac(lambda p: jnp.ones(2))({})

    @pytest.mark.parametrize("leaf", [np.arange(3), np.ones(2, complex), "text"])
    def test_parameters_of_another_type(self, leaf):
        with pytest.raises(TypeError, match=r"must be real floating-point.*\['w'\]"):
            jaxjd.jac(lambda p: jnp.ones(2))({"w": leaf, "b": jnp.ones(3)})

    @pytest.mark.parametrize("dtype", ["int32", "bool", "complex128"])
    def test_losses_of_another_type(self, dtype):
        def losses(params):
            return {"a": params, "b": params.astype(dtype)}

        with pytest.raises(TypeError, match=rf"real floating.*Got {dtype} at \['b'\]"):
            jaxjd.jac(losses)(jnp.ones(3))

    def test_no_losses(self):
        with pytest.raises(ValueError, match="`fun` must return at least one loss"):
            jaxjd.jac(lambda p: p[:0])(jnp.ones(3))

    def test_no_pair(self):
        with pytest.raises(TypeError, match="must return a pair .losses, aux.. Got"):
            jaxjd.jac(lambda p: p, has_aux=True)(jnp.ones(3))

    @pytest.mark.parametrize(
        ("in_axes", "message"),
        [
            (0, "`in_axes` must have one entry for each of the 3 arguments"),
            ((None, 0), "`in_axes` must have one entry for each of the 3 arguments"),
            ((0, 0, 0), "`in_axes` must be None for argument 0, which is different"),
            (({"hidden": 0}, 0, 0), "`in_axes` must be None for argument 0, which is"),
            ((None, None, None), "`in_axes` must give the axis of the examples"),
            ((None, 0, 2), "examples of argument 2 on axis 2.*Got shape .7, 3."),
            ((None, 0, 1), "same number of examples. Got .*argument 1.: 7, .*2.: 3"),
            (
                (None, {"x": 0}, 0),
                "`in_axes` must be a prefix of the arguments. For arg",
            ),
        ],
    )
    def test_in_axes(self, in_axes, message):
        params, (x, y) = models.parameters(), models.examples()
        with pytest.raises(ValueError, match=message):
            jaxjd.jac(models.loss, in_axes=in_axes)(params, x, y)

    def test_no_array_to_map(self):
        with pytest.raises(
            ValueError, match="examples of argument 1 on axis 0.*Got 2.0"
        ):
            jaxjd.jac(lambda p, s: p * s, in_axes=(None, 0))(jnp.ones(()), 2.0)

    @pytest.mark.parametrize(
        "weights", [np.ones(6), np.ones((7, 1)), {"fit": np.ones(7)}]
    )
    def test_weights(self, weights):
        params, (x, y) = models.parameters(), models.examples()
        jac = jaxjd.jac(models.loss, in_axes=(None, 0, 0))(params, x, y)
        with pytest.raises(ValueError, match=r"`weights` must have shape \(7,\) or be"):
            jac.vjp(weights)

    def test_tangent(self):
        params, (x, y) = models.parameters(), models.examples()
        jac = jaxjd.jac(models.loss, in_axes=(None, 0, 0))(params, x, y)
        with pytest.raises(
            ValueError, match="`tangent` must be structured like the par"
        ):
            jac.jvp({"hidden": params["hidden"]})
        with pytest.raises(
            ValueError, match="`tangent` must have the shapes of the par"
        ):
            jac.jvp(params | {"scale": jnp.ones(2)})


def test_nan_in_a_loss_stays():
    params, (x, y) = models.parameters(), models.examples()
    x = x.at[3, 0].set(jnp.nan)
    losses, jac = jaxjd.value_and_jac(models.loss, in_axes=(None, 0, 0))(params, x, y)
    assert_array_equal(jnp.isnan(losses), jnp.arange(7) == 3)
    assert jnp.isnan(jac.gramian()[3]).all()
    assert jnp.isnan(models.ravel(jac.vjp(jnp.ones(7)))).any()


def test_keyword_arguments_are_forwarded():
    """Arrays and flags reach whole-batch functions and per-example functions."""
    params, (x, y) = models.parameters(), models.examples()

    def loss(params, x, y, *, scale, squared=True):
        value = models.loss(params, x, y) if squared else models.hidden(params, x).sum()
        return value * scale

    together = models.batched(functools.partial(loss, scale=2.0, squared=False))
    expected = models.brute_force(together, params, x, y)
    scale = {"scale": jnp.array(2.0)}
    for jac in (
        jaxjd.jac(loss, in_axes=(None, 0, 0))(params, x, y, squared=False, **scale),
        jaxjd.jac(lambda params, *, x, y: together(params, x, y))(params, x=x, y=y),
    ):
        close(models.ravel_rows(jac.dense()), expected)
    with pytest.raises(ValueError, match="`argnums` must be positions among the 0 pos"):
        jaxjd.jac(models.loss)(params=params, x=x, y=y)


def test_copies_and_pickles():
    params, (x, y) = models.parameters(), models.examples()
    for method in ("dense", "structured"):
        jac = jaxjd.jac(models.loss, in_axes=(None, 0, 0), method=method)(params, x, y)
        for same in (copy.copy(jac), copy.deepcopy(jac)):
            assert_array_equal(same.gramian(), jac.gramian())
            assert jax.tree.structure(same) == jax.tree.structure(jac)
        with pytest.raises(TypeError, match="cannot be pickled: it holds the traced"):
            pickle.dumps(jac)


def test_operators_that_it_lacks():
    params, (x, y) = models.parameters(), models.examples()
    jac = jaxjd.jac(models.loss, in_axes=(None, 0, 0))(params, x, y)
    for product in (lambda: jac @ params, lambda: np.ones(7) @ jac):
        with pytest.raises(TypeError, match=r"no operator `@`.*jac.jvp.*jac.vjp"):
            product()
    with pytest.raises(TypeError, match="`other` must be a jaxjd.Jacobian. Got dict"):
        jac.cross_gramian(params)
    for name in ("guard", "rows", "losses", "parameters"):
        assert not hasattr(jac, name)


def test_errors_of_a_per_example_function_say_what_it_was_called_with():
    params, (x, y) = models.parameters(), models.examples()

    def of_batch(params, x, y):
        return models.hidden(params, x).sum(axis=x.shape[1] - 4)

    with pytest.raises(IndexError) as caught:
        jaxjd.jac(of_batch, in_axes=(None, 0, 0))(params, x, y)
    (note,) = [n for n in caught.value.__notes__ if "`in_axes`" in n]
    assert "called with ONE example" in note
    assert "[5], [3]" in note
    assert "leave `in_axes` out" in note
    with pytest.raises(ZeroDivisionError) as caught:
        jaxjd.jac(lambda p: p / 0 + 1 // 0)(jnp.ones(()))
    assert "`in_axes`" not in "".join(getattr(caught.value, "__notes__", []))


class TestExplain:
    """`explain` says which method is used, and why."""

    @pytest.mark.parametrize(
        ("how", "method", "reason"),
        [
            ({"in_axes": (None, 0, 0)}, "structured", "is written for one example"),
            ({}, "structured", "forming no rows takes less time"),
            ({"memory": 0}, "chunked", "needs least memory"),
            ({"chunk_size": 2}, "chunked", "and `chunk_size` is given"),
            ({"contraction": "rows"}, "structured", "`contraction` is given"),
            ({"method": "dense"}, "dense", "it was asked for"),
            ({"method": "structured"}, "structured", "it was asked for"),
        ],
    )
    def test_the_method_and_its_reason(self, how, method, reason):
        params, (x, y) = models.parameters(), models.examples(64)
        fun = (
            models.task_losses
            if "in_axes" in how
            else models.batched(models.task_losses)
        )
        explanation = jaxjd.explain(fun, **how)(params, x, y)
        assert explanation.method == method
        assert reason in explanation.reason
        assert explanation.num_losses == 192
        assert explanation.losses == {"fit": [64], "moments": [64, 2]}
        text = str(explanation)
        pieces = (1, 2) if "in_axes" in how else (64, 128)
        assert text.startswith(
            "192 losses, {'fit': [64], 'moments': [64, 2]}, pulled back in 2 pieces of "
            f"{pieces}\n"
        )
        assert f"method: {method}, because {explanation.reason}\n" in text
        assert "['hidden'][0]" in text
        jac = jaxjd.jac(fun, **how)(params, x, y)
        assert f"method={method!r}" in repr(jac)

    def test_parameters_that_outweigh_the_activations(self):
        def losses(p, x):
            return jnp.tanh(x @ p[0]) @ p[1]

        square = jnp.ones((64, 64))
        explanation = jaxjd.explain(losses)((square, square), jnp.ones((2, 64)))
        assert explanation.method == "structured"
        assert "forming no rows takes less time" in explanation.reason

    def test_the_slower_method_is_taken_if_only_it_fits(self):
        def heads(p, x):
            for weight in p["trunk"]:
                x = jnp.tanh(x @ weight)
            return [jnp.sum((x @ head) ** 2) for head in p["heads"]]

        trunk = [jnp.ones(shape) for shape in ((784, 512), (512, 512), (512, 512))]
        two = {"trunk": trunk, "heads": [jnp.ones((512, 10))] * 2}

        def method(memory):
            explanation = jaxjd.explain(heads, memory=memory)(two, jnp.ones((256, 784)))
            return explanation.method

        rows = 2 * 4 * (784 + 512 + 512) * 512 + 4 * 2 * 5120
        assert method(rows) == "dense"
        # The cotangents of 256 examples are half as large.
        assert method(rows - 1) == "structured"

    def test_a_metric_that_is_no_loss_shows(self):
        """Without `has_aux`, every returned value counts as a loss."""

        def losses_and_metric(p):
            return p**2, {"accuracy": jnp.float32(0.5)}

        explanation = jaxjd.explain(losses_and_metric)(jnp.ones(3))
        assert "4 losses, ([3], {'accuracy': []})" in str(explanation)
        jac = jaxjd.jac(losses_and_metric)(jnp.ones(3))
        assert "losses=([3], {'accuracy': []})" in repr(jac)


def test_repr_says_what_it_is():
    params, (x, y) = models.parameters(), models.examples()
    jac = jaxjd.jac(models.loss, in_axes=(None, 0, 0))(params, x, y)
    assert repr(jac) == (
        "Jacobian(num_losses=7, losses=[7], parameters={'hidden': ([5, 3], [3]), "
        "'scale': []}, method='structured')"
    )
