"""A step of Jacobian descent for about the price of a step of SGD.

Parameters reach the losses through few operations, each of them linear in the
parameter. If a parameter p is used in `y = op(p, a)`, the gradient of an example's loss
follows from the other operand a and the cotangent δ of y. So do all inner products of
gradients and all weighted sums of them. To read, in this order:

- `_walk`: finds where the function uses parameters. `_node` says what a parameter has
  become until then; `_rules` brings each operation into one common form.
- `_plan`: which uses of parameters belong together.
- `_backward`: one forward and one backward pass leave a and δ behind.
- `_contraction`: inner products from the common form, in the cheaper of two ways.
- `_groups`, with `_use`: products, gradients and combinations of a group of parameters.
- `_jacobian`: the Jacobian as the sum of its groups; `_chunks`: with bounded memory.
- `_estimate`: whether this is worth it where the function returns all its losses.
- `_budget`: how large a chunk fits into memory.
- `_explain`: what was found and chosen, for people to read.

`_jaxpr` is the only file that knows how JAX writes down a function.
"""

from collections.abc import Sequence

from jaxtyping import Array

from jaxjd.engine._convolutions import check_rules
from jaxjd.engine.structured._backward import both_passes
from jaxjd.engine.structured._budget import Fit as Fit
from jaxjd.engine.structured._budget import largest_chunk as largest_chunk
from jaxjd.engine.structured._budget import of_whole as of_whole
from jaxjd.engine.structured._chunks import StructuredChunks as StructuredChunks
from jaxjd.engine.structured._contraction import Choice as Choice
from jaxjd.engine.structured._estimate import with_rows as with_rows
from jaxjd.engine.structured._estimate import without_rows as without_rows
from jaxjd.engine.structured._explain import Table as Table
from jaxjd.engine.structured._explain import explain as explain
from jaxjd.engine.structured._jacobian import Structured as Structured
from jaxjd.engine.structured._plan import Plan as Plan
from jaxjd.engine.structured._plan import plan as plan


def structured(
    plan: Plan, inputs: Sequence[Array], chunk_size: int | None = None
) -> tuple[Structured | StructuredChunks, tuple[list[Array], list[Array]]]:
    """The Jacobian; and the losses and other outputs of the function.

    **Arguments:**

    - `chunk_size`: the activations of how many losses may be in memory at once. Those
      of one example always are. By default all.

    **Raises:** as [`check_rules`][].

    **Returns:** the Jacobian, and what `LossFunction.all_outputs` returns. It comes
    from the forward pass that the Jacobian needs, which is so made only once.
    """
    inputs, function = list(inputs), plan.function
    check_rules(plan.direct, inputs)
    m = function.num_losses(inputs)
    if chunk_size is not None and chunk_size < m and function.axes is not None:
        jacobian = StructuredChunks(inputs, function, plan.argnums, chunk_size, plan)
        return jacobian, function.all_outputs(inputs)
    outputs, passes = both_passes(plan, inputs)
    return Structured(inputs, passes, plan, plan.argnums), outputs


def rows_by_chunks(
    plan: Plan, inputs: Sequence[Array], chunk_size: int | None
) -> StructuredChunks:
    """The operator that forms rows as the structured one does, and keeps nothing."""
    check_rules(plan.direct, inputs)
    return StructuredChunks(list(inputs), plan.function, plan.argnums, chunk_size, plan)
