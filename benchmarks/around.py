"""What the options of an aggregator cost, beside the step without them.

    python -m benchmarks.around [--quick]

- diagnostics: the step of UPGrad with `diagnostics=True`, beside that without. By hand:
  `jaxjd.diagnostics` of a Gramian and weights that the step computes. On the MLP trunk
  of `benchmarks.tasks` with 8 losses.
- every: ten steps of UPGrad with `every=10`, one of which computes weights, beside ten
  steps along the sum of the losses. By hand: the gradients of all losses in the first
  step, and the gradient of the weighted sum in the others. On the same trunk.
- group: the step of UPGrad with `group="layer"`, beside that of one group. By hand: a
  `jaxjd.partition` with an aggregator for each layer. On an MLP of 30 layers of 128
  units, with 4 losses and 256 examples.
- wrt: the step of UPGrad with weights from the last layer of the trunk, with the
  default method and with `method="chunked"`, beside that with weights from the whole
  trunk. By hand: the gradients of all losses in that layer, and one gradient of the
  weighted sum. On the same trunk as diagnostics.

Every step includes Adam, and every number is the median ratio of pairs of runs one
right after the other, in one process. Before they are timed, the steps are checked to
be the same. The script writes `around.md` and `around.json` to the folder `results`
beside this file.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxjd
from benchmarks._results import FOLDER, save
from benchmarks._tasks import Tasks, dense, dense_layers, mlp_trunk
from benchmarks._timing import machine, paired
from benchmarks.tasks import RATE, UPGRAD, combine, gramian, of_sum

K = 10  # Weights in every tenth step.
DEPTH, WIDTH = 30, 128
# Relative to the length of the step; weights are as exact as float32 allows.
TOLERANCE = 1e-4


def compiled(step: Callable[..., Any], tx: Any, tasks: Tasks, steps: int) -> Any:
    """Run some steps from the start, and return what is left."""
    start = tasks.params, tx.init(tasks.params)
    once = jax.jit(step).lower(*start, *tasks.data).compile()

    def run() -> Any:
        carry = start
        for _ in range(steps):
            carry = once(*carry, *tasks.data)
        return jax.block_until_ready(carry)

    return run


def step_of(
    tasks: Tasks,
    tx: Any,
    gradient: Callable[..., Any] | None = None,
    method: Any = "auto",
) -> Any:
    """A step along the Jacobian, or along a gradient."""

    def step(params, state, *data):
        if gradient is None:
            of = jaxjd.value_and_jac(tasks.losses, method=method)
            _, found = of(params, *data)
        else:
            found = gradient(params, *data)
        updates, state = tx.update(found, state, params)
        return optax.apply_updates(params, updates), state

    return step


def in_trunk(aggregator: Any) -> Any:
    groups: Any = {"shared": aggregator, "own": jaxjd.sum()}
    return jaxjd.partition(groups, {"trunk": "shared", "heads": "own"})


def with_adam(aggregator: Any) -> Any:
    return optax.chain(aggregator, optax.adam(RATE))


def diagnostics(rounds: int) -> dict[str, float]:
    tasks = mlp_trunk(8)
    kept = jaxjd.aggregate(UPGRAD, diagnostics=True, num_losses=8)
    plain, shown = (with_adam(in_trunk(x)) for x in (jaxjd.upgrad(), kept))
    label = {"trunk": True, "heads": False}

    def by_hand(params, state, *data):
        _, jac = jaxjd.value_and_jac(tasks.losses)(params, *data)
        updates, state = plain.update(jac, state[0], params)
        found = jac.restrict(label).gramian()
        described = jaxjd.diagnostics(found, UPGRAD(found))
        return optax.apply_updates(params, updates), (state, described)

    start = jaxjd.diagnostics(jnp.eye(8), jnp.ones(8))
    of_hand: Any = optax.GradientTransformation(
        lambda params: (plain.init(params), start),
        lambda *_: None,  # type: ignore
    )
    return ratios(
        {
            "without": compiled(step_of(tasks, plain), plain, tasks, 1),
            "jaxjd": compiled(step_of(tasks, shown), shown, tasks, 1),
            "by hand": compiled(by_hand, of_hand, tasks, 1),
        },
        rounds,
    )


def every(rounds: int) -> dict[str, float]:
    tasks = mlp_trunk(8)
    adam = optax.adam(RATE)
    sometimes = with_adam(
        in_trunk(jaxjd.aggregate(UPGRAD, every=K, num_losses=tasks.m))
    )

    def losses_of(params, *data):
        return jnp.stack(jax.tree.leaves(tasks.losses(params, *data)))

    def by_hand(params, state, *data):
        adams, weights, age = state

        def fresh(_):
            rows = [
                jax.grad(lambda p, i=i: losses_of(p, *data)[i])(params)
                for i in range(tasks.m)
            ]
            trunks = [row["trunk"] for row in rows]
            found = UPGRAD(gramian(trunks))
            heads = jax.tree.map(lambda *x: sum(x), *[row["heads"] for row in rows])
            return {"trunk": combine(trunks, found), "heads": heads}, found

        def reused(weights):
            # One backward pass through the trunk, and one through the heads.
            shared: Any = tasks.shared
            features, pullback = jax.vjp(
                lambda p: shared.trunk(p, data[0]), params["trunk"]
            )
            both = jax.grad(shared.head, (0, 1))
            pairs = [
                both(head, features, wanted)
                for head, wanted in zip(params["heads"], data[1], strict=True)
            ]
            cotangent = combine([x for _, x in pairs], weights)
            (trunk,) = pullback(cotangent)
            return {"trunk": trunk, "heads": [head for head, _ in pairs]}, weights

        update, weights = jax.lax.cond(age == 0, fresh, reused, weights)
        updates, adams = adam.update(update, adams, params)
        state = adams, weights, (age + 1) % K
        return optax.apply_updates(params, updates), state

    of_hand: Any = optax.GradientTransformation(
        lambda params: (adam.init(params), jnp.zeros(tasks.m), jnp.zeros((), int)),
        lambda *_: None,  # type: ignore
    )
    return ratios(
        {
            "without": compiled(step_of(tasks, adam, of_sum(tasks)), adam, tasks, K),
            "jaxjd": compiled(step_of(tasks, sometimes), sometimes, tasks, K),
            "by hand": compiled(by_hand, of_hand, tasks, K),
        },
        rounds,
        same=("jaxjd", "by hand"),
    )


def deep(m: int) -> Tasks:
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        f"layer {n:02}": layer
        for n, layer in enumerate(dense_layers(keys[0], (WIDTH,) * (DEPTH + 1)))
    }
    x = jax.random.normal(keys[1], (256, WIDTH))
    targets = jax.random.normal(keys[2], (m, 256, WIDTH))

    def losses(params, x, targets):
        for layer in params.values():
            x = x + jnp.tanh(dense(layer, x)) / DEPTH
        return [jnp.mean((x - target) ** 2) for target in targets]

    return Tasks("30 layers", m, params, losses, (x, targets), None)


def group(rounds: int) -> dict[str, float]:
    tasks = deep(4)
    one = with_adam(jaxjd.upgrad())
    layers = with_adam(jaxjd.aggregate(UPGRAD, group="layer"))
    aggregators: Any = {name: jaxjd.upgrad() for name in tasks.params}
    labels = {name: name for name in tasks.params}
    parted = with_adam(jaxjd.partition(aggregators, labels))
    return ratios(
        {
            "without": compiled(step_of(tasks, one), one, tasks, 1),
            "jaxjd": compiled(step_of(tasks, layers), layers, tasks, 1),
            "by hand": compiled(step_of(tasks, parted), parted, tasks, 1),
        },
        rounds,
        same=("jaxjd", "by hand"),
    )


def wrt(rounds: int, method: Any) -> dict[str, float]:
    tasks = mlp_trunk(8)
    last = {"trunk": [False] * (len(tasks.params["trunk"]) - 1) + [True]}
    some = with_adam(jaxjd.aggregate(UPGRAD, wrt=last | {"heads": False}))
    whole = with_adam(jaxjd.aggregate(UPGRAD, wrt={"trunk": True, "heads": False}))

    def losses_of(params, *data):
        return jnp.stack(jax.tree.leaves(tasks.losses(params, *data)))

    def by_hand(params, *data):
        *layers, end = params["trunk"]

        def of_last(end, i):
            return losses_of(params | {"trunk": [*layers, end]}, *data)[i]

        rows = [jax.grad(of_last)(end, i) for i in range(tasks.m)]
        weights = UPGRAD(gramian(rows))
        return jax.grad(lambda params: weights @ losses_of(params, *data))(params)

    adam = optax.adam(RATE)
    return ratios(
        {
            "without": compiled(step_of(tasks, whole), whole, tasks, 1),
            "jaxjd": compiled(step_of(tasks, some, method=method), some, tasks, 1),
            "by hand": compiled(step_of(tasks, adam, by_hand), adam, tasks, 1),
        },
        rounds,
        same=("jaxjd", "by hand"),
    )


def ratios(
    runs: dict[str, Callable[[], Any]],
    rounds: int,
    same: tuple[str, ...] = ("without", "jaxjd", "by hand"),
) -> dict[str, float]:
    """The ratios to the run "without", of runs of which some end at the same place.

    **Raises:** `AssertionError` if those do not.
    """

    def averages(name: str) -> np.ndarray:
        """Adam's, of the gradients."""
        mu = optax.tree.get(runs[name]()[1], "mu")
        return np.concatenate([np.ravel(x) for x in jax.tree.leaves(mu)])

    reference = averages(same[-1])
    for name in same:
        apart = np.linalg.norm(averages(name) - reference) / np.linalg.norm(reference)
        assert apart <= TOLERANCE, f"{name} is {apart:.1e} from {same[-1]}"
    timings = paired(runs, "without", rounds)
    return {
        "ms": 1e3 * timings["without"].seconds,
        "jaxjd": timings["jaxjd"].ratio,
        "by hand": timings["by hand"].ratio,
    }


CASES: dict[str, tuple[str, Callable[[int], dict[str, float]]]] = {
    "`diagnostics=True`, a step": ("UPGrad without", diagnostics),
    "`every=10`, ten steps": ("the sum of the losses", every),
    '`group="layer"`, 30 layers, a step': ("UPGrad, one group", group),
    "`wrt` the last of 3 layers, a step": (
        "UPGrad, whole trunk",
        functools.partial(wrt, method="auto"),
    ),
    'the same, `method="chunked"`': (
        "UPGrad, whole trunk",
        functools.partial(wrt, method="chunked"),
    ),
}


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| | relative to | that, ms | jaxjd | by hand |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['case']} | {row['to']} | {row['ms']:.1f} | {row['jaxjd']:.3f} | "
        f"{row['by hand']:.3f} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="3 rounds, nothing saved")
    arguments = parser.parse_args()
    described = machine(("jax", "optax"))
    rows = []
    for case, (to, measure) in CASES.items():
        found = measure(3 if arguments.quick else 25)
        rows.append({"case": case, "to": to, **found})
        print(rows[-1], flush=True)
    text = f"{described}\n\n{table(rows)}"
    print(text)
    if not arguments.quick:
        save(FOLDER, "around", text, {"machine": described, "rows": rows})


if __name__ == "__main__":
    main()
