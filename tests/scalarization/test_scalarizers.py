"""What every scalarizer must do, as a function of the losses and as an aggregator."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.ad_checkpoint import checkpoint_name
from numpy.testing import assert_allclose, assert_array_equal

import jaxjd
from tests.weighting import registry
from tests.weighting.registry import OF_LOSSES
from tests.xla import NORMAL

M, N = 4, 6
ALSO_WEIGHTINGS = ("constant", "mean", "random", "sum")
every = pytest.mark.parametrize("name", [*OF_LOSSES, *ALSO_WEIGHTINGS])
of_losses = pytest.mark.parametrize("name", OF_LOSSES)
LEARNED = ("famo", "gradnorm", "imtl_l", "uw")
ROWS = jax.random.normal(jax.random.key(0), (M, N))
LOSSES = registry.some_losses(M)


def extra(losses=LOSSES, dtype=None):
    """What the updates of some scalarizers need, as functions of the losses."""
    return {
        "losses_after": 0.9 * losses,
        "squared_norms": jnp.square(ROWS[: losses.size]).sum(1).astype(dtype),
    }


def update(name, m=M):
    """The `init`, and the compiled scalar, its gradient and the state."""
    return compiled(name, m)


@functools.cache
def compiled(name, m):
    scalarizer = registry.scalarizer(name, m)

    def both(losses, state, mask):
        def scalar(losses):
            return scalarizer.update(losses, state, mask=mask, **extra(losses))

        return jax.value_and_grad(scalar, has_aux=True)(losses)

    return scalarizer.init, jax.jit(both)


def first(name, losses=LOSSES, mask=None):
    """The scalar of a first step and its gradient."""
    init, both = update(name, losses.size)
    mask = jnp.ones(losses.size, bool) if mask is None else mask
    (value, _), gradient = both(losses, init(), mask)
    return value, gradient


@every
def test_the_gradient_is_the_weights_of_the_aggregator(name):
    """Over three steps, in which what is learned changes."""
    tx = registry.transformation(name, M)
    init, both = update(name)
    mine, state, params = init(), tx.init(ROWS[0]), ROWS[0]
    mask = jnp.array([True, True, False, True])
    step = jax.jit(
        lambda losses, state: tx.update(
            ROWS, state, params, losses=losses, mask=mask, losses_after=0.9 * losses
        )
    )
    for scale in (1.0, 0.5, 0.7):
        (_, mine), gradient = both(scale * LOSSES, mine, mask)
        result, state = step(scale * LOSSES, state)
        assert_allclose(result, gradient @ ROWS, rtol=1e-5, atol=1e-6)
    jax.tree.map(same, mine, state.weighting)


def same(one, other):
    if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
        one, other = jax.random.key_data(one), jax.random.key_data(other)
    assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def equations(jaxpr):
    """All equations of a jaxpr, with those of the functions that it calls."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def network(key=0):
    keys = jax.random.split(jax.random.key(key), 3)
    trunk = [jax.random.normal(k, (32, 32)) / 6 for k in keys[:2]]
    return {"trunk": trunk, "heads": jax.random.normal(keys[2], (M, 32)) / 6}


def task_losses(params, x):
    for weights in params["trunk"]:
        x = jnp.tanh(x @ weights)
    return jnp.stack([jnp.mean((x @ head - 2) ** 2) for head in params["heads"]])


@every
def test_no_gramian_is_computed(name):
    """Nothing is summed over the parameters, as every product of two rows is."""
    if name == "gradnorm":
        pytest.skip("It needs the norms: see below.")
    assert not sums_over_parameters(registry.transformation(name, M))


def test_a_gramian_would_be_seen():
    assert sums_over_parameters(jaxjd.upgrad())
    assert sums_over_parameters(jaxjd.gradnorm(num_losses=M))


def sums_over_parameters(tx):
    """The equations of an update that map something of 1000 parameters to less."""
    rows = jnp.ones((M, 1000))
    jaxpr = jax.make_jaxpr(
        lambda rows, state: tx.update(
            rows, state, rows[0], losses=LOSSES, losses_after=LOSSES
        )
    )(rows, tx.init(rows[0]))

    def is_large(variable):
        return 1000 in getattr(variable.aval, "shape", ())

    return [
        eqn
        for eqn in equations(jaxpr.jaxpr)
        if any(map(is_large, eqn.invars)) and not any(map(is_large, eqn.outvars))
    ]


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("uw", "dense"),
        ("uw", "structured"),
        ("uw", "chunked"),
        ("mean", "auto"),
    ],
)
def test_a_step_costs_a_step_of_sgd(name, method):
    """Whatever the method of the Jacobian, XLA keeps one backward pass."""
    params, x = network(), jnp.ones((64, 32))

    def jd(params, state):
        losses, jac = jaxjd.value_and_jac(task_losses, method=method)(params, x)
        return tx.update(jac, state, params, losses=losses)[0]

    def sgd(params):
        return jax.grad(lambda params: task_losses(params, x).mean())(params)

    tx = registry.transformation(name, M)
    flops = [
        jax.jit(fun).lower(*args).compile(NORMAL).cost_analysis()["flops"]
        for fun, args in ((jd, (params, tx.init(params))), (sgd, (params,)))
    ]
    # The rest is for the m weights, and for Adam with m scales.
    assert flops[0] <= 1.005 * flops[1]


def test_gradnorm_computes_the_norms_that_it_needs():
    """With respect to the last shared layer."""
    params, x = network(), jnp.ones((64, 32))
    last = {"trunk": [False, True], "heads": False}
    gradnorm = jaxjd.scalarization.gradnorm(num_losses=M)

    def jd(tx):
        def step(params, state):
            losses, jac = jaxjd.value_and_jac(task_losses, method="chunked")(params, x)
            return tx.update(jac, state, params, losses=losses)

        return step

    tx = jaxjd.aggregate(gradnorm, wrt=last)
    state = tx.init(params)
    _, after = jax.jit(jd(tx))(params, state)
    rows = jax.jacrev(
        lambda layer: task_losses(params | {"trunk": [params["trunk"][0], layer]}, x)
    )(params["trunk"][1])
    norms = jnp.square(rows).sum((1, 2))
    _, expected = gradnorm.update(
        task_losses(params, x), gradnorm.init(), squared_norms=norms
    )
    assert_allclose(after.weighting.learned.scales, expected.learned.scales, rtol=1e-5)


@every
def test_missing_losses(name):
    """The scalar is that of the others, whatever the missing ones are."""
    mask = np.array([True, False, True, True])
    if name in ("random", "constant"):
        spoilt = LOSSES.at[1].set(jnp.nan)
        value, gradient = first(name, spoilt, jnp.asarray(mask))
        expected = first(name, LOSSES, jnp.asarray(mask))
        assert_array_equal(value, expected[0])
        assert_array_equal(gradient, expected[1])
        return
    few = LOSSES[mask]
    if name == "gradnorm":  # Its norms are those of the first rows.
        assert_allclose(first(name, LOSSES, jnp.asarray(mask))[1], mask * 1.0)
        return
    expected, of_few = first(name, few)
    for wrong in (jnp.nan, jnp.inf, -1.0, 0.0):
        value, gradient = first(name, LOSSES.at[1].set(wrong), jnp.asarray(mask))
        assert_allclose(value, expected, rtol=1e-5)
        assert_allclose(gradient[mask], of_few, rtol=1e-5, atol=1e-6)
        assert gradient[1] == 0
    value, gradient = first(name, LOSSES, jnp.zeros(M, bool))
    assert jnp.isfinite(value)
    assert not gradient.any()


@of_losses
@pytest.mark.parametrize("wrong", [jnp.nan, jnp.inf])
def test_a_loss_that_is_not_finite(name, wrong):
    """The weights are NaN, and what was learned stays as it was."""
    tx = registry.transformation(name, M)
    step = jax.jit(
        lambda losses, state: tx.update(
            ROWS, state, ROWS[0], losses=losses, losses_after=losses
        )
    )
    _, state = step(LOSSES, tx.init(ROWS[0]))
    result, after = step(LOSSES.at[2].set(wrong), state)
    assert jnp.isnan(result).all()
    if name == "famo":  # Of the batch it keeps that there is nothing to learn from.
        assert not after.weighting.seen.any()
        state, after = state.weighting.learned, after.weighting.learned
    jax.tree.map(assert_array_equal, state, after)


@pytest.mark.parametrize("name", ["constant", "imtl_l", "stch"])
def test_a_pytree_of_losses(name):
    """A dict is ordered by its keys, as the rows are; other shapes are row-major."""
    init, update = registry.scalarizer(name, M)
    expected, _ = update(LOSSES, init(), **extra())
    for losses in (
        {"b": LOSSES[1:].reshape(3, 1), "a": LOSSES[0]},
        LOSSES.reshape(2, 2),
    ):
        value, _ = update(losses, init(), **extra())
        assert value.shape == ()
        assert_array_equal(value, expected)


@every
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_dtypes(name, dtype, x64):
    """The scalar is float32 or wider, and the state keeps its dtypes."""
    init, update = registry.scalarizer(name, M)
    losses = jax.ShapeDtypeStruct((M,), dtype)
    value, state = jax.eval_shape(
        lambda losses: update(losses, init(), **extra(losses, dtype)), losses
    )
    assert value.dtype == (jnp.float64 if dtype == jnp.float64 else jnp.float32)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(state)] == [
        (x.shape, x.dtype) for x in jax.tree.leaves(init())
    ]


@of_losses
def test_a_scan_of_steps_under_vmap(name):
    """Two runs of three steps at once are those of one after the other."""
    tx = optax.chain(registry.transformation(name, M), optax.sgd(0.01))

    def fun(params):
        return jnp.square(ROWS @ params - 3) + 1

    def run(params):
        def step(carry, _):
            params, state, after = carry
            losses, jac = jaxjd.value_and_jac(fun)(params)
            updates, state = tx.update(
                jac, state, params, losses=losses, losses_after=after
            )
            params = optax.apply_updates(params, updates)
            return (params, state, fun(params)), losses

        start = params, tx.init(params), jnp.ones(M)
        return jax.lax.scan(step, start, length=3)[1]

    starts = jnp.stack([jnp.zeros(N), 0.1 * jnp.ones(N)])
    together = jax.jit(jax.vmap(run))(starts)
    assert_allclose(together[1], run(starts[1]), rtol=1e-4)
    assert not (together[0] == together[1]).all()


@pytest.mark.parametrize("name", [*LEARNED, "dwa"])
def test_parameters_in_bfloat16(name):
    params = jnp.ones(N, jnp.bfloat16)
    tx = registry.transformation(name, M)
    state = tx.init(params)
    rows = ROWS.astype(jnp.bfloat16)
    losses = LOSSES.astype(jnp.bfloat16)
    result, after = tx.update(rows, state, params, losses=losses, losses_after=losses)
    assert result.dtype == jnp.bfloat16
    assert after.weighting[0] is not None
    kept = [(x.shape, x.dtype) for x in jax.tree.leaves(state)]
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(after)] == kept


@of_losses
def test_a_single_loss(name):
    """Its gradient is its own, times a positive number."""
    assert first(name, jnp.array([0.7]))[1][0] > 0


def test_nnx():
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(3, M, rngs=nnx.Rngs(0))
    tx = optax.chain(jaxjd.uw(num_losses=M), optax.sgd(0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        def fun(model):
            return jnp.square(model(jnp.ones((2, 3))) - 1).mean(0)

        losses, jac = jaxjd.nnx.value_and_jac(fun)(model)
        optimizer.update(model, jac, losses=losses)
        return losses

    losses = [step(model, optimizer) for _ in range(5)]
    assert losses[-1].sum() < losses[0].sum()


def test_in_partition_and_with_features():
    """A group of parameters has a state of its own; the features change nothing."""
    params, x = network(), jnp.ones((4, 32))
    labels = {"trunk": "shared", "heads": "own"}
    tx = jaxjd.partition({"shared": jaxjd.uw(num_losses=M), "own": jaxjd.sum()}, labels)
    losses, jac = jaxjd.value_and_jac(task_losses)(params, x)
    state = tx.init(params)
    result, state = tx.update(jac, state, params, losses=losses)
    total = jax.grad(lambda params: task_losses(params, x).sum())(params)
    for group, factor in (("trunk", 0.5), ("heads", 1)):
        jax.tree.map(
            lambda a, b, factor=factor: assert_allclose(a, factor * b, atol=1e-6),
            result[group],
            total[group],
        )
    assert state.groups["shared"].weighting.scales.any()

    def named(params, x):
        trunk = checkpoint_name(jnp.tanh(x @ params["trunk"][0]), "features")
        return task_losses(params | {"trunk": params["trunk"][1:]}, trunk)

    jac = jaxjd.jac(named)(params, x)
    tx = jaxjd.aggregate(jaxjd.scalarization.uw(num_losses=M), features="features")
    result, _ = tx.update(jac, tx.init(params), params, losses=losses)
    jax.tree.map(
        lambda a, b: assert_allclose(a, b / 2, rtol=1e-5, atol=1e-6), result, total
    )


def test_a_scalarizer_of_the_user():
    """`aggregate` differentiates it, and calls it without a state."""

    def scalar(losses, state, /, *, mask=None, **extra_args):
        del mask, extra_args
        return jnp.square(losses).sum(), state

    mine = jaxjd.Scalarizer(optax.EmptyState, scalar)
    assert_allclose(mine(LOSSES), jnp.square(LOSSES).sum())
    tx = jaxjd.aggregate(mine)
    result, _ = tx.update(ROWS, tx.init(ROWS[0]), ROWS[0], losses=LOSSES)
    assert_allclose(result, 2 * LOSSES @ ROWS, rtol=1e-5)
    init, update = mine
    assert (init, update) == (optax.EmptyState, scalar)


def test_it_composes_with_weightings():
    """The weights of one step are averaged, or applied to the losses' logarithms."""
    stch = jaxjd.scalarization.stch(0.5)
    averaged = jaxjd.cr_mogm(stch.weighting, 0.5, num_losses=M)
    assert jaxjd.weighting.cr_mogm(stch.weighting, num_losses=M).reads == "shape"
    result, _ = averaged.update(ROWS, averaged.init(ROWS[0]), ROWS[0], losses=LOSSES)
    assert_allclose(result, jax.grad(stch)(LOSSES) @ ROWS, rtol=1e-5, atol=1e-6)


class TestErrors:
    @of_losses
    def test_no_losses(self, name):
        tx = registry.transformation(name, M)
        with pytest.raises(ValueError, match=f"`losses` must be given .*{name}"):
            tx.update(ROWS, tx.init(ROWS[0]), ROWS[0])

    @of_losses
    def test_another_number_of_losses(self, name):
        tx = registry.transformation(name, M)
        with pytest.raises(ValueError, match="`losses` must have one .* Got 3"):
            tx.update(ROWS, tx.init(ROWS[0]), ROWS[0], losses=LOSSES[:3])
        weighting = registry.weighting(name, M)
        with pytest.raises(ValueError, match="`losses` must have one .* Got 3"):
            weighting.update(jnp.eye(M), weighting.init(), losses=LOSSES[:3])

    @pytest.mark.parametrize("name", [*LEARNED, "dwa"])
    def test_a_state_of_another_number_of_losses(self, name):
        init, update = registry.scalarizer(name, M + 1)
        with pytest.raises(ValueError, match="num_losses=5 losses.*Got 4"):
            update(LOSSES, init(), **extra())

    def test_what_are_no_losses(self):
        mean = jaxjd.scalarization.mean()
        with pytest.raises(TypeError, match="`losses` must be real numbers. Got bool"):
            mean(jnp.ones(3, bool))
        with pytest.raises(ValueError, match="`losses` must hold at least one loss"):
            mean({})
        with pytest.raises(ValueError, match="`mask` must have one entry for each"):
            mean(LOSSES, mask=jnp.ones(3, bool))

    def test_famo_without_the_losses_after_the_step(self):
        tx = jaxjd.famo(num_losses=M)
        with pytest.raises(ValueError, match="`losses_after` must be given .* famo"):
            tx.update(ROWS, tx.init(ROWS[0]), ROWS[0], losses=LOSSES)
        with pytest.raises(ValueError, match="`losses_after` must have one entry"):
            tx.update(ROWS, tx.init(ROWS[0]), ROWS[0], losses=LOSSES, losses_after=1.0)

    def test_gradnorm_without_norms(self):
        gradnorm = jaxjd.scalarization.gradnorm(num_losses=M)
        with pytest.raises(ValueError, match="`squared_norms` must be given"):
            gradnorm.update(LOSSES, gradnorm.init())
        with pytest.raises(ValueError, match="`squared_norms` must have one entry"):
            gradnorm.update(LOSSES, gradnorm.init(), squared_norms=LOSSES[:3])

    def test_negative_losses(self):
        """Under `jit` they give NaN, for there they are not known."""
        geometric_mean = jaxjd.scalarization.geometric_mean()
        wrong = LOSSES.at[1].set(-0.5)
        with pytest.raises(ValueError, match="`losses` must not be negative.*-0.5"):
            geometric_mean(wrong)
        tx = jaxjd.geometric_mean()
        with pytest.raises(ValueError, match="`losses` must not be negative.*-0.5"):
            tx.update(ROWS, tx.init(ROWS[0]), ROWS[0], losses=wrong)
        assert jnp.isnan(jax.jit(geometric_mean)(wrong))
        geometric_mean(wrong, mask=jnp.array([True, False, True, True]))

    def test_a_scalarizer_with_a_state_is_called(self):
        with pytest.raises(TypeError, match="has a state and cannot simply be called"):
            jaxjd.scalarization.uw(num_losses=M)(LOSSES)

    def test_a_maker_in_place_of_a_scalarizer(self):
        with pytest.raises(TypeError, match=r"write `jaxjd.scalarization.uw\(...\)`"):
            jaxjd.aggregate(jaxjd.scalarization.uw)
        with pytest.raises(TypeError, match=r"write `jaxjd.uw\(...\)`"):
            optax.chain(jaxjd.uw, optax.sgd(0.1)).init(ROWS[0])

    @pytest.mark.parametrize(
        ("name", "args", "kwargs", "message"),
        [
            ("cosmos", (-1.0,), {}, r"`penalty` must be in \[0, inf\). Got -1.0"),
            ("cosmos", (1.0, [-1.0]), {}, "`preference` must not be negative"),
            ("dwa", (), {"epoch_steps": 0}, "`epoch_steps` must be at least 1. Got 0"),
            (
                "dwa",
                (),
                {"epoch_steps": 1, "temperature": 0},
                r"`temperature` must be in \(0, inf\). Got 0",
            ),
            ("famo", (), {"reference": [1.0]}, "`reference` must have one entry"),
            ("gradnorm", (), {"alpha": -1}, r"`alpha` must be in \[0, inf\). Got -1"),
            ("gradnorm", (), {"initial_losses": [1.0]}, "`initial_losses` must have"),
            ("pbi", (-1,), {}, r"`penalty` must be in \[0, inf\). Got -1"),
            ("stch", (0.0,), {}, r"`smoothing` must be in \(0, inf\). Got 0.0"),
            ("stch", (1.0,), {"reference": [np.nan]}, "`reference` must be finite"),
            ("uw", (), {"num_losses": 0}, "`num_losses` must be at least 1. Got 0"),
        ],
    )
    def test_out_of_range(self, name, args, kwargs, message):
        sized = {"num_losses": M} if name in (*LEARNED, "dwa") else {}
        with pytest.raises(ValueError, match=message):
            getattr(jaxjd.scalarization, name)(*args, **sized | kwargs)

    @pytest.mark.parametrize("name", LEARNED)
    def test_what_is_no_optimizer(self, name):
        with pytest.raises(TypeError, match="`optimizer` must be an optimizer"):
            getattr(jaxjd, name)(num_losses=M, optimizer=optax.adam)

    @pytest.mark.parametrize("name", ["cosmos", "pbi", "stch"])
    def test_a_vector_of_another_length(self, name):
        make = getattr(jaxjd.scalarization, name)
        with pytest.raises(ValueError, match="`preference` must have one .* 4 losses"):
            make(1.0, [1.0, 2.0])(LOSSES)
        if name != "cosmos":
            with pytest.raises(ValueError, match="`reference` must have one .* 4 los"):
                make(1.0, reference=[1.0, 2.0])(LOSSES)
