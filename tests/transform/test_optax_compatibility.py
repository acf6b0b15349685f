"""optax's wrappers and links before, after and around an aggregator.

Each row of the tables in docs/optax.md is tested here: it gives the right update, or
raises an error that says what to do.
"""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from numpy.testing import assert_allclose
from optax.contrib import muon, schedule_free

import jaxjd
from tests.xla import VERSION

M = 5
PARAMS = {"w": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "b": jnp.array([0.25, -1.0])}
ROWS = {
    "w": jax.random.normal(jax.random.key(0), (M, 2, 2)),
    "b": jax.random.normal(jax.random.key(1), (M, 2)),
}


def losses(params):
    """Losses whose Jacobian is ROWS at every point."""
    products = [r.reshape(M, -1) @ params[k].ravel() for k, r in ROWS.items()]
    return products[0] + products[1]


def combined(weights_of=None):
    """Compute the update by hand in float32, with UPGrad's weights by default."""
    flat = jnp.concatenate([ROWS[k].reshape(M, -1) for k in ROWS], axis=1)
    weights = (weights_of or jaxjd.weighting.upgrad())(flat @ flat.T)
    return jax.tree.map(lambda rows: jnp.tensordot(weights, rows, 1), ROWS)


def eagerly(function):
    """Stand in for `jax.jit` and run each operation by itself."""
    return function


both_ways = pytest.mark.parametrize("jit", [jax.jit, eagerly])

JACOBIAN = "a Jacobian"
STACKED = "stacked gradients"


def given(kind):
    return jaxjd.jac(losses)(PARAMS) if kind == JACOBIAN else ROWS


def run(tx, updates, params=PARAMS, steps=1, jit=jax.jit):
    """Run some steps, jitted by default. Returns the last update."""

    @jit
    def update(updates, state, params):
        return tx.update(updates, state, params)

    state = tx.init(params)
    for _ in range(steps):
        result, state = update(updates, state, params)
    return result


def close(actual, expected):
    # The weights come from a float32 solver that stops at a few times machine epsilon.
    jax.tree.map(
        lambda a, b: assert_allclose(a, b, rtol=2e-5, atol=1e-6), actual, expected
    )


def after(link, steps=1):
    """Apply a link to the update computed by hand, without an aggregator."""
    return run(link, combined(), steps=steps)


both = pytest.mark.parametrize("kind", [JACOBIAN, STACKED])

AFTER = {
    "adam": optax.adam(1e-2),
    "sgd": optax.sgd(1e-2, momentum=0.9),
    "clip_by_global_norm": optax.clip_by_global_norm(0.1),
    "add_decayed_weights": optax.add_decayed_weights(0.1),
    "contrib.muon": muon(1e-2),
    "schedule": optax.scale_by_schedule(optax.linear_schedule(1.0, 0.1, 3)),
    "masked": optax.masked(optax.scale(0.5), {"w": True, "b": False}),
    "partition": optax.partition(
        {"a": optax.sgd(0.1), "b": optax.adam(0.2)}, {"w": "a", "b": "b"}
    ),
    "MultiSteps": optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation(),
    "apply_if_finite": optax.apply_if_finite(optax.adam(1e-2), 3),
    "zero_nans": optax.zero_nans(),
    "flatten": optax.flatten(optax.adam(1e-2)),
}


@both
@pytest.mark.parametrize("name", AFTER)
def test_after_the_aggregator(name, kind):
    # Constant weights compile quickly, and the choice of weights does not matter here.
    weights = [1.0, -0.5, 0.25, 2.0, 0.0]
    tx = optax.chain(jaxjd.constant(weights), AFTER[name])
    update = combined(jaxjd.weighting.constant(weights))
    expected = run(AFTER[name], update, steps=4)
    close(run(tx, given(kind), steps=4), expected)
    close(run(tx, given(kind), steps=4, jit=eagerly), expected)


@both
def test_alone(kind):
    close(run(jaxjd.upgrad(), given(kind)), combined())


@both
def test_inject_hyperparams(kind):
    @optax.inject_hyperparams
    def make(learning_rate):
        return optax.chain(jaxjd.upgrad(), optax.sgd(learning_rate))

    schedule = optax.linear_schedule(1.0, 0.0, 4)
    close(run(make(schedule), given(kind), steps=3), after(optax.sgd(0.5)))


@both
def test_schedule_free(kind):
    base = optax.sgd(0.1)
    tx = schedule_free(optax.chain(jaxjd.upgrad(), base), 0.1)
    close(run(tx, given(kind), steps=3), after(schedule_free(base, 0.1), steps=3))


@both
def test_lookahead(kind):
    fast = optax.LookaheadParams.init_synced(PARAMS)
    tx = optax.lookahead(optax.chain(jaxjd.upgrad(), optax.sgd(0.1)), 2, 0.5)
    expected = run(optax.lookahead(optax.sgd(0.1), 2, 0.5), combined(), fast, 2)
    close(run(tx, given(kind), fast, 2), expected)


@both
def test_named_chain(kind):
    tx = optax.named_chain(("rows", jaxjd.upgrad()), ("step", optax.sgd(0.1)))
    close(run(tx, given(kind)), after(optax.sgd(0.1)))


@both
def test_partition_of_jaxjd(kind):
    tx = jaxjd.partition(
        {"trunk": jaxjd.upgrad(), "head": optax.chain(jaxjd.sum(), optax.scale(2.0))},
        {"w": "trunk", "b": "head"},
    )
    flat = ROWS["w"].reshape(M, -1)
    weights = jaxjd.weighting.upgrad()(flat @ flat.T)
    expected = {
        "w": jnp.tensordot(weights, ROWS["w"], 1),
        "b": 2 * ROWS["b"].sum(0),
    }
    close(run(tx, given(kind)), expected)


def test_the_process_of_optax():
    """An aggregator works in `optax.experimental.aggregating.process`."""
    from optax.experimental import aggregating

    tx = aggregating.process(optax.identity(), jaxjd.upgrad(), optax.sgd(0.1))
    close(run(tx, ROWS), after(optax.sgd(0.1)))
    assert isinstance(jaxjd.upgrad(), aggregating.Aggregator)


@pytest.mark.filterwarnings("ignore:optax.global_norm is deprecated")
class TestBeforeAndAround:
    """Links that would have to understand a `Jacobian` raise an error."""

    ADVICE = re.escape(
        "put the aggregator, such as jaxjd.upgrad(), first in optax.chain"
    )

    @both_ways
    @pytest.mark.parametrize(
        "link",
        [
            optax.clip(1.0),
            optax.clip_by_global_norm(1.0),
            optax.adaptive_grad_clip(0.1),
            optax.stateless(
                lambda updates, params: optax.tree.scale(
                    1 / optax.global_norm(updates), updates
                )
            ),
            optax.scale(2.0),
            optax.add_decayed_weights(0.1),
            optax.adam(1e-3),
            optax.sgd(1e-3),
            optax.trace(0.9),
            optax.centralize(),
            optax.scale_by_sign(),
            muon(1e-3),
            optax.add_noise(0.1, 0.1, jax.random.key(0)),
        ],
    )
    def test_links_before(self, link, jit):
        with pytest.raises((TypeError, ValueError), match=self.ADVICE):
            run(optax.chain(link, jaxjd.upgrad()), given(JACOBIAN), jit=jit)

    def test_a_jacobian_that_a_jit_returned(self):
        """The guards against misuse survive a jit and a vmap."""
        jac = jax.jit(jaxjd.jac(losses))(PARAMS)
        with pytest.raises(TypeError, match=self.ADVICE):
            optax.global_norm(jac)
        several = jax.vmap(jaxjd.jac(losses))(jax.tree.map(lambda p: p[None], PARAMS))
        with pytest.raises(TypeError, match=self.ADVICE):
            optax.global_norm(several)
        close(run(jaxjd.mean(), jac), combined(jaxjd.weighting.mean()))

    @both_ways
    @pytest.mark.parametrize(
        "wrap",
        [
            lambda tx: optax.masked(tx, {"w": True, "b": False}),
            lambda tx: optax.partition({"a": tx, "b": tx}, {"w": "a", "b": "b"}),
            lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
            lambda tx: optax.apply_if_finite(tx, 3),
            optax.flatten,
        ],
    )
    def test_wrappers(self, wrap, jit):
        tx = wrap(optax.chain(jaxjd.upgrad(), optax.sgd(0.1)))
        # In JAX 0.8.0 `jax.tree.map` does not compare the kinds of two trees first.
        of_tree_map = "|Expected dict, got Jacobian" if VERSION < (0, 9) else ""
        message = self.ADVICE + of_tree_map
        with pytest.raises((TypeError, ValueError), match=message):
            run(tx, given(JACOBIAN), jit=jit)


class TestStackedGradients:
    """With plain arrays, a link before the aggregator sees all rows."""

    @both_ways
    def test_clipping_before_scales_the_whole_jacobian(self, jit):
        tx = optax.chain(optax.clip_by_global_norm(0.1), jaxjd.upgrad())
        norm = jnp.sqrt(sum(jnp.sum(rows**2) for rows in ROWS.values()))
        expected = jax.tree.map(lambda x: 0.1 / norm * x, combined())
        close(run(tx, ROWS, jit=jit), expected)

    @both_ways
    def test_weight_decay_before_is_a_part_of_every_loss(self, jit):
        tx = optax.chain(optax.add_decayed_weights(0.1), jaxjd.upgrad())
        rows = jax.tree.map(lambda r, p: r + 0.1 * p, ROWS, PARAMS)
        close(run(tx, ROWS, jit=jit), run(jaxjd.upgrad(), rows))

    @both_ways
    @pytest.mark.parametrize(
        "tx",
        [
            optax.masked(jaxjd.upgrad(), {"w": True, "b": False}),
            optax.partition(
                {"a": jaxjd.upgrad(), "b": optax.sgd(0.1)}, {"w": "a", "b": "b"}
            ),
        ],
    )
    def test_a_part_of_the_parameters(self, tx, jit):
        with pytest.raises(ValueError, match="Use `jaxjd.partition`"):
            run(tx, ROWS, jit=jit)

    @both_ways
    def test_multi_steps_around(self, jit):
        tx = optax.MultiSteps(jaxjd.upgrad(), 2).gradient_transformation()
        # optax 0.2.7 compares the shapes first.
        message = "an ordinary gradient|branches must have equal output types"
        with pytest.raises((TypeError, ValueError), match=message):
            run(tx, ROWS, jit=jit)

    @both_ways
    def test_apply_if_finite_around(self, jit):
        # optax's own error: it compares the shapes before it calls the aggregator.
        with pytest.raises(TypeError, match="branch"):
            run(optax.apply_if_finite(jaxjd.upgrad(), 3), ROWS, jit=jit)


def test_the_table_names_what_is_tested():
    table = (Path(__file__).parents[2] / "docs" / "optax.md").read_text()
    for name in [*AFTER, "inject_hyperparams", "schedule_free", "lookahead"]:
        assert f"`{name}`" in table, name
