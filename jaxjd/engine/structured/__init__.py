"""How does a Jacobian-descent step cost no more than an SGD step?

The parameters reach the losses through few operations, each of them linear in the
parameter. Of one that is used in `y = op(p, a)` the gradient for an example follows
from the other operand `a` and the cotangent `δ` of `y`, and hence all inner products of
gradients and all weighted sums do. The story, in the order in which to read it:

- `_walk`: where in the function do parameters meet the example? `_node` is what a
  parameter has become until then; `_rules` are the operations, in one common form.
- `_plan`: which uses of parameters belong together.
- `_backward`: one forward and one backward pass leave `a` and `δ` behind.
- `_contraction`: inner products from the common form, in the cheaper of two ways.
- `_groups`, with `_use`: products, rows and combinations of a group of parameters.
- `_jacobian`: the Jacobian as the sum of its groups; `_chunks`: with bounded memory.
- `_memory`: is it worth it, where the function returns all the losses at once?
- `_explain`: what was found and chosen, for people to read.

`_jaxpr` is all that knows how JAX writes down a function.
"""

from collections.abc import Sequence

from jaxtyping import Array

from jaxjd.engine.structured._backward import both_passes
from jaxjd.engine.structured._chunks import StructuredChunks as StructuredChunks
from jaxjd.engine.structured._contraction import Choice as Choice
from jaxjd.engine.structured._explain import Explanation as Explanation
from jaxjd.engine.structured._explain import explain as explain
from jaxjd.engine.structured._jacobian import Structured as Structured
from jaxjd.engine.structured._memory import saves_memory as saves_memory
from jaxjd.engine.structured._plan import Plan as Plan
from jaxjd.engine.structured._plan import plan as plan


def structured(
    plan: Plan, inputs: Sequence[Array], chunk_size: int | None = None
) -> tuple[Structured | StructuredChunks, tuple[list[Array], list[Array]]]:
    """The Jacobian; and the losses and other outputs of the function.

    **Arguments:**

    - `chunk_size`: of how many losses the activations may be in memory at once, but
      always of one example; by default of all.

    **Returns:** the Jacobian, and what `LossFunction.all_outputs` returns: they come
    from the forward pass that the Jacobian needs, so that it is made only once.
    """
    inputs, function = list(inputs), plan.function
    num_rows = (function.num_examples(inputs) or 1) * function.losses_per_call
    if chunk_size is not None and chunk_size < num_rows and function.axes is not None:
        jacobian = StructuredChunks(
            inputs, function, plan.argnums, chunk_size, num_rows, plan
        )
        return jacobian, function.all_outputs(inputs)
    outputs, passes = both_passes(plan, inputs)
    return Structured(inputs, passes, plan, plan.argnums, num_rows), outputs
