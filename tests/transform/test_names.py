"""Numbers for losses that have names: nobody needs to know the order of the rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxjd
from tests import models

PREFERENCE = {"pde": 3.0, "initial": 1.0, "boundary": 0.5}


def fun(params, x):
    h = models.hidden(params, x)
    return {"pde": jnp.mean(h**2), "initial": h.sum(), "boundary": jnp.mean(h - 1)}


def setting():
    params, (x, _) = models.parameters(jnp.float32), models.examples(4, jnp.float32)
    return params, jaxjd.jac(fun)(params, x)


def test_preferences_masks_and_weights_by_name():
    order = sorted(PREFERENCE)
    in_order = jnp.asarray([PREFERENCE[name] for name in order])
    mask = {"pde": True, "initial": False, "boundary": True}
    present = jnp.asarray([mask[name] for name in order])
    losses = {"pde": 1.0, "initial": 2.0, "boundary": 4.0}
    flat = jnp.asarray([losses[name] for name in order])
    pairs = [
        (jaxjd.upgrad(PREFERENCE), jaxjd.upgrad(in_order)),
        (jaxjd.constant(weights=PREFERENCE), jaxjd.constant(in_order)),
        (jaxjd.cagrad(preference=PREFERENCE), jaxjd.cagrad(preference=in_order)),
        (jaxjd.stch(0.5, preference=PREFERENCE), jaxjd.stch(0.5, preference=in_order)),
    ]

    @jax.jit
    def updates(params, jac):
        def update(tx, mask, losses):
            state = tx.init(params)
            return tx.update(jac, state, params, mask=mask, losses=losses)[0]

        return (
            [update(named, mask, losses) for named, _ in pairs],
            [update(plain, present, flat) for _, plain in pairs],
        )

    jax.tree.map(np.testing.assert_array_equal, *updates(*setting()))


def test_the_primary_loss_by_name():
    """The weights are those of a Gramian in which it comes first."""
    levels = {"pde": 0.5, "initial": 0.1, "boundary": 0.3}
    params, jac = setting()
    order = jnp.asarray([2, 0, 1])  # pde, boundary, initial
    first = jaxjd.weighting.pcd(num_losses=3, tau=[0.3, 0.1])
    named = jaxjd.aggregate(
        jaxjd.weighting.pcd(num_losses=3, primary="pde", tau=levels)
    )
    placed = jaxjd.pcd(num_losses=3, primary=2, tau=[0.3, 0.1])

    @jax.jit
    def updates(params, jac):
        gramian = jac.gramian()[order][:, order]
        weights, _ = first.update(gramian, first.init())
        expected = jac.vjp(jnp.zeros(3).at[order].set(weights))
        found = [tx.update(jac, tx.init(params), params)[0] for tx in (named, placed)]
        return [expected, *found]

    expected, *found = map(models.ravel, updates(params, jac))
    for update in found:
        np.testing.assert_allclose(update, expected, rtol=1e-5, atol=1e-6)


def test_every_link_that_takes_a_mask_takes_its_names():
    aggregators = (
        jaxjd.graddrop(key=0),
        jaxjd.trimmed_mean(0),
        jaxjd.excess_mtl(num_losses=3),
        jaxjd.aggregate(jaxjd.weighting.upgrad(), every=2, num_losses=3),
        jaxjd.aggregate(jaxjd.weighting.upgrad(), group="leaf"),
    )

    @jax.jit
    def updates(params, jac):
        mask = {"pde": True, "initial": False, "boundary": True}
        in_order = jnp.asarray([True, False, True])  # boundary, initial, pde
        return [
            [tx.update(jac, tx.init(params), params, mask=x)[0] for tx in aggregators]
            for x in (mask, in_order)
        ]

    jax.tree.map(np.testing.assert_array_equal, *updates(*setting()))


def test_other_names_are_refused():
    params, jac = setting()
    wrong = {"pde": 1.0, "initial": 1.0, "bondary": 1.0}
    tx = jaxjd.upgrad(wrong)
    with pytest.raises(ValueError, match=r"`preference` must .*boundary.*bondary"):
        tx.update(jac, tx.init(params), params)
    tx = jaxjd.upgrad()
    with pytest.raises(ValueError, match=r"`mask` must .*boundary.*bondary"):
        tx.update(jac, tx.init(params), params, mask=dict.fromkeys(wrong, True))
    tx = jaxjd.aggregate(jaxjd.weighting.upgrad(wrong))
    with pytest.raises(ValueError, match=r"`preference` must have the names .*bondary"):
        tx.update(jac, tx.init(params), params)
    for options in ({"primary": "pdf"}, {"primary": "pde", "tau": wrong}):
        tx = jaxjd.aggregate(jaxjd.weighting.pcd(num_losses=3, **options))
        wanted = rf"`{[*options][-1]}` must .*'boundary', 'initial', 'pde'\).*(pdf|bon)"
        with pytest.raises(ValueError, match=wanted):
            tx.update(jac, tx.init(params), params)
    with pytest.raises(ValueError, match=r"`preference` must not be negative"):
        jaxjd.upgrad({**PREFERENCE, "pde": -1.0})


def test_a_name_needs_names():
    weighting = jaxjd.weighting.pcd(num_losses=2, primary="b")
    state, gramian = weighting.init(), jnp.eye(2)
    with pytest.raises(ValueError, match="`primary` is the name .*'b', and a Gramian"):
        weighting.update(gramian, state)
    with pytest.raises(ValueError, match=r"one of \('a', 'c'\). Got 'b'"):
        weighting.update(gramian, state, loss_names=("a", "c"))
    for primary, error, message in (
        (2, ValueError, "`primary` must be the index of one of the 2 losses. Got 2"),
        (-1, ValueError, "`primary` must be at least 0. Got -1"),
        (1.0, TypeError, "`primary` must be an integer. Got 1.0"),
    ):
        with pytest.raises(error, match=message):
            jaxjd.weighting.pcd(num_losses=2, primary=primary)


def test_names_are_paths():
    losses = {"b": jnp.zeros(2), "a": {"y": [jnp.zeros(()), jnp.zeros((1, 2))]}}
    jac = jaxjd.jac(lambda p: jax.tree.map(lambda x: p + x, losses))(jnp.ones(()))
    names = "a/y/0", "a/y/1/0/0", "a/y/1/0/1", "b/0", "b/1"
    assert jac._losses.names == names
    assert jaxjd.jac(lambda p: p)(jnp.ones(()))._losses.names == ("0",)
