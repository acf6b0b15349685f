"""What do all tests share?"""

import os

# Set before jax is imported. Several devices on the CPU, to test sharded arrays. The
# tests compile far more than they compute, so XLA is told to take less trouble over it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true",
)

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
