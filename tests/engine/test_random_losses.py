"""Does every method agree with brute force, whatever the graph of the losses is?"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxjd
from tests import models
from tests.engine import losses

pytestmark = pytest.mark.usefixtures("x64")

METHODS = {
    "auto": {},
    "least memory": {"memory": 0},
    "dense": {"method": "dense"},
    "chunked": {"method": "chunked"},
    "one by one": {"method": "chunked", "chunk_size": 1},
    "two by two": {"method": "chunked", "chunk_size": 2},
    "structured": {"method": "structured"},
}


def flat(tree):
    leaves = jax.tree.leaves(tree)
    return jnp.concatenate([jnp.ravel(jnp.asarray(x, jnp.float64)) for x in leaves])


def value_and_jac(fun, method, **options):
    return jaxjd.value_and_jac(fun, has_aux=True, **METHODS[method], **options)


def brute_force(fun, params, x=losses.X):
    return models.brute_force(lambda p: flat(fun(p, x, losses.WHICH)[0]), params)


def columns(J, chosen):
    """The columns of some parameters."""
    params = [losses.PARAMS[name] for name in sorted(losses.PARAMS)]
    keep = [chosen[name] for name in sorted(losses.PARAMS)]
    return J[
        :, np.concatenate([[k] * p.size for k, p in zip(keep, params, strict=True)])
    ]


class Case:
    """A drawn function, and draws of what is asked of it."""

    def __init__(self, seed):
        self.fun, self.name, self.named = losses.drawn(seed)
        self.rng = np.random.default_rng([seed, 1])
        self.other = losses.drawn(int(self.rng.integers(10**6)))
        self.some = {name: bool(self.rng.integers(2)) for name in losses.PARAMS}
        self.some["unused" if seed % 2 else "w"] = True
        self.method = self.pick(METHODS)
        self.other_method = self.pick(METHODS)

    def pick(self, options):
        options = list(options)
        return options[self.rng.integers(len(options))]

    def taken(self, params, method=None, x=losses.X):
        return value_and_jac(self.fun, method or self.method)(params, x, losses.WHICH)

    def others(self, params):
        fun = value_and_jac(self.other.fun, self.other_method)
        return fun(params, losses.X, losses.WHICH)[1]


def all_products(case, params):
    """Every method, every product."""
    fun, m = case.fun, case.taken(params)[1].num_losses
    weights = jnp.linspace(-1.0, 2.0, m)
    direction = jax.tree.map(jnp.cos, params)
    J = brute_force(fun, params)
    d, some = models.ravel(direction), columns(J, case.some)
    G = J @ J.T
    values, aux = fun(params, losses.X, losses.WHICH)
    expected = {
        "losses": flat(values),
        "aux": flat(aux),
        "gramian": G,
        "squared norms": jnp.diag(G),
        "vjp": weights @ J,
        "jvp": J @ d,
        "dense": J,
        "restrict": some @ some.T,
        "vjp of some": weights @ some,
    }
    for method in METHODS:
        (values, aux), jac = case.taken(params, method)
        of_some = jac.restrict(case.some)
        found = {
            "losses": flat(values),
            "aux": flat(aux),
            "gramian": jac.gramian(),
            "squared norms": jac.squared_norms(),
            "vjp": models.ravel(jac.vjp(weights)),
            "jvp": flat(jac.jvp(direction)),
            "dense": models.ravel_rows(jac.dense()),
            "restrict": of_some.gramian(),
            "vjp of some": models.ravel(of_some.vjp(weights)),
        }
        for name, value in found.items():
            yield f"{name}, {method}", value, expected[name]


def two_functions(case, params):
    """Inner products of the rows of two functions, and both one after the other."""
    _, jac = case.taken(params)
    other = case.others(params)
    _, again = case.taken(params, case.other_method, losses.X + 0.5)
    J, K = brute_force(case.fun, params), brute_force(case.other.fun, params)
    yield "cross", jac.cross_gramian(other), J @ K.T
    there = brute_force(case.fun, params, losses.X + 0.5)
    yield "elsewhere", jac.cross_gramian(again), J @ there.T
    both = jnp.concatenate([J, K])
    joined = jaxjd.concatenate([jac, other])
    weights = jnp.linspace(-1.0, 2.0, len(both))
    yield "concatenate", joined.gramian(), both @ both.T
    yield "its norms", joined.squared_norms(), (both**2).sum(axis=1)
    yield "its vjp", models.ravel(joined.vjp(weights)), weights @ both
    yield "its rows", models.ravel_rows(joined.dense()), both
    yield "cross of it", joined.cross_gramian(again), both @ there.T


def of_batch(case, params):
    several = jax.tree.map(lambda p: jnp.stack([p, p + 0.1]), params)

    def found(params):
        (values, _), jac = case.taken(params)
        return flat(values), jac.gramian(), models.ravel(jac.vjp(flat(values)))

    def expected(params):
        values = flat(case.fun(params, losses.X, losses.WHICH)[0])
        J = brute_force(case.fun, params)
        return values, J @ J.T, values @ J

    actual, wanted = jax.vmap(found)(several), jax.vmap(expected)(several)
    yield from zip(("losses", "gramian", "vjp"), actual, wanted, strict=True)


def in_scan(case, params):
    """The Jacobian is carried by the loop, and that of the step before is used."""
    point = jnp.array([0.0, 0.1, 0.2])

    def at(shift):
        return jax.tree.map(lambda p: p + shift, params)

    def step(jac, shift):
        (values, _), new = case.taken(at(shift))
        return new, (jac.gramian(), models.ravel(jac.vjp(flat(values))))

    def rows(shift):
        values = flat(case.fun(at(shift), losses.X, losses.WHICH)[0])
        return values, brute_force(case.fun, at(shift))

    _, first = case.taken(params)
    _, (gramians, combinations) = jax.lax.scan(step, first, point)
    values, J = jax.lax.map(rows, point)
    before = J[jnp.array([0, 0, 1])]
    yield "gramian", gramians, jnp.einsum("smn,skn->smk", before, before)
    yield "vjp", combinations, jnp.einsum("sm,smn->sn", values, before)


def derivative(case, params):
    def of(gramian):
        return models.ravel(jax.grad(lambda p: jnp.sin(gramian(p)).sum())(params))

    def by_rows(p):
        J = brute_force(case.fun, p)
        return J @ J.T

    try:
        expected = of(by_rows)
    except ValueError as error:
        # JAX loses the derivative of a function with a loop on the way, here
        # `losses.root` in a `scan`, when it differentiates the backward pass.
        if "Reverse-mode differentiation does not work" not in str(error):
            raise
        return
    yield "derivative", of(lambda p: case.taken(p)[1].gramian()), expected


def partition(case, params):
    """Each group by itself; a group may have no gradient at all."""
    groups = {name: int(case.rng.integers(3)) for name in params}

    def weights(shift, gramian):
        return shift + 1 / (1 + jnp.diag(gramian))

    tx = jaxjd.partition(
        {n: jaxjd.aggregate(functools.partial(weights, n)) for n in range(3)}, groups
    )
    _, jac = case.taken(params)
    update, _ = tx.update(jac, tx.init(params), params)
    J = brute_force(case.fun, params)
    total = jnp.zeros(J.shape[1])
    for n in range(3):
        mask = np.concatenate(
            [
                np.full(losses.PARAMS[k].size, groups[k] == n, float)
                for k in sorted(params)
            ]
        )
        some = J * mask[None]
        total += weights(n, some @ some.T) @ some
    yield "partition", models.ravel(update), total


def of_model(case, params):
    nnx = pytest.importorskip("flax.nnx")

    class Model(nnx.Module):
        def __init__(self, params):
            for name, value in params.items():
                setattr(self, name, nnx.Param(value))
            self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def fun(model, x, i):
        model.calls[...] += 1
        return case.fun({name: getattr(model, name)[...] for name in params}, x, i)

    model = Model(params)
    options = METHODS[case.method]
    (values, aux), jac = jaxjd.nnx.value_and_jac(fun, has_aux=True, **options)(
        model, losses.X, losses.WHICH
    )
    J = brute_force(case.fun, params)
    wanted, wanted_aux = case.fun(params, losses.X, losses.WHICH)
    yield "losses", flat(values), flat(wanted)
    yield "aux", flat(aux), flat(wanted_aux)
    yield "calls", model.calls[...], 1
    yield "gramian", jac.gramian(), J @ J.T
    yield "vjp", models.ravel(jac.vjp(flat(values))), flat(wanted) @ J


def of_arguments(case, params):
    """The parameters in two arguments, others between them and by name."""
    first = {name: params[name] for name in ("b", "free", "s", "unused")}
    second = {name: params[name] for name in ("layers", "v", "w")}

    def fun(first, x, second, *, which):
        return case.fun(first | second, x, which)

    (values, _), jac = value_and_jac(fun, case.method, argnums=(0, -1))(
        first, losses.X, second, which=losses.WHICH
    )
    J = models.brute_force(
        lambda both: flat(case.fun(both[0] | both[1], losses.X, losses.WHICH)[0]),
        (first, second),
    )
    yield "gramian", jac.gramian(), J @ J.T
    yield "vjp", models.ravel(jac.vjp(values)), flat(values) @ J


class Recorder(dict):
    """Takes the place of given values, and notes the computed ones."""

    def get(self, key, default=None):
        return self.setdefault(key, default)


def of_features(case, params):
    """The weights of one group of parameters come from the features."""

    def weights(gramian):
        return 1 / (1 + jnp.diag(gramian))

    recorder = Recorder()
    case.fun(params | {"given": recorder}, losses.X, losses.WHICH)
    features = {n: recorder[n] for n in case.named}

    def after(features):
        return flat(case.fun(params | {"given": features}, losses.X, losses.WHICH)[0])

    Z, J = models.brute_force(after, features), brute_force(case.fun, params)
    _, jac = case.taken(params)
    groups = {
        True: jaxjd.aggregate(weights, features="features"),
        False: jaxjd.sum(),
    }
    tx = jaxjd.partition(groups, case.some)
    update, _ = tx.update(jac, tx.init(params), params)
    others = {name: not chosen for name, chosen in case.some.items()}
    of_some, of_others = (
        jax.tree.map(lambda p, keep: p * 0 + float(keep), params, chosen)
        for chosen in (case.some, others)
    )
    expected = (weights(Z @ Z.T) @ J) * models.ravel(of_some)
    expected += J.sum(axis=0) * models.ravel(of_others)
    yield "features", jac.features("features").gramian(), Z @ Z.T
    yield "update", models.ravel(update), expected


CONTEXTS = {
    "two functions": two_functions,
    "vmap": of_batch,
    "scan": in_scan,
    "derivative": derivative,
    "partition": partition,
    "nnx": of_model,
    "arguments": of_arguments,
    "features": of_features,
}


def check(seed, context=None, compiled=jax.jit):
    case = Case(seed)
    if context is None:
        context = (
            "features"
            if case.named
            else case.pick([name for name in CONTEXTS if name != "features"])
        )
    labels = []

    @compiled
    def everything(params):
        found = [*all_products(case, params), *CONTEXTS[context](case, params)]
        labels[:] = [name for name, *_ in found]
        return [pair for _, *pair in found]

    pairs = everything(jax.tree.map(jnp.asarray, losses.PARAMS))
    # The derivative of a cast to float32 is rounded to float32.
    tolerance = 1e-6 if "float32" in case.name + case.other.name else 1e-9
    what = f"seed {seed}, {case.name}, {context} with {case.method}"
    for label, (actual, expected) in zip(labels, pairs, strict=True):
        assert jnp.shape(actual) == jnp.shape(expected), f"{label}: {what}"
        actual, expected = np.asarray(actual), np.asarray(expected)
        assert np.isfinite(expected).all(), f"{label}: {what}"
        # Gradients may be far below those of the other losses, but not all of them.
        scale = max(np.abs(expected).max(initial=0), 1e-3)
        error = np.abs(actual - expected).max(initial=0) / scale
        assert error <= tolerance, f"{label}: {error:.1e}, {what}"
        if label.startswith("gramian,"):
            assert (actual == actual.T).all(), f"{label}: {what}"
    return what


NAMING = next(seed for seed in itertools.count() if losses.drawn(seed).named)
# Functions that compile quickly.
SEEDS = {name: seed for seed, name in enumerate(CONTEXTS, 301)} | {"features": NAMING}


@pytest.mark.parametrize("context", CONTEXTS)
def test_random_losses(context):
    check(SEEDS[context], context)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(300))
def test_many_random_losses(seed):
    check(seed)
    jax.clear_caches()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_outside_of_jit(seed):
    """There, operands that are told apart under `jit` may be one array."""
    check(seed, compiled=lambda function: function)
