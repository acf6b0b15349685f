# pyright: strict
# optax has no stubs, and some of jax's own functions are partly unknown.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnnecessaryTypeIgnoreComment=true
"""A user's program with parameters in a dict, for type checkers only."""

from typing import assert_type

import jax
import jax.numpy as jnp
import optax
from jax import Array

import jaxjd

Params = dict[str, Array]


def loss(params: Params, x: Array, y: Array, *, scale: float = 1.0) -> Array:
    return scale * (x @ params["w"] + params["b"] - y) ** 2


def loss_and_error(params: Params, x: Array, y: Array) -> tuple[Array, Params]:
    value = loss(params, x, y)
    return value, {"error": jnp.sqrt(value)}


def task_losses(params: Params) -> dict[str, Array]:
    return {"fit": params["w"].sum(), "size": params["b"] ** 2}


tx = optax.chain(jaxjd.upgrad(preference=[0.5, 0.5]), optax.adam(1e-2))


@jax.jit
def step(
    params: Params, state: optax.OptState, x: Array, y: Array
) -> tuple[optax.Params, optax.OptState, Array]:
    losses, jac = jaxjd.value_and_jac(loss, in_axes=(None, 0, 0))(
        params, x, y, scale=2.0
    )
    assert_type(losses, Array)
    updates, state = tx.update(jac, state, params, mask=jnp.ones(2, bool))
    return optax.apply_updates(params, updates), state, losses


def every_form(params: Params, x: Array, y: Array, flag: bool) -> None:
    (losses, errors), jac = jaxjd.value_and_jac(
        loss_and_error, in_axes=(None, 0, 0), has_aux=True
    )(params, x, y)
    assert_type(losses, Array)
    assert_type(errors, dict[str, Array])
    assert_type(jac, jaxjd.Jacobian)
    assert_type(jac.gramian(), Array)
    assert_type(jac.cross_gramian(jac), Array)
    assert_type(jac.num_losses, int)
    assert_type(jac.restrict({"w": True, "b": False}), jaxjd.Jacobian)
    assert_type(jaxjd.jac(task_losses)(params), jaxjd.Jacobian)
    jac, errors = jaxjd.jac(loss_and_error, has_aux=True)(params, x, y)
    assert_type(jac, jaxjd.Jacobian)
    assert_type(errors, dict[str, Array])
    values, jac = jaxjd.value_and_jac(task_losses, method="dense")(params)
    assert_type(values, dict[str, Array])
    explanation = jaxjd.explain(task_losses)(params)
    assert_type(explanation, jaxjd.Explanation)
    assert_type(explanation.method, str)
    either, _ = jaxjd.value_and_jac(loss_and_error, has_aux=flag)(params, x, y)
    del either

    weighting = jaxjd.weighting.normalize(jaxjd.weighting.mgda())
    assert_type(weighting(jac.gramian()), Array)
    stch = jaxjd.scalarization.stch(0.1, [0.5, 0.5])
    assert_type(stch, jaxjd.Scalarizer)
    assert_type(stch(losses), Array)
    assert_type(stch.weighting, jaxjd.Weighting)
    balanced = jaxjd.aggregate(stch, wrt={"w": True, "b": False})
    groups = jaxjd.partition({"a": jaxjd.upgrad(), "b": jaxjd.sum()}, {"w": "a"})
    partial = jaxjd.aggregate(weighting, wrt={"w": True, "b": False})
    own = jaxjd.aggregate(lambda gramian: 1 / jnp.diag(gramian))
    for transformation in (groups, partial, own, jaxjd.graddrop(), jaxjd.mgda()):
        transformation.update(jac, transformation.init(params), params)
    for transformation in (balanced, jaxjd.uw(num_losses=2), jaxjd.famo(num_losses=2)):
        transformation.update(
            jac,
            transformation.init(params),
            params,
            losses=losses,
            losses_after=losses,
        )


def mistakes(params: Params, x: Array) -> None:
    jaxjd.upgard()  # type: ignore[attr-defined]
    jaxjd.upgrad(preferences=[1.0])  # type: ignore[call-arg]
    jaxjd.uw()  # type: ignore[call-arg]
    jaxjd.value_and_jac(loss)(params)  # type: ignore[call-arg]
    jaxjd.jac(loss, method="exact")  # type: ignore[call-overload]
