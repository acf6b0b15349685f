"""A preference that is given to the update: it may be traced."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxjd
from tests import models

M = 3
MAKERS = {
    "aligned_mtl": jaxjd.aligned_mtl,
    "cagrad": lambda u=None: jaxjd.cagrad(0.5, u),
    "conflict_free": jaxjd.conflict_free,
    "cosmos": lambda u=None: jaxjd.cosmos(1.0, u),
    "dualproj": jaxjd.dualproj,
    "pbi": lambda u=None: jaxjd.pbi(5.0, u),
    "sdmgrad": lambda u=None: jaxjd.sdmgrad(num_losses=M, preference=u),
    "stch": lambda u=None: jaxjd.stch(0.5, u),
    "upgrad": jaxjd.upgrad,
    "cr_mogm": lambda u=None: jaxjd.cr_mogm(jaxjd.weighting.upgrad(u), num_losses=M),
    "normalize": lambda u=None: jaxjd.aggregate(
        jaxjd.weighting.normalize(jaxjd.weighting.dualproj(u))
    ),
}
ROWS = jax.random.normal(jax.random.key(0), (M, 6))
PARAMS = jnp.zeros(6)
EXTRA = {"losses": jnp.asarray([1.0, 2.0, 0.5]), "cross_gramian": ROWS @ ROWS.T}
PREFERENCES = jnp.asarray([[1.0, 0.5, 0.1], [0.2, 0.2, 2.0]])


def update(tx, preference=None, rows=ROWS):
    state = tx.init(PARAMS)
    return tx.update(rows, state, PARAMS, preference=preference, **EXTRA)[0]


def test_it_takes_the_place_of_that_of_the_constructor():
    """For every method that has one, for several preferences at once by `vmap`."""
    traces = []

    @jax.jit
    def updates(preferences):
        traces.append(preferences)
        return {
            name: (
                jax.vmap(lambda u, make=make: update(make([9.0, 1.0, 0.0]), u))(
                    preferences
                ),
                update(make(preferences[0])),
            )
            for name, make in MAKERS.items()
        }

    for preferences in (PREFERENCES, PREFERENCES[::-1]):
        for name, (found, expected) in updates(preferences).items():
            np.testing.assert_allclose(
                found[0], expected, rtol=1e-4, atol=1e-5, err_msg=name
            )
            assert np.abs(found[0] - found[1]).max() > 1e-3, name
    assert len(traces) == 1


def test_every_method_with_a_preference_is_tested():
    found = set()
    for room in (jaxjd.weighting, jaxjd.scalarization):
        for name, make in vars(room).items():
            annotations = getattr(make, "__annotations__", {})
            if "preference" in annotations and name[0].islower():
                found.add(name)
    assert found == set(MAKERS) - {"cr_mogm", "normalize"}


def fun(params, x):
    h = models.hidden(params, x)
    return {"pde": jnp.mean(h**2), "initial": h.sum(), "boundary": jnp.mean(h - 1)}


def test_inside_of_everything():
    """By name, in a chain, a partition, groups, and steps that reuse weights."""
    params, (x, _) = models.parameters(jnp.float32), models.examples(4, jnp.float32)
    u = {"pde": 3.0, "initial": 1.0, "boundary": 0.5}
    weighting = jaxjd.weighting.dualproj
    labels = {"hidden": "own", "scale": "rest"}

    def chains(u=None):
        partition = {"own": jaxjd.aggregate(weighting(u)), "rest": jaxjd.sum()}
        aggregators = (
            jaxjd.partition(partition, labels),
            jaxjd.partition({"all": jaxjd.partition(partition, labels)}, "all"),
            jaxjd.aggregate(weighting(u), group="leaf"),
            jaxjd.aggregate(weighting(u), every=2, num_losses=3),
        )
        return [optax.chain(tx, optax.scale(-1.0)) for tx in aggregators]

    @jax.jit
    def updates(params, preference):
        jac = jaxjd.jac(fun)(params, x)

        def of(tx, **extra):
            return tx.update(jac, tx.init(params), params, **extra)[0]

        return (
            [of(tx, preference=preference) for tx in chains()],
            [of(tx) for tx in chains(u)],
        )

    found, expected = updates(params, jax.tree.map(jnp.float32, u))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        found,
        expected,
    )


@pytest.mark.parametrize(
    "make",
    [
        jaxjd.mgda,
        jaxjd.geometric_mean,
        lambda: jaxjd.constant([1.0, 1.0, 1.0]),
        lambda: jaxjd.cr_mogm(jaxjd.weighting.mean(), num_losses=M),
        lambda: jaxjd.aggregate(lambda gramian: gramian[0]),
        jaxjd.graddrop,
        lambda: jaxjd.trimmed_mean(1),
        lambda: jaxjd.excess_mtl(num_losses=M),
        lambda: jaxjd.momentum_conflict_free(num_losses=M),
        lambda: jaxjd.partition({"x": jaxjd.mean(), "y": jaxjd.sum()}, "x"),
        lambda: optax.chain(jaxjd.mean(), optax.scale(2.0)),
    ],
)
def test_methods_without_one_refuse_it(make):
    with pytest.raises(ValueError, match="`preference` is given .* method has none"):
        update(make(), PREFERENCES[0])


@pytest.mark.parametrize(
    ("preference", "error", "message"),
    [
        ([1.0, 2.0], ValueError, "`preference` must have one entry for each of the 3"),
        ([1.0, 2.0, -1.0], ValueError, "`preference` must not be negative"),
        ([1j, 2.0, 1.0], TypeError, "`preference` must be real numbers"),
        ({"a": 1.0}, ValueError, r"`preference` must have shape \(3,\) or be shaped"),
    ],
)
def test_errors(preference, error, message):
    with pytest.raises(error, match=message):
        update(jaxjd.upgrad(), preference)


def test_a_misspelling_is_warned_of():
    tx = jaxjd.upgrad()
    with pytest.warns(UserWarning, match="Did you mean `preference`?"):
        tx.update(ROWS, tx.init(PARAMS), PARAMS, prefrence=PREFERENCES[0])


def test_a_name_that_no_weighting_takes():
    with pytest.raises(ValueError, match="`takes` must be one of .* Got 'losses'"):
        jaxjd.Weighting(
            tuple, lambda gramian, state, **_: (gramian[0], state), takes=["losses"]
        )
