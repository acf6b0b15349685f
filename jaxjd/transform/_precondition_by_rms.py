"""Aggregate in the geometry in which RMSProp and Adam take steps."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree
from optax.experimental import aggregating

from jaxjd import engine
from jaxjd._checks import check_mask, check_number
from jaxjd._numerics import accumulation_dtype, like
from jaxjd.scalarization import Scalarizer
from jaxjd.transform._arguments import check_extra_args, in_order
from jaxjd.transform._as_jacobian import as_jacobian
from jaxjd.transform._rows import sum_over_rows
from jaxjd.weighting import Weighting
from jaxjd.weighting._weighting import keep_unless


class PreconditionByRmsState(NamedTuple):
    """The state of `precondition_by_rms`.

    - `count`: how many batches the average is of, [].
    - `nu`: the moving average of squared gradients, not debiased, a pytree like the
      parameters, float32 or wider.
    - `aggregator`: the state of the aggregator.
    """

    count: Int[Array, ""]
    nu: PyTree[Float[Array, "..."]]
    aggregator: optax.OptState


def precondition_by_rms(
    aggregator: optax.GradientTransformation,
    decay: float | Float[Array, ""] = 0.999,
    eps: float | Float[Array, ""] = 1e-8,
) -> aggregating.Aggregator:
    r"""Scale by coordinate as RMSProp does, without conflicts after the aggregator.

    An aggregator followed by `optax.scale_by_rms` takes the step $P J^\top w$, whose
    weights are for $J J^\top$: a step of UPGrad may then conflict, since the scales $P$
    turn it. Here the weights are for $J P J^\top$, and the step is the same $P J^\top
    w$. What the aggregator promises then holds for the step: with UPGrad $J P J^\top w
    \succeq 0$, so no loss increases. It is the aggregator for the parameters
    $P^{-1/2} \theta$.

    ```python
    tx = optax.chain(jaxjd.precondition_by_rms(jaxjd.upgrad()), optax.sgd(1e-3))
    ```

    $P$ must be known before the weights. So it comes from the gradients of the losses,
    not from their aggregation: $P = 1 / (\sqrt{\hat\nu} + \epsilon)$, where $\hat\nu$
    is the debiased moving average of $\frac{1}{m} \sum_i g_i^2$, in each coordinate,
    with those of this step. No scaled gradient has then an entry above $\sqrt{m / (1 -
    \beta)}$. With one loss the step is that of Adam without momentum. With m losses
    whose gradients have little in common it is up to $\sqrt{m}$ times shorter than
    that of Adam on their mean.

    Momentum or weight decay after this may conflict, which [`jaxjd.conflicts`][] shows.

    The squares and the Gramian each need the rows of $J$. With rows in memory, as for
    the losses of tasks, this costs two passes over them. With one loss per example it
    forms the gradients of all examples, twice, those of one parameter at a time for the
    Gramian: m times as much memory as the largest parameter takes. With a `chunk_size`
    it computes their rows twice. `every` saves less, as the squares need the rows in
    every step.

    `update` takes the extra arguments of the aggregator. A loss that `mask` leaves out
    has no part in $P$. A batch that is not finite gives NaN and leaves the average as
    it was.

    **Arguments:**

    - `aggregator`: such as `jaxjd.upgrad()`, `jaxjd.aggregate(...)` or
      `jaxjd.partition(...)`. `features` are refused: $P$ is one of parameters.
    - `decay`: $\beta$, how much of the average stays, in [0, 1).
    - `eps`: $\epsilon$, in [0, inf).

    **Raises:** `TypeError` if `aggregator` is not a transformation; `TypeError` or
    `ValueError` if `decay` or `eps` is not a number, or is out of range. When `update`
    is traced, as [`jaxjd.aggregate`][]; `ValueError` if the parameters are not those of
    `init`.

    **References:** Tieleman & Hinton (2012), RMSProp; Kingma & Ba (2015),
    arXiv:1412.6980, Algorithm 1 for the average and its bias; Quinton & Rey (2024),
    arXiv:2406.16232, section 2.2 for the aggregation.

    **Example:**

    >>> params, J = jnp.zeros(2), jnp.array([[1.0, 1.0], [-0.5, 10.0]])
    >>> tx = jaxjd.precondition_by_rms(jaxjd.mean())
    >>> update, state = tx.update(J, tx.init(params), params)
    >>> update
    Array([0.3162, 0.7739], dtype=float32)
    """
    weighs = isinstance(aggregator, Weighting | Scalarizer)
    if weighs or not (hasattr(aggregator, "init") and hasattr(aggregator, "update")):
        raise TypeError(
            "`aggregator` must be a transformation, such as jaxjd.upgrad(). Got "
            f"{aggregator!r}. Make one of a weighting by `jaxjd.aggregate`."
        )
    beta = check_number("decay", decay, "[0, 1)")
    small = check_number("eps", eps, "[0, inf)")
    inner = optax.with_extra_args_support(aggregator)

    def init_fn(params: optax.Params) -> PreconditionByRmsState:
        nu = jax.tree.map(
            lambda p: jnp.zeros(jnp.shape(p), accumulation_dtype(p)), params
        )
        return PreconditionByRmsState(jnp.zeros((), jnp.int32), nu, inner.init(params))

    def update_fn(
        updates: Any,
        state: Any,
        params: optax.Params | None = None,
        *,
        mask: PyTree[Bool[Array, "..."]] | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, PreconditionByRmsState]:
        check_extra_args(extra_args)
        jacobian = as_jacobian(updates, params)
        parameters = jacobian._parameters
        old, structure = jax.tree.flatten(state.nu)
        shapes = [parameters.shapes[i] for i in parameters.kept]
        if [x.shape for x in old] != shapes:
            raise ValueError(
                "`updates` must be with respect to the parameters that `init` was "
                f"given, {[x.shape for x in old]}. Got {shapes}."
            )
        if mask is not None:
            extra_args["mask"] = mask
        present = check_mask(in_order("mask", mask, jacobian), jacobian.num_losses)
        number = jnp.maximum(present.sum(), 1)

        def square(rows: Float[Array, "b ..."], _: Any) -> Float[Array, "..."]:
            return jnp.square(rows.astype(accumulation_dtype(rows))).sum(0)

        squares = [
            total.astype(x.dtype) / number.astype(x.dtype)
            for total, x in zip(
                sum_over_rows(jacobian, present, (), square), old, strict=True
            )
        ]
        count = jnp.asarray(optax.safe_increment(state.count))

        def averaged(old: Array, square: Array) -> Array:
            b = like(beta, old)
            return b * old + (1 - b) * square

        def scale(nu: Array) -> Array:
            bias = 1 - like(beta, nu) ** count.astype(nu.dtype)
            rms = jnp.sqrt(nu / bias) + like(small, nu)
            return jnp.where(rms == 0, 0, jax.lax.rsqrt(jnp.where(rms == 0, 1, rms)))

        nu = [averaged(*pair) for pair in zip(old, squares, strict=True)]
        scales = [scale(x) for x in nu]
        of_scaled = dataclasses.replace(
            jacobian,
            _operator=engine.scaled(jacobian._operator, scales),
            _named=None,
        )
        found, new = inner.update(of_scaled, state.aggregator, params, **extra_args)
        update = [
            (x * s).astype(dtype)
            for x, s, dtype in zip(
                parameters.flatten("updates", found),
                scales,
                jacobian._operator.dtypes,
                strict=True,
            )
        ]
        finite = jnp.stack([jnp.isfinite(x).all() for x in squares]).all()
        counted = keep_unless(
            finite & present.any(),
            (count, jax.tree.unflatten(structure, nu)),
            (state.count, state.nu),
        )
        return parameters.unflatten(update), PreconditionByRmsState(*counted, new)

    return aggregating.Aggregator(init_fn, update_fn)
