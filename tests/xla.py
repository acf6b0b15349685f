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
# The older emitters take half the time. Later releases have only the newer ones, and
# XLA ends the process at a flag that it does not know.
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) <= (0, 10):
    NORMAL["xla_cpu_use_fusion_emitters"] = True
    QUICK["xla_cpu_use_fusion_emitters"] = False

FLAGS = " ".join(
    [
        "--xla_force_host_platform_device_count=4",  # To test sharded arrays.
        *(f"--{name}={str(value).lower()}" for name, value in QUICK.items()),
    ]
)
