"""The scale falls and grows as it should, and a step that overflows changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.examples.running import example, run

pytest.importorskip("mlxtend")
program = example("mixed_precision")


def test_the_scale_halves_and_doubles():
    scale = program.Scale(jnp.float32(8), jnp.int32(0))
    seen = []
    for finite in (True, True, False, True, True, True):
        scale = scale.after(jnp.asarray(finite), patience=3)
        seen.append((float(scale.value), int(scale.finite_steps)))
    assert seen == [(8, 1), (8, 2), (4, 0), (4, 1), (4, 2), (8, 0)]


@pytest.mark.slow
def test_an_overflow_is_skipped():
    params = program.init(jax.random.key(0))
    state = program.ADAM.init(params)
    images = jax.random.uniform(jax.random.key(1), (4, 784))
    how = {"aggregator": program.AGGREGATORS["mean"], "patience": 2}
    how |= {"dtype": jnp.float16}
    scale = program.Scale(jnp.float32(2.0**40), jnp.int32(0))
    args = images, np.arange(4)
    after, state, scale, _ = program.step(params, state, scale, *args, **how)
    jax.tree.map(np.testing.assert_array_equal, after, params)
    assert scale.value == 2.0**39
    scale = program.Scale(jnp.float32(2.0**10), jnp.int32(0))
    after, _, scale, loss = program.step(params, state, scale, *args, **how)
    assert not np.array_equal(after[0]["w"], params[0]["w"])
    assert scale == (2.0**10, 1)
    each = jax.vmap(program.loss, (None, 0, 0, None))(params, *args, jnp.float32)
    assert loss == pytest.approx(float(each.mean()), rel=1e-2)  # float16 beside it.


@pytest.mark.slow
def test_trains_and_draws(tmp_path):
    curves = run(program, tmp_path, "--steps", "6", "--scale", "1e9")
    assert len(curves) == 8
    assert all(values.shape == (6, 2) for values in curves.values())
    float32, bfloat16 = curves["upgrad, float32"], curves["upgrad, bfloat16"]
    # The first loss, to the precision of bfloat16.
    assert bfloat16[0, 0] == pytest.approx(float32[0, 0], rel=2e-2)
    assert curves["upgrad, float16, scaled"][-1, 1] < 1e9
