"""Whether a function that returns all its losses needs less memory without rows."""

import math

from jaxjd.engine.structured._plan import Plan


def saves_memory(plan: Plan) -> bool:
    """Whether what is kept per loss is smaller than a row of the Jacobian.

    The structured method keeps the cotangents of all activations that weights are
    applied to, and the rows of one group of parameters at a time. Whether that is less
    depends on the batch: the activations of a large one outgrow the parameters.
    """
    avals = (*plan.function.jaxpr.constvars, *plan.function.jaxpr.invars)
    sizes = {leaf: avals[leaf].aval.size for leaf in plan.argnums}
    cotangents = sum(math.prod(use.perturbation.shape) for use in plan.uses)
    direct = sum(sizes[leaf] for leaf in plan.direct)
    groups = [sum(sizes[leaf] for leaf in group.leaves) for group in plan.groups]
    return cotangents + direct + max(groups, default=0) < sum(sizes.values())
