"""The losses of several functions as those of one."""

import jax

from jaxjd import engine
from jaxjd._typing import PyTree
from jaxjd.jacobian._jacobian import Jacobian
from jaxjd.jacobian._layout import Losses


def concatenate(jacobians: PyTree[Jacobian]) -> Jacobian:
    """The rows of several Jacobians, one after another.

    For losses that come from functions of different data, such as one loss per point
    inside of a domain and one per point of its boundary. Each function keeps its own
    method: it may be written for one example or return all its losses. Inner products
    of rows of two functions are taken as [`jaxjd.Jacobian.cross_gramian`][] does.

    **Arguments:**

    - `jacobians`: a list, dict or other pytree of Jacobians with respect to the same
      parameters, at the same point.

    **Returns:** a Jacobian whose m losses are those of all the functions in the order
    of the pytree's leaves (for a dict, of its sorted keys). Its losses are structured
    as `jacobians` is, with the losses of each function in the place of its Jacobian.

    **Raises:** `TypeError` if something in `jacobians` is not a Jacobian; `ValueError`
    if there is none, or if their parameters differ in structure or shape.

    **Example:**

    >>> def equation(w, x):
    ...     return (w * x - 1.0) ** 2
    >>> inside = jaxjd.jac(equation, in_axes=(None, 0))(jnp.array(2.0), jnp.ones(3))
    >>> boundary = jaxjd.jac(lambda w: w**2)(jnp.array(2.0))
    >>> jaxjd.concatenate([inside, boundary]).squared_norms()
    Array([ 4.,  4.,  4., 16.], dtype=float32)
    """
    found, outer = jax.tree.flatten(
        jacobians, is_leaf=lambda x: isinstance(x, Jacobian)
    )
    for jacobian in found:
        if not isinstance(jacobian, Jacobian):
            raise TypeError(
                "`jacobians` must be a list or another pytree of jaxjd.Jacobian. Got "
                f"{type(jacobian).__name__} among them."
            )
    if not found:
        raise ValueError(
            f"`jacobians` must hold at least one jaxjd.Jacobian. Got {jacobians!r}."
        )
    parameters = found[0]._parameters
    for jacobian in found[1:]:
        if jacobian._parameters != parameters:
            raise ValueError(
                "`jacobians` must be taken with respect to the same parameters. Got "
                f"{parameters.kept_shapes()} and "
                f"{jacobian._parameters.kept_shapes()}."
            )
    losses = [jacobian._losses for jacobian in found]
    trees = [of_one.structure.unflatten(range(len(of_one.shapes))) for of_one in losses]
    structure = jax.tree.structure(outer.unflatten(trees))
    return Jacobian(
        engine.concatenated([jacobian._operator for jacobian in found]),
        Losses(
            structure,
            tuple(shape for of_one in losses for shape in of_one.shapes),
            tuple(source for of_one in losses for source in of_one.sources),
        ),
        parameters,
    )
