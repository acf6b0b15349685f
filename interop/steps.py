"""Compare the methods that have a state over 20 steps.

`METHODS` is a table like the one in `interop.aggregators`. Each library carries its own
state, so a difference in one step enters the next.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import torch
import torchjd.aggregation as reference
from jaxtyping import Int

import jaxjd
from jaxjd.weighting._gradvac import gradvac_weights

from . import aggregators
from .aggregators import (
    CONDITION,
    LEAST_SQUARES,
    ROUNDING,
    Bounds,
    Inputs,
    Method,
    Ours,
    inputs,
    of_cross_gramian,
    of_gramian,
    of_rows,
    preference,
    preferred,
    present,
    with_alone,
)
from .check import Check
from .jacobians import sequence

NUM_STEPS = 20


def checks() -> list[Check]:
    rows = [row for method in METHODS for row in with_alone(method, steps(m=1))]
    return [aggregators.check(f"{NUM_STEPS} steps", row) for row in rows]


def steps(scale: float = 1.0, shift: float = 0.0, m: int = 6) -> list[list[Inputs]]:
    return [
        [
            inputs(scale * first + shift, scale * second + shift)
            for first, second in sequence(NUM_STEPS, m, 12)
        ]
    ]


def gradvac(decay: float, eps: float) -> Callable[[int, int], Ours]:
    def ours(m: int, n: int) -> Ours:
        del n

        def update(inputs, orders, targets):
            return gradvac_weights(
                inputs.gramian, present(inputs), orders, targets, decay=decay, eps=eps
            )

        return Ours(lambda: jnp.zeros((m, m)), update)

    return ours


def orders(drawn: list[torch.Tensor]) -> Int[np.ndarray, "m m"]:
    """Convert the permutations: TorchJD's have no own loss, jaxjd's have it last."""
    m = len(drawn)
    others = [np.delete(np.arange(m), i)[drawn[i].numpy()] for i in range(m)]
    return np.concatenate([np.stack(others), np.arange(m)[:, None]], axis=1)


# TorchJD adds `eps` to products of norms, jaxjd to values relative to those products.
EPS: Bounds = {"float32": 2e-6, "float64": 1e-7}

METHODS = [
    *(
        Method(
            f"gradvac, eps = {eps:g}, same permutations",
            gradvac(0.7, eps),
            lambda m, dtype, eps=eps: reference.GradVacWeighting(beta=0.3, eps=eps),
            "gramian",
            steps,
            bounds,
            draws=orders,
        )
        for eps, bounds in ((0.0, ROUNDING), (1e-8, EPS))
    ),
    Method(
        "nash_mtl",
        of_rows(lambda m: jaxjd.nash_mtl(num_losses=m, update_every=3)),
        lambda m, dtype: reference.NashMTL(m, update_weights_every=3),
        "rows",
        # The shift gives all gradients a common part. Without it TorchJD's solver fails
        # in some steps. With one loss it raises in every step.
        lambda: steps(shift=1.0),
        LEAST_SQUARES,
        alone=False,
    ),
    Method(
        "pcd",
        of_gramian(lambda m: jaxjd.weighting.pcd(num_losses=m)),
        lambda m, dtype: reference.PCDWeighting(),
        "gramian",
        steps,
        CONDITION,
    ),
    Method(
        "pcd, decay = 0.5, one tau each",
        of_gramian(
            lambda m: jaxjd.weighting.pcd(
                num_losses=m, decay=0.5, tau=preference(m)[1:]
            )
        ),
        lambda m, dtype: reference.PCDWeighting(preferred(m, dtype)[1:], 0.5),
        "gramian",
        steps,
        CONDITION,
        alone=False,
    ),
    Method(
        "sdmgrad",
        of_cross_gramian(lambda m: jaxjd.weighting.sdmgrad(num_losses=m)),
        lambda m, dtype: reference.SDMGradWeighting(),
        "cross_gramian",
        # TorchJD adds 1e-8 to a squared norm. At this scale that does not matter.
        lambda: steps(1e4),
        CONDITION,
    ),
    Method(
        "sdmgrad, gentle, preference",
        of_cross_gramian(
            lambda m: jaxjd.weighting.sdmgrad(
                num_losses=m,
                step_size=0.5,
                momentum=0.2,
                inner_steps=7,
                regularization=2.0,
                preference=preference(m),
            )
        ),
        lambda m, dtype: reference.SDMGradWeighting(
            0.5, 0.2, 7, 2.0, preferred(m, dtype)
        ),
        "cross_gramian",
        lambda: steps(1e4),
        CONDITION,
    ),
    Method(
        "modo",
        of_cross_gramian(
            lambda m: jaxjd.weighting.modo(
                num_losses=m, step_size=0.02, regularization=0.3
            )
        ),
        lambda m, dtype: reference.MoDoWeighting(0.02, 0.3),
        "cross_gramian",
        steps,
        ROUNDING,
    ),
    *(
        Method(
            f"cr_mogm, of aligned_mtl{named}",
            of_gramian(
                lambda m, initial=initial: jaxjd.weighting.cr_mogm(
                    jaxjd.weighting.aligned_mtl(),
                    num_losses=m,
                    initial_weights=preference(m) if initial else None,
                )
            ),
            lambda m, dtype, initial=initial: reference.CRMOGMWeighting(
                reference.AlignedMTLWeighting(),
                initial_weights=preferred(m, dtype) if initial else None,
            ),
            "gramian",
            steps,
            CONDITION,
        )
        for named, initial in (("", False), (", initial weights", True))
    ),
    *(
        Method(
            f"excess_mtl, {warmup} steps of warm-up",
            of_rows(
                lambda m, warmup=warmup: jaxjd.excess_mtl(
                    num_losses=m, step_size=0.5, warmup_steps=warmup
                )
            ),
            lambda m, dtype, warmup=warmup: reference.ExcessMTL(0.5, warmup),
            "rows",
            steps,
            ROUNDING,
        )
        for warmup in (0, 4)
    ),
]
