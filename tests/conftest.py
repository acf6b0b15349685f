"""Settings and fixtures for all tests."""

import os

from tests.xla import FLAGS, enable_x64

# Set before jax is imported.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", FLAGS)

import jax
import pytest


@pytest.fixture
def x64():
    """Compute in float64, and raise on silent casts and silent broadcasts."""
    with (
        enable_x64(),
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
    ):
        yield
