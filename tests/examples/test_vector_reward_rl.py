"""The rewards are those that the text promises, and the returns improve."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.examples.running import example, run

program = example("vector_reward_rl")


def test_moves_and_rewards():
    boat, rewards = program.move(jnp.array([0.0, 0.3]), jnp.array([0.0, -2.0]))
    place = [0.0, 0.3 - 0.2 * np.tanh(2.0)]
    np.testing.assert_allclose(boat, place, rtol=1e-6)
    # On the rocks, which are around (0, 0.1).
    expected = [-np.hypot(1.0, place[1]), -0.1 * 4.0, -1.0]
    np.testing.assert_allclose(rewards, expected, rtol=1e-6)
    _, away = program.move(jnp.array([0.9, 0.0]), jnp.zeros(2))
    np.testing.assert_allclose(away, [-0.1, 0.0, 0.0], atol=1e-6)


@pytest.mark.slow
def test_the_gradients_are_policy_gradients():
    """REINFORCE, summed by hand over two episodes."""
    params = program.init(jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), 2)
    played = jax.vmap(program.episode, (None, 0))(params, keys)
    boats, actions, rewards = played
    got = jax.jacrev(lambda p: program.losses(p, *played)["goal"])(params)["b2"]
    mean = np.asarray(program.mean_action(params, boats))
    # The gradient of log p with respect to the mean action, which is that of b2.
    score = (np.asarray(actions) - mean) / program.NOISE**2
    to_go = np.asarray(rewards)[:, ::-1, 0].cumsum(axis=1)[:, ::-1]
    advantage = to_go - to_go.mean(axis=0)
    expected = -(advantage[..., None] * score).sum(axis=1).mean(axis=0)
    np.testing.assert_allclose(got, expected, rtol=1e-4)


@pytest.mark.slow
def test_trains_and_draws(tmp_path):
    returns = run(program, tmp_path, "--updates", "20")
    assert list(returns) == ["mean", "upgrad", "conflict_free"]
    for values in returns.values():
        assert values.shape == (20, 3)
        assert (values <= 0).all()
    # The same policy, the same episodes.
    np.testing.assert_allclose(returns["upgrad"][0], returns["mean"][0], rtol=1e-5)
