"""Settings and fixtures for all tests."""

import atexit
import gc
import os
import shutil
import tempfile

from tests.xla import FLAGS

# Set before jax is imported.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", FLAGS)

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # A quarter of the programs are compiled more than once: by both workers, or by
    # tests that trace the same function again. Workers inherit this folder.
    cache = tempfile.mkdtemp(prefix="jaxjd-tests-")
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import pytest

# JAX's caches keep every traced program alive, and the collector visits all of them.
gc.set_threshold(10_000, 50, 100)


@pytest.fixture
def x64():
    """Compute in float64, and raise on silent casts and silent broadcasts."""
    with (
        jax.enable_x64(True),
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
    ):
        yield
