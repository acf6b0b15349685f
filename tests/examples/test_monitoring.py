"""The logs hold what was computed, and what they say of a step is right."""

import csv

import jax
import numpy as np
import pytest

from tests.examples.running import example, run

program = example("monitoring")

pytestmark = pytest.mark.slow


def test_trains_logs_and_draws(tmp_path):
    logs = run(program, tmp_path, "--steps", "3")
    assert list(logs) == ["mean", "upgrad"]
    for name, log in logs.items():
        with open(tmp_path / "new" / f"monitoring_{name}.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["step"] for row in rows] == ["0", "1", "2"]
        for key, values in log.items():
            assert [float(row[key]) for row in rows] == values.tolist()
    # The first batch of both, by one gradient per loss.
    images, digits = program.load_digits(return_X_y=True)
    batch = np.random.default_rng(0).choice(len(images), program.BATCH, replace=False)
    args = (images[batch] / 16).astype(np.float32), digits[batch]
    rows = jax.jacrev(program.losses)(program.init(jax.random.key(0)), *args)
    J = np.stack(
        [
            np.hstack([np.ravel(x) for x in jax.tree.leaves(rows[task])])
            for task in program.TASKS
        ]
    ).astype(np.float64)
    norms = np.linalg.norm(J, axis=1)
    agreement = J @ J.mean(axis=0) / norms / np.linalg.norm(J.mean(axis=0))
    for i, task in enumerate(program.TASKS):
        assert logs["mean"][f"norms/{task}"][0] == pytest.approx(norms[i], rel=1e-4)
        found = logs["mean"][f"agreement/{task}"][0]
        assert found == pytest.approx(agreement[i], abs=1e-4)
        assert logs["upgrad"][f"agreement/{task}"].min() > -1e-3
