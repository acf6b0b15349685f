"""How much trouble does XLA take over the programs of the tests?

They are compiled far more than they compute, so as a rule it takes little. Memory, and
what XLA merges or moves, are tested as users have them: `lowered.compile(NORMAL)`.
"""

import importlib.metadata

NORMAL = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
    "xla_cpu_parallel_codegen_split_count": 32,
}
QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    # Programs are small: threads cost more than they save.
    "xla_cpu_parallel_codegen_split_count": 1,
}
VERSION = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2]))
if VERSION <= (0, 7):
    # At level 0 it compiles the projection of UPGrad in float64 wrongly.
    QUICK["xla_backend_optimization_level"] = 1
if VERSION <= (0, 10):
    # The older emitters take half the time. Later releases have only the newer ones,
    # and XLA ends the process at a flag that it does not know.
    NORMAL["xla_cpu_use_fusion_emitters"] = True
    QUICK["xla_cpu_use_fusion_emitters"] = False

FLAGS = " ".join(
    [
        "--xla_force_host_platform_device_count=4",  # To test sharded arrays.
        *(f"--{name}={str(value).lower()}" for name, value in QUICK.items()),
    ]
)


def enable_x64(enable: bool = True):
    """`jax.enable_x64`, which is in `jax.experimental` before JAX 0.8."""
    import jax.experimental

    where = jax if hasattr(jax, "enable_x64") else jax.experimental
    return where.enable_x64(enable)
