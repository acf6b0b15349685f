"""XLA flags for the tests: compile quickly rather than well.

The tests spend far more time compiling than computing. Tests of memory, or of what XLA
merges or moves, compile as users do: `lowered.compile(NORMAL)`.
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
    # The programs are small, so threads cost more than they save.
    "xla_cpu_parallel_codegen_split_count": 1,
}
VERSION = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2]))
if VERSION <= (0, 10):
    # The older emitters take half the time. Later releases only have the newer ones,
    # and XLA aborts the process if it does not know a flag.
    NORMAL["xla_cpu_use_fusion_emitters"] = True
    QUICK["xla_cpu_use_fusion_emitters"] = False

FLAGS = " ".join(
    [
        "--xla_force_host_platform_device_count=4",  # To test sharded arrays.
        *(f"--{name}={str(value).lower()}" for name, value in QUICK.items()),
    ]
)
