"""What every weighting must do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import jaxjd
from tests.weighting import registry
from tests.weighting.registry import (
    AGGREGATORS,
    COMBINATORS,
    OF_LOSSES,
    OF_ROWS,
    WEIGHTINGS,
)

M = 6
every = pytest.mark.parametrize("name", WEIGHTINGS)


def gramian(key=0, rank=M, dtype=jnp.float32):
    rows = jax.random.normal(jax.random.key(key), (M, rank), dtype)
    return rows @ rows.T


def compiled(name, m=M):
    """The `init`, the compiled `update`, and a list with an entry for each trace."""
    return compiled_for(name, m)  # So that a call without `m` shares the cache entry.


@functools.cache
def compiled_for(name, m):
    weighting = registry.weighting(name, m)
    traces = []

    def update(gramian, state, mask, losses=None):
        traces.append(gramian)
        extra_args = registry.extra_args(name, gramian, losses)
        return weighting.update(gramian, state, mask=mask, **extra_args)

    return weighting.init, jax.jit(update), traces


def weigh(name, gramian, mask=None, losses=None):
    """The weights of a first step."""
    m = gramian.shape[0]
    init, update, _ = compiled(name, m)
    mask = jnp.ones(m, bool) if mask is None else mask
    losses = registry.some_losses(m) if losses is None else losses
    return update(gramian, init(), mask, losses)[0]


def refused(name, gramian):
    """Call the weighting with a Gramian that it should refuse."""
    weighting = registry.weighting(name, M)
    extra_args = registry.extra_args(name, jnp.eye(M))
    return weighting.update(gramian, weighting.init(), **extra_args)


def test_the_registry_is_complete():
    exported = {
        name for name in vars(jaxjd.weighting) if name[0].islower() and name[0] != "_"
    }
    modules = {name for name in exported if "_" + name in vars(jaxjd.weighting)}
    assert exported == (set(WEIGHTINGS) - set(OF_LOSSES)) | COMBINATORS == modules
    scalarizers = {name for name in vars(jaxjd.scalarization) if name[0].islower()}
    of_both = {"mean", "sum", "constant", "random"}
    assert scalarizers == set(OF_LOSSES) | of_both
    assert all(callable(getattr(jaxjd, name)) for name in AGGREGATORS)
    assert not any(hasattr(jaxjd, name) for name in COMBINATORS)
    of_rows = {name for name, value in vars(jaxjd.transform).items() if callable(value)}
    others = {"aggregate", "aggregator", "partition", "precondition_by_rms"}
    assert set(OF_ROWS) == {name for name in of_rows if name.islower()} - others
    assert list(AGGREGATORS) == sorted(AGGREGATORS)


@every
def test_what_it_reads_of_the_gramian(name):
    """From its shape alone, or its diagonal, the weights are the same."""
    weighting, one = registry.weighting(name, M), gramian()
    extra_args = registry.extra_args(name, one)
    state = weighting.init()
    part = {
        "gramian": one,
        "diagonal": jnp.diag(jnp.diag(one)),
        "shape": jax.ShapeDtypeStruct((M, M), jnp.float32),
    }[weighting.reads]
    assert (weighting.reads == "shape") == WEIGHTINGS[name].blind
    if weighting.reads != "gramian":
        weights, _ = weighting.update(part, state, **extra_args)
        assert_allclose(weights, weigh(name, one), rtol=1e-6)


@every
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64, jnp.bfloat16])
def test_dtypes(name, dtype, x64):
    """Weights have the Gramian's dtype, at least float32. The state's never changes."""
    init, update, _ = compiled(name)
    state = init()
    one = jax.ShapeDtypeStruct((M, M), dtype)
    # Tracing is enough: a dtype narrower than float32 is widened before anything else.
    weights, new = jax.eval_shape(update, one, state, jnp.ones(M, bool))
    assert weights.shape == (M,)
    assert weights.dtype == (jnp.float64 if dtype == jnp.float64 else jnp.float32)
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, state)
    assert jax.tree.map(lambda x: x.dtype, new) == jax.tree.map(
        lambda x: x.dtype, state
    )
    # A state of a weak type would have the second step of a run compiled anew.
    weak = jax.tree.map(lambda x: getattr(x, "weak_type", False), (state, new))
    assert not any(jax.tree.leaves(weak))


@every
def test_vmap_of_a_scan(name):
    """A vmap of a scan can be traced. Compiling it would take too long."""
    init, update, _ = compiled(name)

    def steps(gramians):
        def step(state, gramian):
            return update(gramian, state, jnp.ones(M, bool))[::-1]

        return jax.lax.scan(step, init(), gramians)

    gramians = jax.ShapeDtypeStruct((2, 3, M, M), jnp.float32)
    assert jax.eval_shape(jax.vmap(steps), gramians)[1].shape == (2, 3, M)


@pytest.mark.parametrize("name", ["gradvac", "sdmgrad"])
def test_vmap_of_a_state(name):
    """Two runs at once give the same as one after the other."""
    init, update, _ = compiled(name)
    together = jax.jit(jax.vmap(update, (0, 0, None)))
    every = jnp.ones(M, bool)
    alone = [init(), init()]
    states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone)
    for key in range(3):
        pair = jnp.stack([gramian(key), gramian(key + 10)])
        weights, states = together(pair, states, every)
        for run in range(2):
            expected, alone[run] = update(pair[run], alone[run], every)
            assert_allclose(weights[run], expected, rtol=1e-3, atol=1e-4)


@every
def test_losses_that_are_missing(name):
    """Masked losses do not count, and one compilation serves every mask."""
    one = gramian()
    masks = [np.array(mask, bool) for mask in ([1, 1, 0, 1, 0, 1], [0, 1, 1, 1, 1, 0])]
    _, _, traces = compiled(name)
    weigh(name, one)
    before = len(traces)
    for mask in masks:
        if name == "pcd" and not mask[0]:
            # No other loss takes the place of the first.
            assert_array_equal(weigh(name, one, jnp.asarray(mask)), 0)
            continue
        # The missing losses' rows and columns may hold anything.
        spoilt = jnp.where(mask[:, None] & mask[None], one, jnp.nan)
        weights = weigh(name, spoilt, jnp.asarray(mask))
        assert_array_equal(weights[~mask], 0)
        if WEIGHTINGS[name].drawn or name == "constant":
            assert_array_equal(weights, weigh(name, one, jnp.asarray(mask)))
            assert weights.any()
        else:
            losses = registry.some_losses(M)[mask]
            alone = weigh(name, one[mask][:, mask], losses=losses)
            assert_allclose(weights[mask], alone, rtol=1e-3, atol=1e-4)
    assert_array_equal(weigh(name, one, jnp.zeros(M, bool)), 0)
    assert len(traces) == before


@pytest.mark.parametrize("name", ["cagrad", "gradvac", "imtl_g", "nash_mtl", "sdmgrad"])
def test_outside_of_jit_nothing_is_compiled_twice(name):
    """This includes loops and conditions, which JAX caches by their functions."""
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: "backend_compile" in event and compiled.append(event)
    )
    # No other test has compiled anything for this size.
    weighting, one = registry.weighting(name, 7), jnp.eye(7) + 0.1
    for _ in range(2):
        before = len(compiled)
        extra_args = registry.extra_args(name, one)
        weighting.update(one, weighting.init(), **extra_args)
    assert 0 < before == len(compiled)


@every
def test_a_single_loss(name):
    """The update is a positive multiple of the gradient."""
    alone = jnp.arange(M) == 0
    assert weigh(name, gramian(), alone)[0] > 0
    init, update, _ = compiled(name, 1)
    one = jnp.ones((1, 1))
    # Only trace this: compiling takes as long as all the other tests.
    least = WEIGHTINGS[name].least
    if least == 1:
        weights, _ = jax.eval_shape(update, one, init(), jnp.ones(1, bool))
        assert weights.shape == (1,)
    else:
        with pytest.raises(ValueError, match=f"at least {least} losses"):
            jax.eval_shape(update, one, init(), jnp.ones(1, bool))


@every
def test_the_scale_of_the_gradients_does_not_matter(name):
    if not WEIGHTINGS[name].scale_free:
        pytest.skip("To it it does.")
    one = gramian(rank=12)
    expected = weigh(name, one)
    for scale in (1e-8, 1e8):
        weights = weigh(name, scale**2 * one)
        assert_allclose(weights, expected, rtol=1e-3, atol=1e-4)


@every
def test_permuting_the_losses_permutes_the_weights(name):
    if WEIGHTINGS[name].ordered:
        pytest.skip("To it the losses are not alike.")
    order = jnp.array([3, 1, 0, 5, 4, 2])
    one = gramian()
    permuted = weigh(name, one[order][:, order], losses=registry.some_losses(M)[order])
    assert_allclose(permuted, weigh(name, one)[order], rtol=1e-3, atol=1e-4)


@every
@pytest.mark.parametrize("shape", [(6,), (5, 6), (0, 0), (2, 6, 6)])
def test_a_gramian_that_is_not_square(name, shape):
    with pytest.raises(
        ValueError, match=r"`gramian` must be a square matrix, \[m, m\]"
    ):
        refused(name, jnp.ones(shape))


@pytest.mark.parametrize("name", ["mean", "pcgrad"])
def test_what_is_not_a_gramian(name):
    """With a state and without, called and as `update`."""
    weighting = registry.weighting(name, M)
    jac = jaxjd.jac(jnp.square)(jnp.ones(M))
    gradients = {"w": jnp.ones((M, 2)), "b": jnp.ones(M)}
    for given, message in (
        (jac, r"Got a Jacobian: write `weighting\(jac.gramian\(\)\)`"),
        (gradients, r"Got dict. Gradients go to a transformation: `jaxjd.NAME\(\)"),
        (list(gradients.values()), "Got list. Gradients go to"),
        (None, "Got NoneType"),
    ):
        with pytest.raises(TypeError, match="`gramian` must be the matrix.*" + message):
            weighting(given)
        with pytest.raises(TypeError, match="`gramian` must be the matrix.*" + message):
            weighting.update(given, weighting.init())


def test_an_unknown_part_of_the_gramian():
    init, update = jaxjd.weighting.mean()
    with pytest.raises(ValueError, match="`reads` must be one of .*Got 'norms'"):
        jaxjd.Weighting(init, update, "norms")


def test_a_weighting_in_a_chain():
    tx = optax.chain(jaxjd.weighting.upgrad(), optax.sgd(0.1))
    with pytest.raises(TypeError, match=r"In optax.chain use `jaxjd.NAME\(...\)` in"):
        tx.init(jnp.ones(3))


@every
def test_a_gramian_of_integers(name):
    with pytest.raises(TypeError, match="`gramian` must be real floating-point"):
        refused(name, jnp.ones((M, M), int))


@every
def test_extra_arguments_of_others(name):
    weighting, one = registry.weighting(name, M), gramian()
    extra_args = registry.extra_args(name, one) | {"of_another_link": None}
    jax.eval_shape(lambda: weighting.update(one, weighting.init(), **extra_args))


@pytest.mark.parametrize(
    ("name", "args", "kwargs", "message"),
    [
        ("aligned_mtl", (), {"scale_mode": "max"}, "`scale_mode` must be one of"),
        ("aligned_mtl", ([-1.0],), {}, "`preference` must not be negative"),
        ("cagrad", (-0.5,), {}, r"`c` must be in \[0, inf\). Got -0.5"),
        ("cagrad", (0.5, [-1.0]), {}, "`preference` must not be negative"),
        ("conflict_free", ([-1.0],), {}, "`preference` must not be negative"),
        ("conflict_free", (), {"length": "sum"}, "`length` must be one of"),
        ("conflict_free", (), {"length": -1}, "`length` must be at least 0"),
        ("cr_mogm", (1.5,), {}, r"`decay` must be in \[0, 1\]. Got 1.5"),
        ("cr_mogm", (), {"num_losses": 0}, "`num_losses` must be at least 1. Got 0"),
        ("cr_mogm", (), {"initial_weights": [1.0]}, "`initial_weights` must have one"),
        ("dualproj", (), {"num_losses": 0}, "`num_losses` must be at least 1. Got 0"),
        ("fairgrad", (0,), {}, r"`alpha` must be in \(0, inf\). Got 0"),
        ("gradvac", (), {"decay": -0.1}, r"`decay` must be in \[0, 1\]. Got -0.1"),
        ("gradvac", (), {"eps": -1}, r"`eps` must be in \[0, inf\). Got -1"),
        ("gradvac", (), {"num_losses": 0}, "`num_losses` must be at least 1. Got 0"),
        ("krum", (-1,), {}, "`num_byzantine` must be at least 0. Got -1"),
        ("krum", (1, 0), {}, "`num_selected` must be at least 1. Got 0"),
        (
            "mgda",
            (),
            {"frank_wolfe_steps": 0},
            "`frank_wolfe_steps` must be at least 1",
        ),
        ("modo", (), {"step_size": 0}, r"`step_size` must be in \(0, inf\). Got 0"),
        (
            "modo",
            (),
            {"regularization": -1},
            r"`regularization` must be in \[0, inf\). Got -1",
        ),
        ("modo", (), {"num_losses": 0}, "`num_losses` must be at least 1. Got 0"),
        ("nash_mtl", (), {"max_norm": -1}, r"`max_norm` must be in \[0, inf\). Got"),
        ("nash_mtl", (), {"update_every": 0}, "`update_every` must be at least 1"),
        ("nash_mtl", (), {"num_losses": 0}, "`num_losses` must be at least 1. Got 0"),
        ("pcd", (), {"tau": 1.5}, r"`tau` must be in \[0, 1\]. Got 1.5"),
        ("pcd", (), {"tau": [0.5]}, "one entry for each of the 5 secondary losses"),
        ("pcd", (), {"decay": 1}, r"`decay` must be in \[0, 1\). Got 1"),
        ("pcd", (), {"eps": -1}, r"`eps` must be in \[0, inf\). Got -1"),
        ("pcd", (), {"num_losses": 0}, "`num_losses` must be at least 1. Got 0"),
        ("regularize", (0.0,), {}, r"`eps` must be in \(0, inf\). Got 0.0"),
        ("sdmgrad", (), {"step_size": 0}, r"`step_size` must be in \(0, inf\). Got 0"),
        ("sdmgrad", (), {"momentum": 1}, r"`momentum` must be in \[0, 1\). Got 1"),
        ("sdmgrad", (), {"inner_steps": 0}, "`inner_steps` must be at least 1. Got 0"),
        (
            "sdmgrad",
            (),
            {"regularization": -1},
            r"`regularization` must be in \[0, inf\). Got -1",
        ),
        ("sdmgrad", (), {"preference": [-1.0]}, "`preference` must not be negative"),
    ],
)
def test_hyperparameters_out_of_range(name, args, kwargs, message):
    if name in ("cr_mogm", "regularize"):
        args = (jaxjd.weighting.mean(), *args)
    if name in ("cr_mogm", "gradvac", "modo", "nash_mtl", "pcd", "sdmgrad"):
        kwargs = {"num_losses": M} | kwargs
    with pytest.raises(ValueError, match=message):
        getattr(jaxjd.weighting, name)(*args, **kwargs)


@pytest.mark.parametrize("name", ["pcgrad", "gradvac", "random"])
def test_keys(name):
    """A seed equals its key, a step changes the key, and other types raise."""
    make = getattr(jaxjd.weighting, name)
    if name == "gradvac":
        make = functools.partial(make, num_losses=M)
    seed, key = make(key=3).init(), make(key=jax.random.key(3)).init()
    assert seed.key == key.key
    raw = make(key=jax.random.PRNGKey(3)).init()
    assert_array_equal(raw.key, jax.random.key_data(seed.key))
    for wrong in (1.0, True, jax.random.split(jax.random.key(0)), jnp.ones(2)):
        with pytest.raises(TypeError, match="`key` must be an integer seed or one"):
            make(key=wrong)
    init, update, _ = compiled(name)
    one = gramian() - 0.9 * jnp.diag(jnp.diag(gramian()))
    _, state = update(one, init(), jnp.ones(M, bool))
    assert state.key != init().key


@pytest.mark.parametrize("name", ["pcgrad", "gradvac", "random", "graddrop"])
def test_the_keys_of_many_runs(name):
    """Each draws its own if its key is made in the mapped function."""
    sizes = {"num_losses": M} if name == "gradvac" else {}
    rows = jax.random.normal(jax.random.key(5), (M, 4))

    def run(key):
        tx = getattr(jaxjd, name)(key=key, **sizes)
        return tx.update(rows, tx.init(rows[0]), rows[0])[0]

    keys = jax.random.split(jax.random.key(0), 3)
    many = jax.jit(jax.vmap(run))(keys)
    assert_allclose(many[1], run(keys[1]), rtol=1e-4, atol=1e-5)
    assert not (many[0] == many[1]).all()
    assert not (many[1] == many[2]).all()
    # As the documentation warns, a seed is the same for all.
    same = jax.vmap(lambda _: run(3))(keys)
    assert_array_equal(same[0], same[1])


@pytest.mark.parametrize("name", ["cr_mogm", "gradvac", "modo", "sdmgrad"])
def test_a_state_of_another_number_of_losses(name):
    init, update, _ = compiled(name)
    few = M - 1
    with pytest.raises(ValueError, match="num_losses=6 losses.* Got 5"):
        jax.eval_shape(update, jnp.eye(few), init(), jnp.ones(few, bool))


def test_a_weighting_is_a_function_to_jax():
    """Otherwise it is the pair of functions that it was made of."""
    weighting = jaxjd.weighting.mean()
    assert_array_equal(jax.jit(weighting)(gramian()), weigh("mean", gramian()))
    assert_array_equal(
        jax.vmap(weighting)(gramian()[None]), weigh("mean", gramian())[None]
    )
    init, update = weighting
    assert weighting == jaxjd.Weighting(init, update, "shape")
    assert {weighting: 0}[jaxjd.Weighting(init, update, "shape")] == 0
    with pytest.raises(TypeError, match="has a state and cannot simply be called"):
        jax.jit(jaxjd.weighting.pcgrad())(gramian())


def test_values():
    """The weights of these weightings are known in advance."""
    one = gramian()
    assert_array_equal(jaxjd.weighting.mean()(one), np.full(M, 1 / M, np.float32))
    assert_array_equal(jaxjd.weighting.sum()(one), np.ones(M))
    assert_array_equal(jaxjd.weighting.constant(range(M))(one), np.arange(M))
    mask = jnp.arange(M) < 4
    assert_array_equal(jaxjd.weighting.mean()(one, mask=mask), mask / 4)
    assert_array_equal(jaxjd.weighting.sum()(one, mask=mask), mask)
    constant = jaxjd.weighting.constant(range(M))
    assert_array_equal(constant(one, mask=mask), [0, 1, 2, 3, 0, 0])


J = np.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])


def test_the_example_of_torchjd():
    """https://torchjd.org prints [0.2929, 1.9004, 1.9004] and [1.1109, 0.7894]."""
    jacobian = jnp.asarray(J, jnp.float32)
    gramian = jacobian @ jacobian.T
    theirs = jaxjd.weighting.upgrad(norm_eps=1e-4, reg_eps=1e-4)(gramian)
    assert_allclose(theirs, [1.1109, 0.7894], atol=1e-4)
    assert_allclose(theirs @ jacobian, [0.2929, 1.9004, 1.9004], atol=1e-4)
    exact = jaxjd.weighting.upgrad()(gramian)
    assert_allclose(exact @ jacobian, [0.29240, 1.90058, 1.90058], atol=1e-4)


def test_dualproj_of_two_gradients(x64):
    """With two losses the projection has a closed form."""
    g1, g2 = J
    mean = (g1 + g2) / 2
    assert g1 @ mean < 0 < g2 @ mean
    expected = mean - (g1 @ mean) / (g1 @ g1) * g1
    weights = jaxjd.weighting.dualproj()(jnp.asarray(J @ J.T))
    assert_allclose(weights @ J, expected, rtol=1e-7)
    # A preference whose update conflicts with no loss stays as it is.
    weights = jaxjd.weighting.dualproj([1.0, 0.8])(jnp.asarray(J @ J.T))
    assert_allclose(weights, [1.0, 0.8], rtol=1e-12)


def test_a_preference_of_losses_that_agree():
    """Without conflict the projections change nothing."""
    gramian = jnp.array([[2.0, 1.0], [1.0, 3.0]])
    for name in ("upgrad", "dualproj"):
        weights = getattr(jaxjd.weighting, name)([0.3, 0.9])(gramian)
        assert_allclose(weights, [0.3, 0.9], rtol=1e-6)


@pytest.mark.parametrize("name", ["upgrad", "dualproj"])
@pytest.mark.parametrize(
    ("preference", "error", "message"),
    [
        ([1.0, -0.5], ValueError, "`preference` must not be negative. Got .* -0.5"),
        ([1.0, np.nan], ValueError, "`preference` must be finite"),
        ([[1.0, 2.0]], ValueError, r"`preference` must be a vector.*\(1, 2\)"),
        ([], ValueError, "`preference` must be a vector"),
        ([1j, 1], TypeError, "`preference` must be real numbers. Got complex"),
    ],
)
def test_an_invalid_preference(name, preference, error, message):
    with pytest.raises(error, match=message):
        getattr(jaxjd.weighting, name)(preference)


@pytest.mark.parametrize(
    "name", ["aligned_mtl", "conflict_free", "constant", "dualproj", "upgrad"]
)
def test_a_vector_of_another_length(name):
    weighting = getattr(jaxjd.weighting, name)([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="one entry for each of the 6 losses. Got 3"):
        weighting(gramian())


def test_a_preference_may_be_traced():
    one = gramian()
    weights = jax.jit(lambda u: jaxjd.weighting.upgrad(u)(one))
    # Twice the default preference.
    doubled = weights(jnp.full(M, 2 / M))
    assert_allclose(doubled, 2 * weigh("upgrad", one), rtol=2e-4, atol=2e-5)
    of_scalars = jax.jit(lambda a: jaxjd.weighting.constant([a] * (M - 1) + [1])(one))
    assert_array_equal(of_scalars(2.0), [2] * (M - 1) + [1])
