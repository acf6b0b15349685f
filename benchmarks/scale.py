"""What a step of UPGrad costs on P devices, read from compiled programs.

    python -m benchmarks.scale [--quick] [--models MLP,CNN]

Nothing runs, so the devices need not exist: this machine's CPU pretends to be 256. The
batch is spread over P of them, the parameters are on each. For a step of SGD on the
mean loss and a step of UPGrad the table has, per device: the bytes that collectives
result in, by kind; how many collectives are inside loops; floating-point operations,
where the body of a loop counts once; and temporary memory.

The law is what the Gramian should communicate. A parameter whose rows are formed moves
its share of them, 4 m n / P bytes, and the products of all of these one sum of 4 m²
bytes. For the other parameters, activations and their cotangents are gathered, 4 m (i +
o) bytes for a layer from i to o numbers, and the products of all take 4 m² bytes. From
m = 1024 on, both sums are spread by rows: each device gets 4 m² / P bytes of the first,
as many to make the Gramian symmetric, and then all 4 m² bytes of it. For the losses of
tasks the law is that of the whole step: one gradient per loss is summed
over devices, of the parameters that the loss depends on. The script writes `scale.md`
and `scale.json` to the folder `results` beside this file.
"""

import argparse
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxjd
from benchmarks._collectives import KINDS, collectives
from benchmarks._models import models
from benchmarks._results import FOLDER, save
from benchmarks._timing import machine
from jaxjd._sharding import LARGE

NUM_DEVICES = 256
# Compile quickly: what is communicated and computed does not depend on it.
QUICK: Any = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}


class Case(NamedTuple):
    """Losses, with `in_axes` per example, else of a whole batch."""

    name: str
    params: Any
    losses: Callable[..., Any]
    in_axes: tuple[int | None, ...] | None
    batch: Callable[[int], tuple[Any, ...]]


def heads() -> Case:
    """Four tasks with a shared trunk."""

    def losses(params, x, y):
        h = jnp.tanh(jnp.tanh(x @ params["in"]) @ params["trunk"])
        return {
            name: jnp.mean((h @ head - y[:, n]) ** 2)
            for n, (name, head) in enumerate(params["heads"].items())
        }

    params = {
        "in": jnp.ones((64, 512)),
        "trunk": jnp.ones((512, 512)),
        "heads": {name: jnp.ones(512) for name in "abcd"},
    }
    return Case(
        "4 heads",
        params,
        losses,
        None,
        lambda size: (jnp.ones((size, 64)), jnp.ones((size, 4))),
    )


def cases() -> list[Case]:
    found = [
        Case(model.name, model.params, model.loss, model.in_axes, model.batch)
        for model in models()
        if model.name != "GRU"
    ]
    return [found[0], found[1], heads(), *found[2:]]


def upgrad(case: Case, params: Any, *examples: Any) -> Any:
    jac = jaxjd.jac(case.losses, in_axes=case.in_axes)(params, *examples)
    update = jac.vjp(jaxjd.weighting.upgrad()(jac.gramian()))
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, update)


def gramian(case: Case, params: Any, *examples: Any) -> Any:
    return jaxjd.jac(case.losses, in_axes=case.in_axes)(params, *examples).gramian()


def sgd(case: Case, params: Any, *examples: Any) -> Any:
    def mean(params):
        losses = case.losses
        if case.in_axes is not None:
            losses = jax.vmap(losses, case.in_axes)
        leaves = jax.tree.leaves(losses(params, *examples))
        return sum(jnp.sum(x) for x in leaves) / sum(x.size for x in leaves)

    return jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(mean)(params))


STEPS = {"SGD": sgd, "Gramian": gramian, "UPGrad": upgrad}


def measure(case: Case, size: int, devices: int) -> dict[str, Any]:
    """Compile the steps for a batch of this size on this many devices."""
    mesh = jax.make_mesh(
        (devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:devices]
    )
    whole = NamedSharding(mesh, PartitionSpec())
    spread = NamedSharding(mesh, PartitionSpec("data"))

    def shapes(tree: Any, sharding: Any) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )

    examples = jax.eval_shape(lambda: case.batch(size))
    arguments = shapes(case.params, whole), *shapes(examples, spread)
    found: dict[str, Any] = {}
    for name, step in STEPS.items():
        lowered: Any = jax.jit(
            lambda *args, step=step: step(case, *args), out_shardings=whole
        ).lower(*arguments)
        compiled: Any = lowered.compile(QUICK)
        moved = collectives(compiled.as_text())
        analysis: Any = compiled.memory_analysis()
        found[name] = {
            "bytes": {
                kind: sum(x.num_bytes for x in moved if x.kind == kind)
                for kind in KINDS
            },
            "in loops": sum(x.in_loop for x in moved),
            "flops": compiled.cost_analysis()["flops"],
            "temporary": analysis.temp_size_in_bytes,
        }
    law = predicted(case, size, devices) if devices > 1 else 0
    row = {"model": case.name, "batch": size, "devices": devices, "law": law}
    return {**row, "steps": found}


def predicted(case: Case, size: int, devices: int) -> float:
    """The bytes communicated, by the law: for tasks by the whole step."""
    if case.in_axes is None:
        return of_tasks(case)
    examples = jax.eval_shape(lambda: case.batch(size))
    table = jaxjd.explain(case.losses, in_axes=case.in_axes)(
        case.params, *[jnp.zeros(x.shape, x.dtype) for x in examples]
    ).parameters
    rows = pairs = 0.0
    for parameter in table.entries:
        n = math.prod(parameter.shape)
        if parameter.contraction == "rows":
            rows += 4 * size * n / devices
        else:
            pairs += 4 * size * sum(parameter.shape)
    matrix = 4 * size**2
    if size >= LARGE and size % devices == 0:
        return rows + pairs + matrix * (1 + (1 + (rows > 0)) / devices)
    return rows + pairs + matrix * ((rows > 0) + (pairs > 0))


def of_tasks(case: Case) -> float:
    """The bytes of each loss's gradient with respect to what the loss depends on."""
    jacobians = jax.jacrev(lambda params: case.losses(params, *case.batch(8)))
    small = jax.tree.map(lambda x: 1e-3 * x, case.params)  # No tanh is flat there.
    moved = 0
    for leaf in jax.tree.leaves(jacobians(small)):
        moved += 4 * leaf.size * bool(jnp.any(leaf != 0))
    return moved


HEADER = (
    "| model | batch | devices | SGD, MB | Gramian, MB (law) | UPGrad, MB (law) | "
    "in loops | GFLOP, SGD | GFLOP, UPGrad | temporary MB, SGD | UPGrad |"
)


def table(results: list[dict[str, Any]]) -> str:
    lines = [HEADER, "|---" * (HEADER.count("|") - 1) + "|"]
    for row in results:
        of = row["steps"]
        moved = {name: sum(step["bytes"].values()) / 1e6 for name, step in of.items()}
        law = dict.fromkeys(STEPS, "")
        of_step = "UPGrad" if row["model"] == "4 heads" else "Gramian"
        law[of_step] = f" ({row['law'] / 1e6:.3f})"
        cells = [
            row["model"],
            row["batch"],
            row["devices"],
            f"{moved['SGD']:.3f}",
            f"{moved['Gramian']:.3f}{law['Gramian']}",
            f"{moved['UPGrad']:.3f}{law['UPGrad']}",
            of["UPGrad"]["in loops"],
            *[f"{of[name]['flops'] / 1e9:.3f}" for name in ("SGD", "UPGrad")],
            *[f"{of[name]['temporary'] / 1e6:.1f}" for name in ("SGD", "UPGrad")],
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


# The number of devices grows, then the batch, which is m for per-example losses.
SIZES = [(256, p) for p in (1, 2, 4, 8, 64, 256)] + [
    (64, 8),
    (1024, 8),
    *[(4096, p) for p in (8, 64, 256)],
]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few sizes")
    parser.add_argument("--models", help="comma-separated names; default: all")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
    wanted = arguments.models.split(",") if arguments.models else None
    on, results = machine(("jax", "flax")), []
    for case in cases():
        if wanted is not None and case.name not in wanted:
            continue
        for size, devices in [(64, 1), (64, 8)] if arguments.quick else SIZES:
            results.append(measure(case, size, devices))
            print(table(results[-1:]).splitlines()[-1], flush=True)
            record = {"machine": on, "rows": results}
            save(FOLDER, "scale", f"{on}\n\n{table(results)}", record)


if __name__ == "__main__":
    main()
