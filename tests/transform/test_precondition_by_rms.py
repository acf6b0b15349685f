"""Aggregation with scales by coordinate, against J P Jᵀ of rows by brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.ad_checkpoint import checkpoint_name
from numpy.testing import assert_allclose, assert_array_equal

import jaxjd
from tests import models

UPGRAD = jaxjd.weighting.upgrad()
BETA, EPS = 0.9, 1e-3
AXES = (None, 0, 0)
SEVERAL = {
    "dense": {"method": "dense"},
    "chunked": {"method": "chunked", "chunk_size": 4},
    "structured": {"method": "structured"},
}


def expected(rows, weighting=UPGRAD, present=None):
    """The steps of rows [steps, m, n], by numpy."""
    nu, found = np.zeros(rows.shape[-1]), []
    for n, J in enumerate(np.asarray(rows)):
        if present is not None:
            J = J[present[n]]
        nu = BETA * nu + (1 - BETA) * np.mean(J**2, axis=0)
        P = np.diag(1 / (np.sqrt(nu / (1 - BETA ** (n + 1))) + EPS))
        found.append(P @ J.T @ np.asarray(weighting(jnp.asarray(J @ P @ J.T))))
    return np.stack(found)


def steps(tx, jacobians, masks=None):
    """The updates of a `scan` over points, without moving the parameters."""

    def step(state, given):
        params, mask = given
        jac = jacobians(params)
        update, state = tx.update(jac, state, params, mask=mask)
        return state, (models.ravel(update), models.ravel_rows(jac.dense()))

    def run(points):
        first = jax.tree.map(lambda p: p[0], points)
        return jax.lax.scan(step, tx.init(first), (points, masks))[1]

    return run


def points(number=3, dtype=jnp.float64):
    scales = jnp.linspace(0.5, 1.5, number, dtype=dtype)
    return jax.vmap(lambda s: jax.tree.map(lambda p: s * p, models.parameters(dtype)))(
        scales
    )


def test_the_weights_are_those_of_scaled_rows(x64):
    """By every method, of the losses of examples and of two functions."""
    x, y = models.examples(4)
    tx = jaxjd.precondition_by_rms(jaxjd.upgrad(), BETA, EPS)

    def jacobians(options):
        return lambda params: jaxjd.jac(models.task_losses, in_axes=AXES, **options)(
            params, x, y
        )

    def joined(params):
        of_examples = jacobians(SEVERAL["structured"])(params)
        of_mean = jaxjd.jac(lambda p: models.hidden(p, x).mean())(params)
        return jaxjd.concatenate([of_examples, of_mean])

    @jax.jit
    def run(points):
        found = {
            name: steps(tx, jacobians(options))(points)
            for name, options in SEVERAL.items()
        }
        return found | {"concatenated": steps(tx, joined)(points)}

    for name, (updates, rows) in run(points()).items():
        # The noise of UPGrad is 2^-23 of the norms, and its solver as exact as that.
        reference = expected(rows)
        assert_allclose(
            updates, reference, atol=1e-6 * abs(reference).max(), err_msg=name
        )
        changes = np.einsum("smn,sn->sm", rows, updates)
        assert changes.min() > -1e-6 * changes.max()


@pytest.mark.parametrize("b", [0.0, 0.999])
def test_one_loss_is_adam_without_momentum(x64, b):
    rng = np.random.default_rng(0)
    params = {"a": jnp.zeros(4), "b": jnp.zeros((2, 3))}
    ours = jaxjd.precondition_by_rms(jaxjd.sum(), b)
    theirs = optax.scale_by_adam(b1=0.0, b2=b)
    state, other = ours.init(params), theirs.init(params)
    for _ in range(3):
        gradient = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), params)
        row = jax.tree.map(lambda g: g[None], gradient)
        update, state = ours.update(row, state, params)
        with jax.numpy_dtype_promotion("standard"):  # optax needs it.
            reference, other = theirs.update(gradient, other, params)
        jax.tree.map(lambda *x: assert_allclose(*x, rtol=1e-12), update, reference)


def test_a_missing_loss_has_no_part(x64):
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(3, 4, 6))
    masks = np.ones((4, 4), bool)
    masks[0, 1] = masks[2, 3] = False
    masks[3] = False
    params = jnp.zeros(6)
    tx = jaxjd.precondition_by_rms(jaxjd.upgrad(), BETA, EPS)
    state, found = tx.init(params), []
    for J, mask in zip(rows, masks[:3], strict=True):
        update, state = tx.update(jnp.asarray(J), state, params, mask=mask)
        found.append(update)
    reference = expected(rows, present=masks)
    assert_allclose(np.stack(found), reference, atol=1e-6)
    # Without any loss, or with a batch that is not finite, the average stays.
    for J, mask, value in [(rows[0], masks[3], 0), (rows[0] * np.nan, None, np.nan)]:
        update, new = tx.update(jnp.asarray(J), state, params, mask=mask)
        assert_array_equal(update, np.full(6, value))
        jax.tree.map(assert_array_equal, new, state)


def test_other_aggregators(x64):
    """Groups have weights of their own, and the rows are scaled for GradDrop too."""
    rng = np.random.default_rng(2)
    J = rng.normal(size=(1, 3, 5))
    params = {"a": jnp.zeros(2), "b": jnp.zeros(3)}
    rows = {"a": jnp.asarray(J[0, :, :2]), "b": jnp.asarray(J[0, :, 2:])}
    own = np.concatenate([expected(J[..., :2]), expected(J[..., 2:])], axis=1)[0]
    labels = {"a": "first", "b": "second"}
    for aggregator in (
        jaxjd.aggregate(UPGRAD, group="leaf", every=2, num_losses=3),
        jaxjd.partition({"first": jaxjd.upgrad(), "second": jaxjd.upgrad()}, labels),
    ):
        tx = jaxjd.precondition_by_rms(aggregator, BETA, EPS)
        update, _ = tx.update(rows, tx.init(params), params)
        assert_allclose(models.ravel(update), own, atol=1e-6)
    tx = jaxjd.precondition_by_rms(jaxjd.trimmed_mean(1), BETA, EPS)
    update, _ = tx.update(rows, tx.init(params), params)
    P = 1 / (np.sqrt(np.mean(J[0] ** 2, axis=0)) + EPS)
    assert_allclose(models.ravel(update), np.median(J[0], axis=0) * P, rtol=1e-12)


def test_bfloat16_parameters():
    x, y = models.examples(3, jnp.bfloat16)
    tx = jaxjd.precondition_by_rms(jaxjd.upgrad(), BETA, EPS)
    jacobian = jaxjd.jac(models.loss, in_axes=AXES)
    run = jax.jit(steps(tx, lambda params: jacobian(params, x, y)))
    updates, rows = run(points(2, jnp.bfloat16))
    assert updates.dtype == jnp.bfloat16
    # Weights depend on rows that are rounded to 2^-9, here with a condition below 8.
    reference = expected(rows.astype(jnp.float32))
    apart = np.abs(updates.astype(jnp.float32) - reference).max()
    assert apart < 2**-6 * np.abs(reference).max()


def test_no_loss_increases_where_it_does_after_the_plain_aggregator():
    """Tasks of an MLP on different scales and features, from three seeds at once."""
    z = jax.random.normal(jax.random.key(1), (32, 6))
    x = z * jnp.logspace(-1, 1, 6)[None]
    targets = jnp.sin(z[:, :5]).T * jnp.array([10, 1, 0.1, 1, 10])[:, None]

    def losses(params, x):
        y = jnp.tanh(x @ params["in"]) @ params["out"]
        return jnp.square(y[None] - targets).mean(1)

    def worst(tx):
        def train(key):
            keys = jax.random.split(key)
            params = {
                "in": jax.random.normal(keys[0], (6, 8)) / 3,
                "out": jax.random.normal(keys[1], (8,)) / 3,
            }

            def step(carry, _):
                params, state = carry
                _, jac = jaxjd.value_and_jac(losses)(params, x)
                updates, state = tx.update(jac, state, params)
                shown = jaxjd.conflicts(jac, updates)
                return (optax.apply_updates(params, updates), state), shown.worst

            return jax.lax.scan(step, (params, tx.init(params)), None, 200)[1]

        return jax.vmap(train)

    rms = optax.scale_by_rms(decay=0.999, bias_correction=True)
    ours = optax.chain(jaxjd.precondition_by_rms(jaxjd.upgrad()), optax.sgd(3e-3))
    plain = optax.chain(jaxjd.upgrad(), rms, optax.sgd(3e-3))
    both = jax.jit(lambda keys: (worst(ours)(keys), worst(plain)(keys)))
    found, chained = both(jax.random.split(jax.random.key(0), 3))
    assert found.max() <= 1e-3
    assert (chained.max(axis=1) > 0.1).all()


def test_the_parameters_of_a_flax_model():
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    x = jnp.arange(12.0).reshape(4, 3)
    tx = optax.chain(jaxjd.precondition_by_rms(jaxjd.upgrad()), optax.sgd(1e-3))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    def losses(model):
        return {"a": (model(x) ** 2).sum(), "b": model(x)[0, 0]}

    before = losses(model)
    for _ in range(2):
        _, jac = jaxjd.nnx.value_and_jac(losses)(model)
        optimizer.update(model, jac)
    assert all(losses(model)[name] < before[name] for name in before)


def test_errors():
    params, J = jnp.zeros(2), jnp.ones((3, 2))
    with pytest.raises(TypeError, match="`aggregator` must be a transformation"):
        jaxjd.precondition_by_rms(UPGRAD)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`decay` must be in \[0, 1\)"):
        jaxjd.precondition_by_rms(jaxjd.upgrad(), decay=1.0)
    with pytest.raises(ValueError, match=r"`eps` must be in \[0, inf\)"):
        jaxjd.precondition_by_rms(jaxjd.upgrad(), eps=-1.0)
    tx = jaxjd.precondition_by_rms(jaxjd.upgrad())
    state = tx.init(params)
    with pytest.raises(ValueError, match="an ordinary gradient"):
        tx.update(params, state, params)
    with pytest.raises(ValueError, match="`mask`"):
        tx.update(J, state, params, mask=jnp.ones(2, bool))
    with pytest.raises(ValueError, match="with respect to the parameters that `init`"):
        tx.update(jnp.ones((2, 3)), state, jnp.zeros(3))
    features = jaxjd.aggregate(UPGRAD, features="h")
    tx = jaxjd.precondition_by_rms(features)

    def losses(params):
        h = checkpoint_name(jnp.tanh(params), "h")
        return jnp.stack([h[0], h.sum()])

    with pytest.raises(ValueError, match="its scales are those of parameters"):
        tx.update(jaxjd.jac(losses)(params), tx.init(params), params)
