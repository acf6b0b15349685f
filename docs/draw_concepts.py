"""Draw the pictures of docs/concepts.md from numbers that jaxjd computes.

python -m docs.draw_concepts
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

import jaxjd

IMAGES = Path(__file__).parent / "images"
COLOURS = "RdBu"
DARK = "#1d6f65"


def draw_moves() -> None:
    """The three moves of a step: rows, Gramian, weights, update."""
    J = np.random.default_rng(3).normal(size=(4, 8))
    J[1] -= 1.2 * J[0]
    gramian = J @ J.T
    weights = np.asarray(jaxjd.weighting.upgrad()(jnp.asarray(gramian)))
    update = weights @ J
    assert (J @ update > -1e-5).all()

    figure, axes = plt.subplots(
        1,
        7,
        figsize=(6.6, 1.5),
        dpi=150,
        width_ratios=[8, 6, 4, 6, 1, 6, 8],
        layout="constrained",
    )
    cells(axes[0], J, "$J$")
    cells(axes[2], gramian, r"$G = J J^\top$")
    cells(axes[4], weights[:, None], "$w$")
    cells(axes[6], update[None], r"the update, $J^\top w$")
    move(axes[1], "1. products\nof the rows")
    move(axes[3], "2. weights")
    move(axes[5], "3. weighted\nsum of rows")
    figure.savefig(IMAGES / "three_moves.png")


def draw_gramian() -> None:
    """The cosines between the gradients of six tasks with a common trunk."""
    keys = jax.random.split(jax.random.key(1), 3)
    x = jnp.linspace(-3, 3, 64)[:, None]
    shifts = jnp.array([0.0, 0.4, 0.9, 1.5, 2.4, 2.8])
    params = {
        "trunk": jax.random.normal(keys[0], (1, 32)),
        "bias": 2 * jax.random.normal(keys[2], (32,)),
        "heads": jax.random.normal(keys[1], (32,)) / 50,
    }

    def losses(params):
        features = jnp.tanh(x @ params["trunk"] + params["bias"])
        outputs = features @ params["heads"]
        return jnp.mean((outputs[:, None] - jnp.sin(x + shifts)) ** 2, axis=0)

    gramian = jaxjd.jac(losses)(params).gramian()
    weights = jaxjd.weighting.upgrad()(gramian)
    shown = jaxjd.diagnostics(gramian, weights)

    figure, (left, right) = plt.subplots(
        1, 2, figsize=(6.4, 3.3), dpi=150, width_ratios=[1.15, 1], layout="constrained"
    )
    cosines = np.asarray(shown.cosines)
    left.imshow(cosines, cmap=COLOURS, vmin=-1.3, vmax=1.3)
    for (i, j), cosine in np.ndenumerate(cosines):
        left.text(j, i, f"{cosine:.2f}", ha="center", va="center", fontsize=8)
    left.set_title("cosines between the gradients", fontsize=10)
    numbers = range(1, len(cosines) + 1)
    left.set_xticks(range(len(cosines)), numbers)
    left.set_yticks(range(len(cosines)), numbers)
    left.set(xlabel="loss", ylabel="loss")

    mean = jaxjd.diagnostics(gramian, jnp.full(6, 1 / 6))
    places = np.arange(1, 7)
    right.bar(places - 0.2, mean.agreement, 0.4, color="#e76f51", label="mean")
    right.bar(places + 0.2, shown.agreement, 0.4, color=DARK, label="UPGrad")
    right.axhline(0, color="#555555", lw=0.8)
    right.set_title("cosines with the update", fontsize=10)
    right.set(xlabel="loss", xticks=places)
    right.legend(frameon=False, fontsize=9, loc="lower left")
    right.spines[["top", "right"]].set_visible(False)
    figure.savefig(IMAGES / "gramian.png")


def draw_contraction() -> None:
    """The Gramian of a dense layer, from its inputs and its cotangents."""
    keys = jax.random.split(jax.random.key(0), 3)
    m, inputs, outputs = 8, 20, 12
    a = jax.random.normal(keys[0], (m, inputs)) + 0.7
    kernel = jax.random.normal(keys[1], (inputs, outputs)) / 4
    targets = jax.random.normal(keys[2], (m, outputs)) + 1

    def loss(kernel, a, target):
        return jnp.mean((jnp.tanh(a @ kernel) - target) ** 2)

    gramian = jaxjd.jac(loss, in_axes=(None, 0, 0))(kernel, a, targets).gramian()
    y = jnp.tanh(a @ kernel)
    cotangents = 2 / outputs * (y - targets) * (1 - y**2)
    of_inputs, of_cotangents = a @ a.T, cotangents @ cotangents.T
    np.testing.assert_allclose(gramian, of_inputs * of_cotangents, rtol=1e-4, atol=1e-5)

    figure = plt.figure(figsize=(5.2, 4.0), dpi=150, layout="constrained")
    above, below = figure.subfigures(2, 1)
    left, right = above.subplots(1, 2, width_ratios=[inputs, outputs])
    cells(left, a, "inputs $A$, a row per example")
    cells(right, cotangents, r"cotangents $\Delta$")
    axes = below.subplots(1, 3)
    cells(axes[0], of_inputs, r"$A A^\top$")
    cells(axes[1], of_cotangents, r"$\Delta \Delta^\top$")
    cells(axes[2], gramian, r"$G$")
    for at, sign in zip(axes, [r"$\odot$", "="], strict=False):
        at.annotate(
            sign,
            (1.12, 0.5),
            xycoords="axes fraction",
            ha="center",
            va="center",
            fontsize=14,
            annotation_clip=False,
        )
    figure.savefig(IMAGES / "contraction.png")


def move(axes: Axes, text: str) -> None:
    axes.axis("off")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    arrow = {"arrowstyle": "-|>", "color": DARK}
    axes.annotate("", (0.95, 0.5), (0.05, 0.5), arrowprops=arrow)
    axes.text(0.5, 0.56, text, ha="center", va="bottom", color=DARK, fontsize=9)


def cells(axes: Axes, matrix: np.ndarray | jax.Array, title: str) -> None:
    """Show the entries of a matrix: blue if positive, red if negative."""
    largest = float(np.abs(matrix).max()) * 1.2
    axes.imshow(matrix, cmap=COLOURS, vmin=-largest, vmax=largest)
    axes.set_title(title, fontsize=10)
    axes.set(xticks=[], yticks=[])


if __name__ == "__main__":
    draw_moves()
    draw_gramian()
    draw_contraction()
