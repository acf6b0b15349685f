"""Draw docs/images/upgrad.png: UPGrad's update conflicts with no gradient."""

from pathlib import Path

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import jaxjd

GRADIENTS = np.array([[-2.4, 1.0], [1.1, 0.45]])


def main() -> None:
    gramian = jnp.asarray(GRADIENTS @ GRADIENTS.T)
    mean = GRADIENTS.mean(axis=0)
    update = np.asarray(jaxjd.weighting.upgrad()(gramian)) @ GRADIENTS

    figure, axes = plt.subplots(figsize=(5.2, 3.2), dpi=150, layout="constrained")
    # The dual cone: vectors whose inner products with both gradients are nonnegative.
    directions = np.linspace(0, 2 * np.pi, 721)
    circle = 4 * np.stack([np.cos(directions), np.sin(directions)], axis=1)
    inside = circle[(circle @ GRADIENTS.T >= 0).all(axis=1)]
    axes.fill(
        *np.vstack([np.zeros(2), inside, np.zeros(2)]).T,
        color="#2a9d8f",
        alpha=0.18,
        lw=0,
    )
    axes.text(0.0, 1.66, "no loss increases", color="#1d6f65", ha="center", fontsize=9)
    arrows = [
        (GRADIENTS[0], "#555555", "gradient of loss 1", (-2.35, 1.08)),
        (GRADIENTS[1], "#555555", "gradient of loss 2", (1.08, 0.55)),
        (mean, "#e76f51", "mean (loss 2 grows)", (-1.75, 0.87)),
        (update, "#1d6f65", "UPGrad", (update[0] + 0.06, update[1] + 0.02)),
    ]
    for (x, y), colour, label, place in arrows:
        axes.annotate(
            "",
            (x, y),
            (0, 0),
            arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 2, "shrinkB": 0},
        )
        axes.text(*place, label, color=colour, fontsize=9)
    axes.set(xlim=(-2.6, 2.3), ylim=(-0.15, 1.9), aspect="equal")
    axes.axis("off")
    figure.savefig(Path(__file__).parent / "images" / "upgrad.png")


if __name__ == "__main__":
    main()
