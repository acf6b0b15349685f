"""The drawn data are those that were given."""

import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import jaxjd

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")
figure = pytest.importorskip("matplotlib.figure")

LOSSES = {"pde": 1.0, "ic": 2.0, "bc": 3.0}
NAMES = ["bc", "ic", "pde"]
STEPS = 4


@pytest.fixture
def ax():
    return figure.Figure().subplots()


def of_steps():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(STEPS, 3, 5)).astype(np.float32)
    of = [jaxjd.diagnostics(jnp.asarray(J @ J.T), jnp.ones(3)) for J in rows]
    return jaxjd.Diagnostics(*map(jnp.stack, zip(*of, strict=True)))


def texts(labels):
    return [label.get_text() for label in labels]


def test_a_heat_map_of_cosines(ax):
    cosines = jnp.asarray([[1, -0.5, 0.2], [-0.5, 1, 0], [0.2, 0, 1]])
    assert jaxjd.plot.heat_map(cosines, LOSSES, ax=ax) is ax
    (image,) = ax.get_images()
    np.testing.assert_allclose(image.get_array(), cosines)
    assert image.get_clim() == (-1, 1)
    assert texts(ax.get_xticklabels()) == texts(ax.get_yticklabels()) == NAMES
    numbers = ["1", "-0.5", "0.2", "-0.5", "1", "0", "0.2", "0", "1"]
    assert texts(ax.texts) == numbers
    assert [text.get_position() for text in ax.texts][:2] == [(0, 0), (1, 0)]


def test_a_heat_map_of_a_large_gramian(ax):
    G = jnp.diag(jnp.arange(30.0)) - 1
    jaxjd.plot.heat_map(G, ax=ax)
    (image,) = ax.get_images()
    assert image.get_clim() == (-28, 28)
    assert not ax.texts
    shown = texts(ax.get_yticklabels())
    assert len(shown) <= 12
    assert shown[:3] == ["0", "3", "6"]


def test_a_heat_map_of_zeros_and_of_one_loss(ax):
    jaxjd.plot.heat_map(jnp.zeros((1, 1)), ["only"], ax=ax)
    assert ax.get_images()[0].get_clim() == (-1, 1)


@pytest.mark.parametrize("name", ["weights", "conflicts"])
def test_lines_over_the_steps(ax, name):
    found = of_steps()
    assert getattr(jaxjd.plot, name)(found, LOSSES, ax=ax) is ax
    values = found.weights if name == "weights" else found.agreement
    of_losses = [line for line in ax.get_lines() if line.get_label() in NAMES]
    assert [line.get_label() for line in of_losses] == NAMES
    for line, expected in zip(of_losses, values.T, strict=True):
        np.testing.assert_allclose(line.get_xdata(), range(STEPS))
        np.testing.assert_allclose(line.get_ydata(), expected)
    legend = texts(ax.get_legend().get_texts())
    if name == "conflicts":
        (area,) = ax.collections
        corners = area.get_paths()[0].vertices
        np.testing.assert_allclose(corners[:, 1].max(), found.conflicting.max())
        assert legend == [*NAMES, "conflicting pairs"]
    else:
        assert legend == NAMES


def test_no_two_of_many_losses_look_alike(ax):
    many = of_steps()._replace(weights=jnp.ones((STEPS, 20)))
    jaxjd.plot.weights(many, ax=ax)
    looks = {(line.get_color(), line.get_linestyle()) for line in ax.get_lines()}
    assert len(looks) == 20


def test_without_axes_it_draws_in_the_current_ones():
    plt = pytest.importorskip("matplotlib.pyplot")
    drawn = jaxjd.plot.heat_map(jnp.eye(2))
    assert drawn is plt.gcf().axes[0]
    plt.close("all")


def test_errors(ax):
    with pytest.raises(ValueError, match=r"`matrix` must be square.*Got shape \(2, 3"):
        jaxjd.plot.heat_map(jnp.ones((2, 3)), ax=ax)
    with pytest.raises(ValueError, match="`names` must be of the 2 losses.*Got 3"):
        jaxjd.plot.heat_map(jnp.eye(2), LOSSES, ax=ax)
    one = jaxjd.diagnostics(jnp.eye(2), jnp.ones(2))
    with pytest.raises(ValueError, match="those of several steps.*shape \\(2,\\)"):
        jaxjd.plot.weights(one, ax=ax)


def test_without_matplotlib_it_says_what_to_install():
    code = (
        "import sys, jaxjd\n"
        "sys.modules['matplotlib'] = None\n"
        "try:\n"
        "    jaxjd.plot\n"
        "except ImportError as error:\n"
        "    assert 'jaxjd[plot]' in str(error), error\n"
        "else:\n"
        "    raise AssertionError('it was imported')\n"
    )
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
