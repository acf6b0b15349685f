"""What do all tests share?"""

import os

from tests.xla import FLAGS

# Set before jax is imported.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", FLAGS)

import jax
import pytest


@pytest.fixture
def x64():
    """Float64, without silent casts and silent broadcasts."""
    enable_x64 = getattr(jax, "enable_x64", None)  # jax.experimental's before 0.8.
    if enable_x64 is None:
        from jax.experimental import enable_x64
    with (
        enable_x64(True),
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
    ):
        yield
