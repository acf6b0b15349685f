"""Draw what the diagnostics of a training run say: plain functions of matplotlib.

Each takes the `Axes` to draw into, by default those of pyplot, and returns them. It
needs matplotlib: `pip install 'jaxjd[plot]'`. The colours can be told apart by people
who are colour-blind, on white and on dark figures.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxjd._diagnostics import Diagnostics
from jaxjd._names import names_of

try:
    import matplotlib.pyplot as plt
    from matplotlib.axes import Axes
except ImportError as error:
    raise ImportError(
        "jaxjd.plot needs matplotlib: pip install 'jaxjd[plot]'."
    ) from error

# Those of Okabe and Ito that are neither lost on white nor on black.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
STYLES = ("-", "--", ":", "-.")
# So many cells have room for their numbers.
MOST_NUMBERS = 8


def heat_map(
    matrix: Float[Array, "m m"], names: Any = None, *, ax: Axes | None = None
) -> Axes:
    """A Gramian, or the cosines between gradients, as a grid of colours.

    Blue is positive, red is negative: these losses conflict. The colours of cosines go
    from -1 to 1, those of other matrices to the largest entry.

    ```python
    jaxjd.plot.heat_map(jaxjd.diagnostics(jac.gramian(), weights).cosines, losses)
    ```

    **Arguments:**

    - `matrix`: [m, m], for example `Diagnostics.cosines` or `jac.gramian()`.
    - `names`: m strings, or the losses themselves, whose names are then their paths. By
      default the places of the rows.
    - `ax`: where to draw. By default the current axes of pyplot.

    **Returns:** the axes.

    **Raises:** `ValueError` if `matrix` is not square, or there are not m names.
    """
    values = np.asarray(matrix, float)
    if values.ndim != 2 or values.shape[0] != values.shape[1]:
        raise ValueError(f"`matrix` must be square, [m, m]. Got shape {values.shape}.")
    labels = labels_of(names, len(values))
    ax = plt.gca() if ax is None else ax
    finite = np.abs(values[np.isfinite(values)])
    largest = finite.max(initial=0)
    # Cosines are at most 1, to rounding.
    limit = 1.0 if largest <= 1 + 1e-3 and np.allclose(np.diag(values), 1) else largest
    image = ax.imshow(values, cmap="RdBu", vmin=-limit or -1, vmax=limit or 1)
    places = np.arange(len(values))
    shown = places[:: -(-len(places) // 12)]  # More would be drawn over each other.
    chosen = [labels[n] for n in shown]
    turned = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    ax.set_xticks(shown, chosen, **(turned if max(map(len, chosen)) > 3 else {}))
    ax.set_yticks(shown, chosen)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    if len(values) <= MOST_NUMBERS:
        for i, j in np.ndindex(values.shape):
            dark = abs(values[i, j]) > 0.6 * limit
            ax.text(
                j,
                i,
                f"{values[i, j]:.2g}",
                ha="center",
                va="center",
                fontsize="small",
                color="white" if dark else "black",
            )
    ax.figure.colorbar(image, ax=ax, shrink=0.8)
    return ax


def weights(
    diagnostics: Diagnostics, names: Any = None, *, ax: Axes | None = None
) -> Axes:
    """The weight of each loss over the steps of a run.

    **Arguments:**

    - `diagnostics`: of all steps, as `jax.lax.scan` stacks what
      `optax.tree.get(state, "diagnostics")` finds in each: weights [steps, m].
    - `names`, `ax`: as in [`jaxjd.plot.heat_map`][].

    **Returns:** the axes.

    **Raises:** `ValueError` if the diagnostics are not of several steps, or there are
    not m names.
    """
    ax = lines(diagnostics.weights, names, ax)
    ax.set_ylabel("weight")
    return ax


def conflicts(
    diagnostics: Diagnostics, names: Any = None, *, ax: Axes | None = None
) -> Axes:
    """How the update agrees with each loss over the steps of a run.

    A line per loss: the cosine between the update and its gradient. Below zero the step
    increases this loss, to first order. The grey area is the fraction of the pairs of
    losses whose gradients conflict.

    **Arguments:** and **Raises:** as in [`jaxjd.plot.weights`][].

    **Returns:** the axes.
    """
    ax = lines(diagnostics.agreement, names, ax)
    fraction = np.asarray(diagnostics.conflicting, float)
    ax.fill_between(
        np.arange(len(fraction)),
        fraction,
        color="grey",
        alpha=0.3,
        lw=0,
        zorder=0,
        label="conflicting pairs",
    )
    ax.axhline(0, color="grey", lw=1, zorder=1)
    ax.set_ylim(-1.05 if np.nanmin(diagnostics.agreement) < 0 else -0.05, 1.05)
    ax.set_ylabel("cosine with the update")
    ax.legend(**outside(len(ax.get_lines())))
    return ax


def lines(values: Float[Array, "s m"], names: Any, ax: Axes | None) -> Axes:
    """A line for each loss, which differ in colour and then in style."""
    of_steps = np.asarray(values, float)
    if of_steps.ndim != 2:
        raise ValueError(
            "`diagnostics` must be those of several steps, stacked: weights [steps, m]."
            f" Got weights of shape {of_steps.shape}."
        )
    labels = labels_of(names, of_steps.shape[1])
    ax = plt.gca() if ax is None else ax
    for n, label in enumerate(labels):
        ax.plot(
            of_steps[:, n],
            label=label,
            color=COLOURS[n % len(COLOURS)],
            ls=STYLES[n // len(COLOURS) % len(STYLES)],
            lw=1.5,
        )
    ax.set_xlabel("step")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(**outside(len(labels)))
    return ax


def outside(number: int) -> dict[str, Any]:
    """Beside the axes, where a legend hides no line, in as few columns as it can."""
    return {
        "loc": "upper left",
        "bbox_to_anchor": (1.0, 1.0),
        "frameon": False,
        "fontsize": "small",
        "ncols": -(-number // 16),
    }


def labels_of(names: Any, m: int) -> list[str]:
    """One name for each of m losses.

    **Raises:** `ValueError` if there are not m names.
    """
    if names is None:
        return [str(n) for n in range(m)]
    leaves, structure = jax.tree.flatten(names)
    if any(isinstance(leaf, str) for leaf in leaves):
        labels = [str(leaf) for leaf in leaves]
    else:
        labels = [*names_of(structure, tuple(map(jnp.shape, leaves)))]
    if len(labels) != m:
        raise ValueError(
            f"`names` must be of the {m} losses, or be the losses. Got {len(labels)}."
        )
    return labels
