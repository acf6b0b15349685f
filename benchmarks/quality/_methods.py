"""Every aggregator, as a whole optimizer for a problem."""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import optax

import jaxjd
from benchmarks.quality._problem import Params, Problem

Make = Callable[[Problem], optax.GradientTransformationExtraArgs]

# Not measured, and why.
LEFT_OUT = {
    "constant": "its weights are up to the user",
    "sum": "Adam makes it the mean",
}


class Method(NamedTuple):
    """An aggregator, and what a step must give it."""

    make: Make
    of_losses: bool = False
    """The weights come from the losses, so the heads get them too."""
    after: bool = False
    """`update` takes the losses after the last step."""
    of_two_batches: bool = False
    """`update` takes a cross Gramian of two more batches."""
    least: int = 1
    """The smallest number of losses."""
    replaces_adam: bool = False


def named(name: str, **arguments: Any) -> Make:
    return lambda problem: getattr(jaxjd, name)(**arguments)


def sized(name: str, **arguments: Any) -> Make:
    return lambda problem: getattr(jaxjd, name)(
        num_losses=problem.num_losses, **arguments
    )


def tenth(problem: Problem) -> int:
    return max(1, problem.num_losses // 10)


def gradnorm(problem: Problem) -> optax.GradientTransformationExtraArgs:
    """With the norms of the gradients of what is shared."""
    made = jaxjd.scalarization.gradnorm(num_losses=problem.num_losses)
    wrt = None if problem.labels is None else is_shared(problem.labels)
    return jaxjd.aggregate(made, wrt=wrt)


METHODS = {
    "mean": Method(named("mean")),
    "upgrad": Method(named("upgrad")),
    "upgrad (TorchJD's rule)": Method(named("upgrad", norm_eps=1e-4, reg_eps=1e-4)),
    "dualproj": Method(named("dualproj")),
    "mgda": Method(named("mgda")),
    "cagrad": Method(named("cagrad")),
    "nash_mtl": Method(sized("nash_mtl")),
    "fairgrad": Method(named("fairgrad")),
    "imtl_g": Method(named("imtl_g")),
    "conflict_free": Method(named("conflict_free")),
    "momentum_conflict_free": Method(
        sized("momentum_conflict_free"), replaces_adam=True
    ),
    "aligned_mtl": Method(named("aligned_mtl")),
    "pcgrad": Method(named("pcgrad")),
    "gradvac": Method(sized("gradvac")),
    "graddrop": Method(named("graddrop")),
    "pcd": Method(sized("pcd")),
    "cr_mogm": Method(
        lambda problem: jaxjd.cr_mogm(
            jaxjd.weighting.upgrad(), num_losses=problem.num_losses
        )
    ),
    "excess_mtl": Method(sized("excess_mtl")),
    "sdmgrad": Method(sized("sdmgrad"), of_two_batches=True),
    "modo": Method(sized("modo"), of_two_batches=True),
    "krum": Method(
        lambda problem: jaxjd.krum(tenth(problem), -(-problem.num_losses // 2)),
        least=4,
    ),
    "trimmed_mean": Method(lambda problem: jaxjd.trimmed_mean(tenth(problem)), least=3),
    "random": Method(named("random"), of_losses=True),
    "geometric_mean": Method(named("geometric_mean"), of_losses=True),
    "uw": Method(sized("uw"), of_losses=True),
    "imtl_l": Method(sized("imtl_l"), of_losses=True),
    "dwa": Method(
        lambda problem: jaxjd.dwa(
            num_losses=problem.num_losses, epoch_steps=problem.epoch_steps
        ),
        of_losses=True,
    ),
    "famo": Method(sized("famo"), of_losses=True, after=True),
    "gradnorm": Method(gradnorm, of_losses=True),
    "stch": Method(named("stch", smoothing=0.1), of_losses=True),
    "cosmos": Method(named("cosmos", penalty=1.0), of_losses=True),
    "pbi": Method(named("pbi"), of_losses=True),
}
# What there is time for on expensive problems: the mean, the methods that promise to
# conflict with nobody, those most used for multi-task learning, and three balancers.
FEW = (
    "mean",
    "upgrad",
    "upgrad (TorchJD's rule)",
    "dualproj",
    "mgda",
    "cagrad",
    "nash_mtl",
    "conflict_free",
    "aligned_mtl",
    "pcgrad",
    "geometric_mean",
    "uw",
    "famo",
)


def of_problem(problem: Problem, everything: bool = False) -> dict[str, Method]:
    """The methods to run, the mean first."""
    every = everything and not problem.memoryless
    wanted = None if every else problem.methods
    return {
        name: method
        for name, method in METHODS.items()
        if problem.num_losses >= method.least and (wanted is None or name in wanted)
    }


def is_shared(labels: Any) -> Params:
    return jax.tree.map(lambda label: label == "shared", labels)


def one_loss_per_step(problem: Problem, method: Method) -> bool:
    """Whether steps take the losses in turn: M-ConFIG, if all parameters are shared."""
    alike = problem.labels is None and problem.in_axes is None
    return method.replaces_adam and alike


def optimizer(
    problem: Problem, method: Method, rate: Any
) -> optax.GradientTransformation:
    """The aggregator, with the gradients' sum for heads, and Adam."""
    aggregator = method.make(problem)
    last = optax.sgd(rate) if method.replaces_adam else optax.adam(rate)
    whole = optax.chain(aggregator, last)
    if problem.labels is None or method.of_losses:
        return whole
    own = optax.chain(jaxjd.sum(), optax.adam(rate))
    groups: dict[Hashable, optax.GradientTransformation] = {"shared": whole, "own": own}
    return jaxjd.partition(groups, problem.labels)
