"""ExcessMTL: give more weight to the losses that are further above their minimum."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree
from optax.experimental import aggregating

from jaxjd._checks import check_integer, check_mask, check_number, known
from jaxjd._numerics import accumulation_dtype, like, matmul
from jaxjd.transform._arguments import (
    check_extra_args,
    in_order,
    preference_in,
)
from jaxjd.transform._as_jacobian import as_jacobian
from jaxjd.transform._rows import along_rows, by_parameter

# As in the code of the authors: under the root of the sums, and in the denominator of
# the scaling.
EPSILON = 1e-7


class ExcessMTLState(NamedTuple):
    """The state of ExcessMTL for m losses.

    - `steps`: how many batches there were, [].
    - `squares`: the sum of the squared gradients of each loss, a pytree like the
      parameters with a leading axis of losses, float32 or wider.
    - `risk_sums`, `risk_counts`: the sum and the number of the excess risks that make
      up the baseline of each loss, [m].
    - `log_weights`: the logarithms of the weights, which sum to 1, [m]. A weight that
      underflowed to 0 could never grow again.
    """

    steps: Int[Array, ""]
    squares: PyTree[Float[Array, "m ..."]]
    risk_sums: Float[Array, " m"]
    risk_counts: Int[Array, " m"]
    log_weights: Float[Array, " m"]


def excess_mtl(
    *,
    num_losses: int,
    step_size: float | Float[Array, ""] = 1.0,
    warmup_steps: int | Int[Array, ""] = 0,
) -> aggregating.Aggregator:
    r"""The aggregator whose weights follow the excess risks of the losses.

    The excess risk of a loss is how far it is above its minimum. Weights that follow it
    are not attracted by noise, which no training removes. It is estimated as $\hat{E}_i
    = g_i^\top H_i^{-1} g_i$, where $H_i$ is diagonal: the root of the sum of the
    squares of all $g_i$ so far. It is divided by its baseline. Then each weight is
    multiplied by $\exp(\eta \hat{E}_i)$, and all are normalised to sum 1. The update is
    $J^\top w$.

    The state holds these sums, which are as large as $J$. A batch gives NaN and leaves
    the state as it was if its gradients, or their squares, are not finite.

    `update` takes a `mask` as that of [`jaxjd.aggregate`][] does. A missing loss keeps
    its sums and its weight. The others divide the weight that they have together, and
    in the update their weights are scaled to sum 1. The baseline of a loss comes from
    the batches in which it was present, and if it was missing during all of the warmup,
    from its first batch.

    **Arguments:**

    - `num_losses`: m, for which the state is made.
    - `step_size`: $\eta > 0$.
    - `warmup_steps`: for how many steps the weights stay $1/m$ while excess risks are
      collected. Their mean is the baseline. With 0 the first excess risks are the
      baseline, and that step uses them as they are.

    **Raises:** `ValueError` or `TypeError` if an argument is not a number, or is out of
    range. When `update` is traced, `ValueError` if there are not `num_losses` losses or
    the parameters are not those of `init`, and as [`jaxjd.aggregate`][].

    **Reference:** He et al. (2024), Robust multi-task learning with excess risks (ICML
    2024), equations 6, 7 and 9. As in their code and TorchJD, the current gradient is
    part of its $H_i$.

    **Example:**

    >>> params = jnp.zeros(3)
    >>> tx = jaxjd.excess_mtl(num_losses=2)
    >>> J = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    >>> update, state = tx.update(J, tx.init(params), params)
    >>> update
    Array([4.808, 1.   , 1.   ], dtype=float32)
    """
    size = check_integer("num_losses", num_losses, least=1)
    eta = check_number("step_size", step_size, "(0, inf)")
    warmup = check_integer("warmup_steps", warmup_steps, least=0)

    def init_fn(params: optax.Params) -> ExcessMTLState:
        m = known("num_losses", size)
        dtype = accumulation_dtype(jnp.zeros((), jnp.float16), *jax.tree.leaves(params))
        zeros = jnp.zeros(m, dtype)
        return ExcessMTLState(
            jnp.zeros((), jnp.int32),
            jax.tree.map(
                lambda p: jnp.zeros((m, *jnp.shape(p)), accumulation_dtype(p)),
                params,
            ),
            zeros,
            jnp.zeros(m, jnp.int32),
            jnp.full_like(zeros, -jnp.log(float(m))),
        )

    def update_fn(
        updates: Any,
        state: Any,
        params: optax.Params | None = None,
        *,
        mask: Bool[Array, " m"] | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ExcessMTLState]:
        check_extra_args(extra_args)
        jacobian = as_jacobian(updates, params)
        preference_in(extra_args, jacobian, has_one=False)
        m = len(state.log_weights)
        if jacobian.num_losses != m:
            raise ValueError(
                f"`updates` must be of num_losses={m} losses, for which the state was "
                f"made. Got {jacobian.num_losses}."
            )
        mask = check_mask(in_order("mask", mask, jacobian), m)
        old, structure = jax.tree.flatten(state.squares)
        shapes = [jacobian._parameters.shapes[i] for i in jacobian._parameters.kept]
        if [x.shape[1:] for x in old] != shapes:
            raise ValueError(
                "`updates` must be with respect to the parameters that `init` was "
                f"given, {[x.shape[1:] for x in old]}. Got {shapes}."
            )
        dtype = state.log_weights.dtype

        def accumulate(rows: Array, total: Array) -> tuple[Array, Array]:
            # Equations 6 and 7.
            present = jnp.where(along_rows(mask, rows), rows, 0).astype(total.dtype)
            total += present**2
            risks = present**2 / jnp.sqrt(total + EPSILON)
            # On a CPU, XLA sums along rows on one core, and multiplies on all of them.
            flat = risks.reshape(m, -1)
            ones = jnp.ones(flat.shape[1], flat.dtype)
            return total, matmul(flat, ones).astype(dtype)

        squares, risks = zip(*by_parameter(jacobian, accumulate, old), strict=True)
        risks = jnp.stack(risks).sum(0)

        warming_up = state.steps < warmup
        collected = mask & (warming_up | (state.risk_counts == 0))
        risk_sums = state.risk_sums + jnp.where(collected, risks, 0)
        risk_counts = state.risk_counts + collected.astype(jnp.int32)
        baselines = risk_sums / jnp.maximum(risk_counts, 1).astype(dtype)
        first = (state.steps == 0) & (warmup == 0)
        scaled = jnp.where(first, risks, risks / (baselines + EPSILON))

        # Equation 9.
        tilted = state.log_weights + jnp.where(
            warming_up, 0, like(eta, scaled) * scaled
        )
        shares = log_shares(tilted, mask)
        together = jax.nn.logsumexp(jnp.where(mask, state.log_weights, -jnp.inf))
        log_weights = jnp.where(mask, shares + together, state.log_weights)

        new = ExcessMTLState(
            jnp.asarray(optax.safe_increment(state.steps)),
            jax.tree.unflatten(structure, squares),
            risk_sums,
            risk_counts,
            log_weights,
        )
        finite = jnp.isfinite(risks).all()
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
        weights = jnp.where(mask, jnp.exp(shares), 0)
        return jacobian.vjp(jnp.where(finite, weights, jnp.nan)), kept

    return aggregating.Aggregator(init_fn, update_fn)


def log_shares(
    log_weights: Float[Array, " m"], mask: Bool[Array, " m"]
) -> Float[Array, " m"]:
    """The logarithms of the weights of the present losses, normalised to sum 1."""
    present = jnp.where(mask, log_weights, -jnp.inf)
    return jnp.where(mask, log_weights - jax.nn.logsumexp(present), -jnp.inf)
