"""Every row of the parity report is within its bound.

These are the functions of `python -m interop`. Rows that its `--quick` leaves out are
marked slow, and so are the longer programs in float32. The quick rows check their parts
in float32: the weights, updates, methods and balancers.
"""

import pytest

pytest.importorskip("torchjd")

import inspect
import math

import numpy as np
import optax
import torchjd.aggregation as reference
from torchjd import scalarization

import jaxjd
from interop import (
    aggregators,
    gramians,
    jacobians,
    models,
    scalarizers,
    steps,
    training,
    weights,
)
from interop.check import Check, Measurement
from interop.report import PRECISIONS, checks
from tests.weighting.registry import AGGREGATORS

LONG = {"Gramian", "training", "20 steps", "scalarizer, 20 steps"}


def marks(row: Check, precision: str) -> list[pytest.MarkDecorator]:
    quick = row.quick and not (precision == "float32" and row.group in LONG)
    return [] if quick else [pytest.mark.slow]


ROWS = [
    pytest.param(
        row,
        precision,
        id=f"{row.group}-{row.name}-{precision}",
        marks=marks(row, precision),
    )
    for row in checks()
    for precision in PRECISIONS
]


@pytest.mark.parametrize(("check", "precision"), ROWS)
def test_both_libraries_agree(check: Check, precision):
    measurement = check.measure(precision)
    assert measurement.passed, measurement


def test_rows_are_computed_in_the_precision_that_they_claim():
    """A float32 row has far larger errors than a float64 row."""
    for row in checks(quick=True):
        if row.name == "upgrad, conflicting":
            in_float32, in_float64 = (row.measure(p).value for p in PRECISIONS)
            assert in_float32 > 1e-9 > 1e-12 > in_float64


@pytest.mark.parametrize("value", [2.0, math.nan, math.inf])
def test_over_the_bound_and_nan_do_not_pass(value):
    assert not Measurement(value, bound=1.0).passed
    assert Measurement(1.0, bound=1.0).passed


def test_a_wrong_gramian_is_seen(monkeypatch):
    """A change of 1e-6 in one bias is enough."""

    def loss(self, variables, image, label):
        variables = {"params": dict(variables["params"])}
        last = variables["params"]["Dense_2"]
        variables["params"]["Dense_2"] = {**last, "bias": last["bias"] * (1 + 1e-6)}
        return original(self, variables, image, label)

    original = models.Twins.loss
    difference = dict(make=models.mlp, method="dense")
    assert gramians.gramian_difference("float64", **difference) < 1e-12
    monkeypatch.setattr(models.Twins, "loss", loss)
    assert gramians.gramian_difference("float64", **difference) > 1e-9


def test_another_regularisation_is_seen(monkeypatch):
    monkeypatch.setattr(weights, "options", lambda _: {"reg_eps": 1.01e-4})
    difference = weights.weights_difference(
        "float64", method="upgrad", kind="conflicting"
    )
    assert difference > 1e-6


def test_a_wrong_step_is_seen(monkeypatch):
    monkeypatch.setattr(training, "NUM_STEPS", 3)
    longer = training.SGD._replace(optax=optax.sgd(0.03 * (1 + 1e-5)))
    difference = training.run_difference("float64", make=models.mlp, optimizer=longer)
    assert difference > 1e-6


METHODS = {method.name: method for method in (*aggregators.METHODS, *steps.METHODS)}


def test_no_method_is_forgotten():
    """Every method that TorchJD also has is a row of some table."""
    compared = {
        row.name.split(",")[0]
        for row in checks()
        if row.group in ("weights", "method", f"{steps.NUM_STEPS} steps")
        or row.group.startswith("scalarizer")
    }
    assert compared == {name for name in AGGREGATORS if aggregators.counterpart(name)}
    assert aggregators.counterpart("conflict_free") is reference.ConFIG
    assert aggregators.counterpart("upgrad") is reference.UPGradWeighting
    assert aggregators.counterpart("descent") is None
    assert aggregators.counterpart("imtl_l") is scalarization.IMTLL
    in_both = {row.name.split(",")[0] for row in scalarizers.checks()}
    classes = {
        name.lower()
        for name, value in vars(scalarization).items()
        if inspect.isclass(value) and value is not scalarization.Scalarizer
    }
    assert {name.replace("_", "") for name in in_both} == classes


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("imtl_g", "aligned_mtl, min"),
        ("aligned_mtl, min", "aligned_mtl, median"),
        ("trimmed_mean, 3", "trimmed_mean, 0"),
        ("modo", "sdmgrad"),
        ("excess_mtl, 0 steps of warm-up", "excess_mtl, 4 steps of warm-up"),
    ],
)
def test_another_method_is_seen(name, changed):
    wrong = METHODS[name]._replace(ours=METHODS[changed].ours)
    check = aggregators.check("method", wrong)
    assert check.difference("float64") > 1e3 * check.bounds["float64"]


def test_another_state_is_seen():
    """A change of 1e-5 in the decay of the moving average is enough."""

    def almost(m):
        return jaxjd.weighting.cr_mogm(
            jaxjd.weighting.aligned_mtl(), 0.9 * (1 + 1e-5), num_losses=m
        )

    method = METHODS["cr_mogm, of aligned_mtl"]
    wrong = method._replace(ours=aggregators.of_gramian(almost))
    assert aggregators.method_difference("float64", method=wrong) > 1e-6


@pytest.mark.parametrize("name", ["stch", "famo"])
def test_another_scalarizer_is_seen(name):
    """A change of 1e-5 in a hyperparameter is enough."""
    almost = {
        "stch": lambda m: jaxjd.scalarization.stch(1 + 1e-5),
        "famo": lambda m: jaxjd.scalarization.famo(num_losses=m, reference=[1e-5] * m),
    }[name]
    rows = {row.name: row for row in (*scalarizers.METHODS, *scalarizers.STEPS)}
    title = {"stch": "stch, smoothing = 1", "famo": "famo"}[name]
    wrong = rows[title]._replace(ours=scalarizers.ours(almost))
    assert aggregators.method_difference("float64", method=wrong) > 1e-7


def test_other_random_numbers_are_seen():
    method = METHODS["graddrop, same uniform numbers"]

    def other(drawn):
        return aggregators.only(drawn)[::-1].copy()

    wrong = method._replace(draws=other)
    assert aggregators.method_difference("float64", method=wrong) > 0.1
    with pytest.raises(RuntimeError, match="TorchJD drew 1 tensors"):
        aggregators.method_difference("float64", method=method._replace(draws=None))


@pytest.mark.parametrize("kind", jacobians.comparable())
def test_kinds_of_jacobians_have_the_property_of_their_name(kind):
    for rows in jacobians.comparable()[kind]:
        gramian = jacobians.gramian(rows, "float64")
        norms = np.linalg.norm(rows, axis=1)
        rank = np.linalg.matrix_rank(rows)
        match kind:
            case "conflicting":
                assert gramian[~np.eye(len(rows), dtype=bool)].max() < 0
            case "rank-deficient" | "random of rank 6" | "duplicate rows":
                assert rank == len(rows) / 2
            case "opposed rows":
                assert (rows[:6] == -rows[6:]).all()
            case "near-duplicate rows":
                assert 1e-4 < np.linalg.svd(rows)[1].min() < 1e-2 < norms.min()
            case "row norms 1..1000":
                assert norms.max() / norms.min() == pytest.approx(1000)
            case "one zero row":
                assert (norms == 0).sum() == 1
            case "zero":
                assert (gramian == 0).all()
            case "trace below norm_eps":
                assert 0 < np.trace(gramian) < weights.EPS["norm_eps"]
            case "m = 1":
                assert gramian.shape == (1, 1)
            case _:
                assert rank == len(rows)
