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
- `_explain`: what was found and chosen, for people to read.

`_jaxpr` is all that knows how JAX writes down a function.
"""

from collections.abc import Sequence

from jaxtyping import Array

from jaxjd.engine._function import LossFunction
from jaxjd.engine.structured._backward import both_passes
from jaxjd.engine.structured._chunks import StructuredChunks as StructuredChunks
from jaxjd.engine.structured._explain import Explanation as Explanation
from jaxjd.engine.structured._explain import explain as explain
from jaxjd.engine.structured._jacobian import Structured as Structured
from jaxjd.engine.structured._plan import plan


def structured(
    function: LossFunction,
    inputs: Sequence[Array],
    argnums: Sequence[int],
    chunk_size: int | None = None,
) -> tuple[Structured | StructuredChunks, tuple[list[Array], list[Array]]]:
    """The Jacobian; and the losses and other outputs of the function.

    **Arguments:**

    - `argnums`: the positions in `inputs` of the differentiated parameters.
    - `chunk_size`: of how many losses the activations may be in memory at once, but
      always of one example; by default of all.

    **Returns:** the Jacobian, and what `function.all_outputs` returns: they come from
    the forward pass that the Jacobian needs, so that it is made only once.
    """
    inputs, argnums = list(inputs), tuple(argnums)
    found = plan(function, argnums)
    losses = function.jaxpr.outvars[: function.num_loss_leaves]
    per_example = sum(variable.aval.size for variable in losses)
    num_rows = (function.num_examples(inputs) or 1) * per_example
    if chunk_size is not None and chunk_size < num_rows and function.axes is not None:
        jacobian = StructuredChunks(
            inputs, function, argnums, chunk_size, num_rows, found
        )
        return jacobian, function.all_outputs(inputs)
    outputs, passes = both_passes(found, inputs)
    return Structured(inputs, passes, found, argnums, num_rows), outputs
