"""A policy for a vector of rewards: reach the goal, save energy, keep off the rocks.

A boat starts at random places and is pushed towards its goal, which lies behind rocks.
In every step it gets three rewards. Each has a policy gradient (REINFORCE, with the
mean return at that time as the baseline), and the aggregator makes one update of them.
Environment, episodes and training are one compiled function.

    python examples/vector_reward_rl.py
    python examples/vector_reward_rl.py --updates 1000

It prints the mean returns, and draws courses of the boat into
`out/vector_reward_rl.png`. `pip install '.[examples]'` installs what it needs.
"""

import argparse
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich
from jaxtyping import Array, Float, Key, PyTree
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from rich.progress import track
from rich.table import Table

import jaxjd

REWARDS = ("goal", "energy", "rocks")
GOAL, ROCKS, RADIUS = jnp.array([1.0, 0.0]), jnp.array([0.0, 0.1]), 0.35
HORIZON, EPISODES, CHUNK = 20, 128, 10
NOISE = 0.3  # The standard deviation of the actions around their mean.
AGGREGATORS = {"mean": jaxjd.mean(), "upgrad": jaxjd.upgrad()}
AGGREGATORS["conflict_free"] = jaxjd.conflict_free()


def reset(key: Key[Array, ""]) -> Float[Array, "2"]:
    return jnp.array([-1.0, 0.0]) + jax.random.uniform(key, (2,), minval=-0.3) * 0.5


def move(boat: Array, action: Array) -> tuple[Float[Array, "2"], Float[Array, "3"]]:
    boat = boat + 0.2 * jnp.tanh(action)
    aground = jnp.sum((boat - ROCKS) ** 2) < RADIUS**2
    energy, distance = 0.1 * jnp.sum(action**2), jnp.linalg.norm(boat - GOAL)
    return boat, -jnp.stack([distance, energy, aground])


def init(key: Key[Array, ""]) -> PyTree:
    w1, zeros = jax.random.normal(key, (2, 32)), jnp.zeros((32, 2))
    return {"w1": w1, "b1": zeros[:, 0], "w2": zeros, "b2": zeros[0]}


def mean_action(params: PyTree, boat: Float[Array, "*n 2"]) -> Float[Array, "*n 2"]:
    return jnp.tanh(boat @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


def episode(params: PyTree, key: Key[Array, ""]) -> tuple[Array, Array, Array]:
    """The places, the actions and the rewards at each time."""

    def act(boat, key):
        action = mean_action(params, boat) + NOISE * jax.random.normal(key, (2,))
        after, rewards = move(boat, action)
        return after, (boat, action, rewards)

    start, *keys = jax.random.split(key, HORIZON + 1)
    return jax.lax.scan(act, reset(start), jnp.stack(keys))[1]


def losses(params: PyTree, boats: Array, actions: Array, rewards: Array) -> dict:
    """Minus the returns' surrogates, whose gradients are the policy gradients."""
    to_go = jnp.cumsum(rewards[:, ::-1], axis=1)[:, ::-1]  # [episodes, times, 3]
    advantages = to_go - to_go.mean(axis=0)
    log_p = -jnp.sum((actions - mean_action(params, boats)) ** 2, -1) / (2 * NOISE**2)
    surrogates = -(advantages * log_p[..., None]).sum(axis=1).mean(axis=0)
    return dict(zip(REWARDS, surrogates, strict=True))


@functools.partial(jax.jit, static_argnames="tx")
def train(params, state, key, *, tx):
    def step(carry, key):
        params, state = carry
        keys = jax.random.split(key, EPISODES)
        played = jax.vmap(episode, (None, 0))(params, keys)
        jac = jaxjd.jac(losses)(params, *played)
        updates, state = tx.update(jac, state, params)
        returns = played[2].sum(axis=1).mean(axis=0)
        return (optax.apply_updates(params, updates), state), returns

    return jax.lax.scan(step, (params, state), jax.random.split(key, CHUNK))


def main(argv: list[str] | None = None) -> dict[str, np.ndarray]:
    """Returns the three mean returns in every update, by aggregator."""
    options = parse_options(argv)
    returns, courses = {}, {}
    for name, aggregator in AGGREGATORS.items():
        tx = optax.chain(aggregator, optax.adam(1e-2))
        params = init(jax.random.key(0))
        state, seen = tx.init(params), []
        for chunk in track(range(0, options.updates, CHUNK), f"{name:>13}"):
            key = jax.random.fold_in(jax.random.key(1), chunk)
            (params, state), of_updates = train(params, state, key, tx=tx)
            seen.append(np.asarray(of_updates))
        returns[name] = np.concatenate(seen)
        keys = jax.random.split(jax.random.key(2), 12)
        courses[name] = np.asarray(jax.vmap(episode, (None, 0))(params, keys)[0])
    table = Table("", *REWARDS, title=f"Mean returns, of {CHUNK} updates")
    for name, values in ({"at first": returns["mean"][:CHUNK]} | returns).items():
        table.add_row(name, *(f"{x:.2f}" for x in values[-CHUNK:].mean(axis=0)))
    rich.print(table)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "vector_reward_rl.png"
    draw(returns, courses).savefig(path, dpi=100)
    print(f"The courses are in {path}")
    return returns


def draw(returns: dict[str, np.ndarray], courses: dict[str, np.ndarray]) -> Figure:
    figure = Figure(figsize=(10, 6), layout="constrained")
    upper, lower = figure.subplots(2, 3)  # As many aggregators as rewards.
    for i, axes in enumerate(upper):
        for name, values in returns.items():
            axes.plot(values[:, i], label=name)
        axes.set(title=f"return: {REWARDS[i]}", xlabel="update")
        axes.grid(alpha=0.3)
    for axes, (name, places) in zip(lower, courses.items(), strict=True):
        axes.add_patch(Circle(tuple(np.asarray(ROCKS)), RADIUS, color="lightgray"))
        axes.plot(*places.transpose(2, 1, 0), color="tab:blue", alpha=0.5)
        axes.plot(*GOAL, "*", color="tab:orange", markersize=14)
        axes.set(title=f"courses: {name}", xlim=(-1.5, 1.5), ylim=(-1, 1), aspect=1)
    upper[0].legend()
    return figure


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--updates", type=int, default=300, help="in calls of 10 (default: 300)")
    add("--output", type=Path, default=Path("out"), help="folder (default: out)")
    options = parser.parse_args(argv)
    if options.updates < 1:
        parser.error(f"argument --updates: expected at least 1, got {options.updates}")
    return options


if __name__ == "__main__":
    main()
