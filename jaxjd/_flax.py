"""What is known of Flax where its modules are called in ordinary functions.

Batch normalisation in training mode computes its mean over the examples of a batch. A
function of one example sees a batch of one: the normalised value is zero whatever the
input, without any error. So the layer is refused while the function is traced.
"""

import contextlib
import sys
from collections.abc import Iterator

BATCH_STATISTICS_ADVICE = (
    "Use the running averages in the per-example function, normalise within each "
    "example (LayerNorm, GroupNorm, RMSNorm), or write the function for the whole "
    "batch and leave `in_axes` out."
)


@contextlib.contextmanager
def forbid_batch_statistics(per_example: bool) -> Iterator[None]:
    """Refuse flax.linen's BatchNorm in training mode, if the function is per-example.

    **Raises:** `ValueError`, when such a layer is called.
    """
    linen = sys.modules.get("flax.linen")  # Nothing to intercept if never imported.
    if linen is None or not per_example:
        yield
        return

    def interceptor(call, args, kwargs, context):
        module = context.module
        if isinstance(module, linen.BatchNorm) and context.method_name == "__call__":
            use_running_average = module.use_running_average
            if use_running_average is None:
                given = args[1] if len(args) > 1 else None
                use_running_average = kwargs.get("use_running_average", given)
            if not use_running_average:
                raise ValueError(
                    "`fun` is written for one example (`in_axes` is given), but the "
                    f"BatchNorm {'/'.join(module.path)!r} is in training mode: it "
                    "would take its statistics from one example. "
                    + BATCH_STATISTICS_ADVICE
                )
        return call(*args, **kwargs)

    with linen.intercept_methods(interceptor):
        yield


def is_variable(leaf: object) -> bool:
    """Whether it is a variable of nnx, if nnx is in use at all."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(leaf, nnx.Variable)
