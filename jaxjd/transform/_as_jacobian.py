"""Find the Jacobian in what an aggregator was given, and refuse anything else.

The first axis of an ordinary gradient could pass for the axis of losses, and give an
update of the wrong shape without an error. So stacked gradients are compared with the
parameters.
"""

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import keystr
from jaxtyping import Array, Float, PyTree

from jaxjd import engine
from jaxjd.jacobian import Jacobian, Losses, Parameters, Source


def as_jacobian(
    updates: Jacobian | PyTree[Float[Array, "m ..."]], params: optax.Params | None
) -> Jacobian:
    """The Jacobian in what `update` was given.

    **Raises:** `ValueError` or `TypeError`, see [`jaxjd.aggregate`][].
    """
    # flax.nnx hands the Jacobian over inside a container of its own.
    held = jax.tree.leaves(updates, is_leaf=lambda x: isinstance(x, Jacobian))
    if len(held) == 1 and isinstance(held[0], Jacobian):
        jacobian = held[0]
        if params is not None:
            jacobian._parameters.flatten("params", params)
        return jacobian
    if any(isinstance(leaf, Jacobian) for leaf in held):
        raise TypeError(
            "`updates` must be one Jacobian. Got one among other values. "
            "`jaxjd.value_and_jac` returns a pair: write `losses, jac = ...`. Join "
            "several Jacobians by `jaxjd.concatenate`."
        )
    return stacked(updates, params)


def stacked(
    updates: PyTree[Float[Array, "m ..."]], params: optax.Params | None
) -> Jacobian:
    """The Jacobian whose rows are stacked along the first axis of every leaf."""
    if params is None:
        raise ValueError(
            "`params` must be given to `update` along with stacked gradients, to tell "
            "them from an ordinary gradient: `tx.update(updates, state, params)`."
        )
    masked = jax.tree.leaves(
        (updates, params), is_leaf=lambda x: isinstance(x, optax.MaskedNode)
    )
    if any(isinstance(leaf, optax.MaskedNode) for leaf in masked):
        raise ValueError(
            "`updates` lack some of the parameters: this aggregator is inside "
            "`optax.masked` or `optax.partition`, which do not aggregate the rows of "
            "the other parameters. Use `jaxjd.partition`, with an aggregator for every "
            "group, or `jaxjd.aggregate(weighting, wrt=mask)`."
        )
    leaves, structure = jax.tree.flatten(updates)
    if not leaves:
        raise ValueError(
            "`updates` must be a Jacobian or gradients with a leading axis of losses. "
            f"Got {updates!r}, without an array in it. With `nnx.Optimizer`, use "
            "`jaxjd.nnx.value_and_jac`."
        )
    if structure != jax.tree.structure(params):
        raise ValueError(
            f"`updates` must be structured like the parameters, "
            f"{jax.tree.structure(params)}. Got {structure}."
        )
    m = jnp.shape(leaves[0])[:1]
    named = jax.tree_util.tree_leaves_with_path(updates)
    for (path, leaf), param in zip(named, jax.tree.leaves(params), strict=True):
        where = keystr(path) or "the only leaf"
        expected = (*(m or ("m",)), *jnp.shape(param))
        if jnp.shape(leaf) != expected:
            ordinary = jnp.shape(leaf) == jnp.shape(param)
            raise ValueError(
                "`updates` must have a leading axis of losses and then the shape of "
                f"the parameter, {expected} at {where}. Got {jnp.shape(leaf)}"
                f"{', an ordinary gradient' if ordinary else ''}."
            )
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                "`updates` must be real floating-point arrays. Got "
                f"{jnp.result_type(leaf)} at {where}."
            )
    if m == (0,):
        raise ValueError("`updates` must hold at least one loss. Got an empty axis.")
    return Jacobian(
        engine.stacked([jnp.asarray(leaf) for leaf in leaves]),
        Losses(jax.tree.structure(0), (m,), (Source(None, 1),)),
        Parameters(
            structure,
            tuple(leaf.shape[1:] for leaf in leaves),
            tuple(range(len(leaves))),
        ),
    )
