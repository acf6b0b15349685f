"""Measure how fast and how exact the projection onto the dual cone and its peers are.

Run as `python -m benchmarks.solver`. With `--quick` it takes a minute. It writes
solver.md, solver.json and solver.png to `--out`, and prints solver.md.
"""

import argparse
import functools
import pathlib
import time

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import qpax
import quadprog
import torch
from torchjd.aggregation import UPGradWeighting

from benchmarks._results import FOLDER, save
from benchmarks._solver_cases import SYNTHETIC, mnist, synthetic
from benchmarks._solver_promise import promise_table
from benchmarks._timing import alternating, machine
from interop.projector import JaxProjector
from jaxjd.solvers import project_dual_cone

matplotlib.use("Agg")
import matplotlib.pyplot as plt

METHOD = """\
All solvers solve UPGrad's problem with TorchJD's regularisation,
`G / trace(G) + 1e-4 I`, and the same float32 Gramian. A time is the median of calls
that alternate between the solvers in one process, after compilation. TorchJD is called
as in its documentation. qpax is batched as in its documentation, jitted and vmapped
over the rows. It runs in float32, on the problem scaled to unit diagonal, which suits
its absolute tolerance best."""


UNCERTAIN = """\
The last column is of the default, which does not regularise. What does not converge
there are random Gramians of rank m/2 for which no direction decreases all losses, or
hardly any: float32 cannot prove how close their weights are."""


@functools.partial(jax.jit, static_argnames="reg_eps")
def jaxjd_weights(G, reg_eps: float | None = 1e-4):
    """UPGrad's weights and their certificate."""
    m = G.shape[0]
    result = project_dual_cone(jnp.eye(m, dtype=G.dtype) / m, G, reg_eps=reg_eps)
    return result.solution.sum(0), result.certificate


@jax.jit
def jaxjd_weights_only(G):
    return jaxjd_weights(G)[0]


@jax.jit
def jaxjd_default_weights_only(G):
    return jaxjd_weights(G, reg_eps=None)[0]


@jax.jit
def qpax_weights(G):
    m = G.shape[0]
    H = G / jnp.trace(G) + 1e-4 * jnp.eye(m)
    d = jnp.sqrt(jnp.diagonal(H))
    C = H / d[:, None] / d[None, :]

    def row(bound):
        none = jnp.zeros((0, m)), jnp.zeros(0)
        return qpax.solve_qp_primal(C, jnp.zeros(m), *none, -jnp.eye(m), -bound)

    unit = jax.vmap(row)(jnp.eye(m))
    return (d / m) @ unit / d


@functools.partial(jax.jit, static_argnames="count")
def matmuls(G, count=10):
    """Multiply m x m matrices `count` times, each product needing the one before."""

    def product(_, x):
        return jnp.matmul(x, C, precision=jax.lax.Precision.HIGHEST)

    C = G / jnp.trace(G)
    return jax.lax.fori_loop(0, count, product, C)


def regularised(G):
    return G / np.trace(G) + 1e-4 * np.eye(len(G))


def exact_weights(G):
    """UPGrad's weights in float64, by quadprog up to m = 128, by jaxjd above."""
    m = len(G)
    if m > 128:
        with jax.enable_x64(True):
            return np.asarray(jaxjd_weights(jnp.asarray(G))[0])
    H = regularised(G)
    rows = [quadprog.solve_qp(H, np.zeros(m), np.eye(m), row)[0] for row in np.eye(m)]
    return np.sum(rows, axis=0) / m


def relative_error(w, exact):
    return float(np.linalg.norm(w - exact) / np.linalg.norm(exact))


def update_error(G, w, exact):
    """The relative error of `Jᵀw`, in the norm of the regularised Gramian."""
    H = regularised(G)
    return float(np.sqrt((w - exact) @ H @ (w - exact) / (exact @ H @ exact)))


def measure(case, m, true_gramian, rounds):
    """Measure one row of the table."""
    # Scale by the trace first: float32 cannot hold every squared norm.
    true_gramian = true_gramian / np.trace(true_gramian)
    G32 = true_gramian.astype(np.float32)
    G = jnp.asarray(G32)
    Gt = torch.from_numpy(G32)
    torchjd = UPGradWeighting()
    projector = UPGradWeighting(projector=JaxProjector(norm_eps=0.0))
    start = time.perf_counter()
    jaxjd_weights_only.lower(G).compile()
    row = {"case": case, "m": m, "compile_s": time.perf_counter() - start}

    calls = {
        "jaxjd": lambda: jaxjd_weights_only(G),
        "jaxjd_default": lambda: jaxjd_default_weights_only(G),
        "matmuls10": lambda: matmuls(G),
    }
    if m <= 256:
        calls["torchjd"] = lambda: torchjd(Gt)
        calls["projector"] = lambda: projector(Gt)
    if m <= 128:
        calls["qpax"] = lambda: qpax_weights(G)
    for name, call in calls.items():
        if name != "torchjd":  # TorchJD has nothing to compile.
            jax.block_until_ready(call())
    row["seconds"] = alternating(
        {
            name: lambda call=call: jax.block_until_ready(call())
            for name, call in calls.items()
        },
        rounds,
    )
    row["seconds"]["matmul"] = row["seconds"].pop("matmuls10") / 10

    G64 = G32.astype(np.float64)
    exact = exact_weights(G64)
    weights, certificate = jaxjd_weights(G)
    weights = np.asarray(weights, np.float64)
    row["iterations"] = int(certificate.iterations)
    row["converged"] = bool(certificate.converged.all())
    row["residual"] = float(certificate.residual.max())
    row["error"] = relative_error(weights, exact)
    row["update_error"] = update_error(G64, weights, exact)
    row["floor"] = relative_error(exact_weights(true_gramian), exact)
    if "qpax" in calls:
        theirs = np.asarray(qpax_weights(G), np.float64)
        row["qpax_error"] = relative_error(theirs, exact)
    certificate = jaxjd_weights(G, reg_eps=None)[1]
    row["default_iterations"] = int(certificate.iterations)
    row["default_converged"] = bool(certificate.converged.all())
    if m <= 128:
        with jax.enable_x64(True):
            weights = np.asarray(jaxjd_weights(jnp.asarray(G64))[0])
        row["error64"] = relative_error(weights, exact)
    print(f"  {case}, m = {m}", flush=True)
    return row


def table(rows):
    head = (
        "| case | m | ms | matmuls | TorchJD / jaxjd | qpax / jaxjd | default ms "
        "| TorchJD with JaxProjector, ms "
        "| iterations | residual | error of w | floor | error of Jᵀw | qpax error "
        "| f64 |"
    )
    lines = [head, "|" + "---|" * head.count(" |")]
    for row in rows:
        t = row["seconds"]
        ours = t["jaxjd"]
        lines.append(
            f"| {row['case']} | {row['m']} | {1e3 * ours:.3g} "
            f"| {ours / t['matmul']:.0f} | {ratio(t, 'torchjd')} | {ratio(t, 'qpax')} "
            f"| {1e3 * t['jaxjd_default']:.3g} | {projector_ms(t)} "
            f"| {row['iterations']} "
            f"| {row['residual']:.0e} "
            f"| {row['error']:.0e} | {row['floor']:.0e} | {row['update_error']:.0e} "
            f"| {optional(row, 'qpax_error')} | {optional(row, 'error64')} |"
        )
    return "\n".join(lines)


def ratio(seconds, peer):
    return f"{seconds[peer] / seconds['jaxjd']:.3g}" if peer in seconds else ""


def projector_ms(seconds):
    return f"{1e3 * seconds['projector']:.3g}" if "projector" in seconds else ""


def optional(row, name):
    return f"{row[name]:.0e}" if name in row else ""


def summary(rows):
    """For each m, the times, the speed-ups and the worst errors."""
    lines = [
        "| m | jaxjd, median ms | TorchJD, median ms | speed-up, geometric mean "
        "| worst | qpax / jaxjd, geometric mean | worst error of w | of Jᵀw "
        "| not converged | by default |",
        "|" + "---|" * 10,
    ]
    for m in sorted({row["m"] for row in rows}):
        group = [row for row in rows if row["m"] == m]
        seconds = [row["seconds"] for row in group]
        ours = np.array([s["jaxjd"] for s in seconds])
        cells = [str(m), f"{1e3 * np.median(ours):.3g}"]
        if "torchjd" in seconds[0]:
            theirs = np.array([s["torchjd"] for s in seconds])
            cells += [
                f"{1e3 * np.median(theirs):.3g}",
                f"{np.exp(np.log(theirs / ours).mean()):.3g}",
                f"{(theirs / ours).min():.3g}",
            ]
        else:
            cells += ["", "", ""]
        if "qpax" in seconds[0]:
            theirs = np.array([s["qpax"] for s in seconds])
            cells.append(f"{np.exp(np.log(theirs / ours).mean()):.3g}")
        else:
            cells.append("")
        cells += [f"{max(row[e] for row in group):.0e}" for e in ERRORS]
        for flag in ("converged", "default_converged"):
            cells.append(str(sum(not row[flag] for row in group)))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


ERRORS = ("error", "update_error")


def draw(rows, path):
    """Draw time against m on log-log axes: medians, and the range over the cases."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, label, color in (
        ("torchjd", "TorchJD (quadprog)", "tab:gray"),
        ("qpax", "qpax, vmapped", "tab:orange"),
        ("jaxjd", "jaxjd", "tab:blue"),
    ):
        sizes = sorted({row["m"] for row in rows if name in row["seconds"]})
        values = [
            [1e3 * r["seconds"][name] for r in rows if r["m"] == m] for m in sizes
        ]
        axes.plot(sizes, [np.median(v) for v in values], "o-", label=label, color=color)
        low, high = [min(v) for v in values], [max(v) for v in values]
        axes.fill_between(sizes, low, high, alpha=0.2, color=color, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sorted({row["m"] for row in rows}), minor=False)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_xlabel("losses m")
    axes.set_ylabel("ms for the weights of UPGrad, on the CPU")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="m <= 32, few calls")
    parser.add_argument("--out", type=pathlib.Path, default=FOLDER)
    options = parser.parse_args()
    sizes = [2, 4, 16, 32] if options.quick else [2, 4, 16, 32, 64, 128, 256, 512]
    rounds = 5 if options.quick else 15
    on = machine(("jax", "numpy", "quadprog", "qpax", "torch", "torchjd"))

    cases = [(name, m, synthetic(name, m)) for name in SYNTHETIC for m in sizes]
    cases += mnist(sizes, epochs=1 if options.quick else 5)
    rows = [measure(*case, rounds) for case in cases]
    promise, promise_rows = promise_table([8, 32] if options.quick else [8, 32, 128])

    text = "\n\n".join(
        [
            "# The projection onto the dual cone",
            f"{METHOD}\n\nMeasured on {on}.",
            "## Summary",
            summary(rows),
            UNCERTAIN,
            "## All cases",
            "`matmuls`: our time divided by that of an m x m x m product. `floor`: how "
            "much w changes if G is rounded to float32, both solved in float64. Errors "
            "are relative to quadprog in float64 with the same Gramian (above m = 128, "
            "to our own solution in float64). `f64`: our error of w in float64.",
            table(rows),
            "## The promise, default settings, float32",
            promise,
        ]
    )
    content = {"machine": on, "rows": rows, "promise": promise_rows}
    save(options.out, "solver", text, content)
    draw(rows, options.out / "solver.png")
    print(text)


if __name__ == "__main__":
    main()
