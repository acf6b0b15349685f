"""Do the methods that have a state agree, step after step?

`METHODS` is a table as that of `interop.aggregators`. Each state is carried over 20
steps, each library's own, so that a difference in one step enters the next.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torchjd.aggregation as reference
from jaxtyping import Array, Float, Int

import jaxjd
from jaxjd.weighting._gradvac import gradvac_weights

from . import aggregators
from .aggregators import (
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
)
from .check import Check
from .jacobians import sequence

NUM_STEPS = 20


def checks() -> list[Check]:
    return [
        aggregators.check(f"{NUM_STEPS} steps", method) for method in METHODS
    ]


def steps(scale: float = 1.0) -> list[list[Inputs]]:
    batches = sequence(NUM_STEPS, 6, 12)
    return [[inputs(scale * one, scale * other) for one, other in batches]]


def gradvac(beta: float, eps: float) -> Callable[[int, int], Ours]:
    def ours(m: int, n: int) -> Ours:
        del n

        def update(inputs, orders, targets):
            return gradvac_weights(
                inputs.gramian, present(inputs), orders, targets, beta=beta, eps=eps
            )

        return Ours(lambda: jnp.zeros((m, m)), update)

    return ours


def orders(drawn: list[torch.Tensor]) -> Int[np.ndarray, "m m"]:
    """TorchJD permutes the other losses. jaxjd passes over the row's own, put last."""
    m = len(drawn)
    others = [np.delete(np.arange(m), i)[drawn[i].numpy()] for i in range(m)]
    return np.concatenate([np.stack(others), np.arange(m)[:, None]], axis=1)


TIGHT: Bounds = {"float32": 1e-5, "float64": 1e-13}


METHODS = [
    *(
        Method(
            f"gradvac, eps = {eps:g}, same permutations",
            gradvac(0.3, eps),
            lambda m, dtype, eps=eps: reference.GradVacWeighting(beta=0.3, eps=eps),
            "gramian",
            steps,
            TIGHT,
            draws=orders,
        )
        for eps in (0.0, 1e-8)
    ),
    Method(
        "nash_mtl",
        of_rows(lambda m: jaxjd.nash_mtl(num_losses=m, update_every=3)),
        lambda m, dtype: reference.NashMTL(m, update_weights_every=3),
        "rows",
        steps,
        TIGHT,
    ),
    Method(
        "pcd",
        of_gramian(lambda m: jaxjd.weighting.pcd(num_losses=m)),
        lambda m, dtype: reference.PCDWeighting(),
        "gramian",
        steps,
        TIGHT,
    ),
    Method(
        "pcd, beta = 0.5, one tau each",
        of_gramian(lambda m: jaxjd.weighting.pcd(num_losses=m, beta=0.5, tau=preference(m)[1:])),
        lambda m, dtype: reference.PCDWeighting(preferred(m, dtype)[1:], 0.5),
        "gramian",
        steps,
        TIGHT,
    ),
    Method(
        "sdmgrad",
        of_cross_gramian(lambda m: jaxjd.weighting.sdmgrad(num_losses=m)),
        lambda m, dtype: reference.SDMGradWeighting(),
        "cross_gramian",
        # TorchJD adds 1e-8 to the square of a norm, which is nothing beside this.
        lambda: steps(1e4),
        TIGHT,
    ),
    Method(
        "sdmgrad, gentle, preference",
        of_cross_gramian(
            lambda m: jaxjd.weighting.sdmgrad(
                num_losses=m, lr=0.5, momentum=0.2, n_iter=7, lambda_=2.0, preference=preference(m)
            )
        ),
        lambda m, dtype: reference.SDMGradWeighting(
            0.5, 0.2, 7, 2.0, preferred(m, dtype)
        ),
        "cross_gramian",
        lambda: steps(1e4),
        TIGHT,
    ),
    Method(
        "modo",
        of_cross_gramian(lambda m: jaxjd.weighting.modo(num_losses=m, gamma=0.02, rho=0.3)),
        lambda m, dtype: reference.MoDoWeighting(0.02, 0.3),
        "cross_gramian",
        steps,
        TIGHT,
    ),
    *(
        Method(
            f"cr_mogm of {name}, {kind}",
            of_gramian(lambda m, ours=ours, start=start: jaxjd.weighting.cr_mogm(ours(), num_losses=m, initial_weights=preference(m) if start else None)),
            lambda m, dtype, theirs=theirs, start=start: reference.CRMOGMWeighting(theirs(), initial_weights=preferred(m, dtype) if start else None),
            "gramian",
            steps,
            TIGHT,
        )
        for name, ours, theirs in (("aligned_mtl", jaxjd.weighting.aligned_mtl, reference.AlignedMTLWeighting),)
        for kind, start in (("first weights", False), ("initial weights", True))
    ),
    *(
        Method(
            f"excess_mtl, {warmup} steps of warm-up",
            of_rows(lambda m, warmup=warmup: jaxjd.excess_mtl(num_losses=m, robust_step_size=0.5, n_warmup_steps=warmup)),
            lambda m, dtype, warmup=warmup: reference.ExcessMTL(0.5, warmup),
            "rows",
            steps,
            TIGHT,
        )
        for warmup in (0, 4)
    ),
]
