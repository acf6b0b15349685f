r"""A policy for a vector of rewards, by policy gradients from sampled episodes.

- Resource gathering (Barrett & Narayanan, 2008, doi 10.1145/1390156.1390162): an agent
  leaves home to bring back gold and gems, and enemies may attack on the short ways. The
  three objectives are gold, gems, and not to be attacked. One policy, one kind of
  episode, three rewards.
- Five goals: an agent is told which of five cells of a maze it should reach and stay
  at. One policy, five tasks, each with episodes and a reward of its own.

The losses are how far the returns are from the best possible, from 0 to 1. Their
gradients are estimated by REINFORCE with the mean return as the baseline. The results
are exact: the expected returns of the policy, from the transition probabilities.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from benchmarks.quality._methods import FEW
from benchmarks.quality._networks import Layers, dense_layers, tanh_network
from benchmarks.quality._problem import Measure, Problem

OBJECTIVES = ("gold", "gem", "safety")  # Of resource gathering, in the order of rows.
MOVES = np.array([[-1, 0], [1, 0], [0, -1], [0, 1]])


class World(NamedTuple):
    """A Markov decision process with k rewards, where an action has two outcomes."""

    next_state: Int[np.ndarray, "s a 2"]
    chance: Float[np.ndarray, "s a"]
    """Of the second outcome."""
    reward: Float[np.ndarray, "s a 2 k"]
    starts: Int[np.ndarray, " g"]
    """The first states: one for each kind of episode."""
    features: Float[np.ndarray, "s f"]
    """What the policy sees of a state."""
    horizon: int
    episodes: int
    """In a batch, of each kind."""
    entropy: float
    """The weight of the policy's entropy, summed over an episode, in every loss."""

    @property
    def expected_reward(self) -> Float[np.ndarray, "s a k"]:
        chance = self.chance[..., None]
        return (1 - chance) * self.reward[:, :, 0] + chance * self.reward[:, :, 1]


def resource_gathering() -> World:
    side, home, gold, gem = 5, (4, 2), (0, 2), (1, 4)
    enemies, attacked = {(0, 3), (1, 2)}, 0.1

    def index(cell: tuple[int, int], has_gold: bool, has_gem: bool) -> int:
        return (cell[0] * side + cell[1]) * 4 + 2 * has_gold + has_gem

    states = 4 * side**2
    next_state = np.zeros((states, 4, 2), int)
    chance = np.zeros((states, 4))
    reward = np.zeros((states, 4, 2, 3))
    for row, column, has_gold, has_gem in np.ndindex(side, side, 2, 2):
        s = index((row, column), bool(has_gold), bool(has_gem))
        for a, move in enumerate(MOVES):
            r, c = np.clip(np.array([row, column]) + move, 0, side - 1).tolist()
            cell, bags = (r, c), (has_gold or (r, c) == gold, has_gem or (r, c) == gem)
            if cell == home:
                reward[s, a, :, :2] = bags
                bags = (False, False)
            next_state[s, a] = index(cell, *map(bool, bags)), index(home, False, False)
            if cell in enemies:
                chance[s, a] = attacked
                reward[s, a, 1, 2] = -1
    start = np.array([index(home, False, False)])
    return World(next_state, chance, reward, start, np.eye(states), 30, 64, 0.01)


def five_goals() -> World:
    # Each goal is beside a wall, which an agent walks against to stay.
    maze = ["...#...", "...#...", ".......", "##.#.##", ".......", "...#...", "...#..."]
    side, goals = len(maze), [(0, 0), (0, 6), (6, 0), (6, 6), (4, 3)]
    tasks = len(goals)
    states = tasks * side**2
    next_state = np.zeros((states, 4, 2), int)
    reward = np.zeros((states, 4, 2, tasks))
    features = np.zeros((states, side**2 + tasks))
    for task, row, column in np.ndindex(tasks, side, side):
        s = (task * side + row) * side + column
        features[s, [row * side + column, side**2 + task]] = 1
        for a, move in enumerate(MOVES):
            r, c = np.clip(np.array([row, column]) + move, 0, side - 1).tolist()
            if maze[r][c] == "#":
                r, c = row, column
            next_state[s, a] = (task * side + r) * side + c
            reward[s, a, :, task] = (r, c) == goals[task]
    starts = np.arange(tasks) * side**2 + 3 * side + 2
    chance = np.zeros((states, 4))
    return World(next_state, chance, reward, starts, features, 20, 16, 0.003)


def extremes(world: World, sign: int) -> Float[np.ndarray, " k"]:
    """The best expected return of each objective alone, or with sign -1 the worst."""
    expected = sign * world.expected_reward
    chance = world.chance[..., None]
    values = np.zeros((len(world.next_state), expected.shape[-1]))
    for _ in range(world.horizon):
        after = values[world.next_state]
        after = (1 - chance) * after[:, :, 0] + chance * after[:, :, 1]
        values = (expected + after).max(axis=1)
    return sign * values[world.starts].sum(axis=0)


def log_policy(world: World, layers: Layers) -> Float[Array, "s a"]:
    return jax.nn.log_softmax(tanh_network(layers, jnp.float32(world.features)))


def expected_returns(world: World, layers: Layers) -> Float[Array, " k"]:
    """Exact, summed over the kinds of episodes."""
    policy = jnp.exp(log_policy(world, layers))
    moves = jnp.stack([1 - world.chance, world.chance], axis=-1).astype(jnp.float32)
    expected = jnp.float32(world.expected_reward)
    first = jnp.zeros(len(policy)).at[world.starts].add(1.0)

    def move(where, _):
        flow = where[:, None] * policy
        returns = jnp.einsum("sa,sak->k", flow, expected)
        after = jnp.zeros_like(where).at[world.next_state].add(flow[..., None] * moves)
        return after, returns

    _, returns = lax.scan(move, first, length=world.horizon)
    return returns.sum(axis=0)


def returns_to_go(
    world: World, policy: Float[Array, "s a"], drawn: Float[Array, "t 2 g e"]
) -> tuple[Int[Array, "t g e"], Int[Array, "t g e"], Float[Array, "t g e k"]]:
    """Sample episodes by uniform random numbers: states, actions, returns from then."""
    upto = jnp.cumsum(policy, axis=1)[:, :-1]
    first = jnp.broadcast_to(jnp.asarray(world.starts)[:, None], drawn.shape[2:])
    chance, reward = jnp.float32(world.chance), jnp.float32(world.reward)

    def act(state, numbers):
        action = (numbers[0][..., None] > upto[state]).sum(axis=-1)
        outcome = (numbers[1] < chance[state, action]).astype(int)
        after = jnp.asarray(world.next_state)[state, action, outcome]
        return after, (state, action, reward[state, action, outcome])

    _, (states, actions, rewards) = lax.scan(act, first, drawn)
    return states, actions, jnp.cumsum(rewards[::-1], axis=0)[::-1]


def problem(name: str) -> Problem:
    world = {"resources": resource_gathering, "goals": five_goals}[name]()
    best, worst = (jnp.float32(extremes(world, sign)) for sign in (1, -1))
    kinds, k = len(world.starts), world.reward.shape[-1]

    def batch(key):
        shape = (world.horizon, 2, kinds, world.episodes)
        return (jax.random.uniform(key, shape),)

    def losses(layers, drawn):
        table = log_policy(world, layers)
        policy = lax.stop_gradient(jnp.exp(table))
        states, actions, returns = returns_to_go(world, policy, drawn)
        returns = returns / (best - worst)
        advantages = returns - returns.mean(axis=2, keepdims=True)
        chosen = table[states, actions]
        surrogate = -(advantages * chosen[..., None]).mean(axis=2).sum(axis=(0, 1))
        entropy = -(jnp.exp(table) * table).sum(axis=1)[states]
        surrogate -= world.entropy * entropy.mean(axis=2).sum()
        value = best / (best - worst) - returns[0].mean(axis=1).sum(axis=0)
        return value + surrogate - lax.stop_gradient(surrogate)

    def measure(layers):
        away = (best - expected_returns(world, layers)) / (best - worst)
        # No data set to hold out: the same expectation chooses the rate.
        each = dict(zip(OBJECTIVES, away, strict=True)) if name == "resources" else {}
        mean = away.mean()
        return {"validation": mean, "regret": mean, "worst": away.max(), **each}

    titles = {
        "resources": "Resource gathering, three rewards",
        "goals": "Five goals, one policy",
    }
    of_each = {"resources": "objective", "goals": "task"}[name]
    return Problem(
        title=titles[name],
        num_losses=k,
        steps=1000,
        rates=(3e-3, 1e-2, 3e-2, 1e-1),
        init=lambda key: dense_layers(key, (world.features.shape[1], 32, 4)),
        batch=batch,
        seeds={"resources": 10, "goals": 5}[name],
        losses=losses,
        measure=measure,
        measures={
            "regret": Measure(f"regret, mean of the {of_each}s", percent=True),
            "worst": Measure(f"of the worst {of_each}", percent=True),
        },
        methods=FEW,
    )
