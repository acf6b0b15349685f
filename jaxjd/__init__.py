"""Jacobian descent for JAX: train against a vector of losses.

>>> import jax, jax.numpy as jnp, jaxjd, optax
>>> def losses(params):
...     return jnp.stack([(params["w"] - 1.0) ** 2, (params["w"] + 1.0) ** 2])
>>> params = {"w": jnp.array(3.0)}
>>> tx = optax.chain(jaxjd.upgrad(), optax.sgd(0.1))
>>> state = tx.init(params)
>>> values, jac = jaxjd.value_and_jac(losses)(params)
>>> updates, state = tx.update(jac, state, params)
>>> params = optax.apply_updates(params, updates)

Each weighting `jaxjd.weighting.NAME` has its optax transformation `jaxjd.NAME` here,
and so has each scalarizer `jaxjd.scalarization.NAME`, whose weights come from the
losses. Four more look at the rows themselves: `graddrop`, `trimmed_mean`, `excess_mtl`
and `momentum_conflict_free`.
"""

import importlib as _importlib
import sys as _sys
import typing as _t

from jaxjd import scalarization as scalarization
from jaxjd import solvers as solvers
from jaxjd import weighting as weighting
from jaxjd._conflicts import Conflicts as Conflicts
from jaxjd._conflicts import conflicts as conflicts
from jaxjd._diagnostics import Diagnostics as Diagnostics
from jaxjd._diagnostics import diagnostics as diagnostics
from jaxjd.jacobian import Explanation as Explanation
from jaxjd.jacobian import Jacobian as Jacobian
from jaxjd.jacobian import concatenate as concatenate
from jaxjd.jacobian import explain as explain
from jaxjd.jacobian import jac as jac
from jaxjd.jacobian import value_and_jac as value_and_jac
from jaxjd.scalarization import Scalarizer as Scalarizer
from jaxjd.transform import AggregateState as AggregateState
from jaxjd.transform import ExcessMTLState as ExcessMTLState
from jaxjd.transform import GradDropState as GradDropState
from jaxjd.transform import MomentumConflictFreeState as MomentumConflictFreeState
from jaxjd.transform import PartitionState as PartitionState
from jaxjd.transform import PreconditionByRmsState as PreconditionByRmsState
from jaxjd.transform import aggregate as aggregate
from jaxjd.transform import aggregator as _aggregator
from jaxjd.transform import excess_mtl as excess_mtl
from jaxjd.transform import graddrop as graddrop
from jaxjd.transform import momentum_conflict_free as momentum_conflict_free
from jaxjd.transform import partition as partition
from jaxjd.transform import precondition_by_rms as precondition_by_rms
from jaxjd.transform import trimmed_mean as trimmed_mean
from jaxjd.weighting import Weighting as Weighting

__version__ = "0.1.0"

aligned_mtl = _aggregator(weighting.aligned_mtl)
cagrad = _aggregator(weighting.cagrad)
conflict_free = _aggregator(weighting.conflict_free)
constant = _aggregator(weighting.constant)
cosmos = _aggregator(scalarization.cosmos)
cr_mogm = _aggregator(weighting.cr_mogm)
dualproj = _aggregator(weighting.dualproj)
dwa = _aggregator(scalarization.dwa)
fairgrad = _aggregator(weighting.fairgrad)
famo = _aggregator(scalarization.famo)
geometric_mean = _aggregator(scalarization.geometric_mean)
gradnorm = _aggregator(scalarization.gradnorm)
gradvac = _aggregator(weighting.gradvac)
imtl_g = _aggregator(weighting.imtl_g)
imtl_l = _aggregator(scalarization.imtl_l)
krum = _aggregator(weighting.krum)
mean = _aggregator(weighting.mean)
mgda = _aggregator(weighting.mgda)
modo = _aggregator(weighting.modo)
nash_mtl = _aggregator(weighting.nash_mtl)
pbi = _aggregator(scalarization.pbi)
pcd = _aggregator(weighting.pcd)
pcgrad = _aggregator(weighting.pcgrad)
random = _aggregator(weighting.random)
sdmgrad = _aggregator(weighting.sdmgrad)
stch = _aggregator(scalarization.stch)
sum = _aggregator(weighting.sum)
upgrad = _aggregator(weighting.upgrad)
uw = _aggregator(scalarization.uw)


_PRIVATE = {"engine", "jacobian", "transform"}
_OPTIONAL = {"nnx", "plot"}

if _t.TYPE_CHECKING:
    from jaxjd import nnx as nnx
    from jaxjd import plot as plot
else:
    # Flax and matplotlib are optional, so their parts are only imported when they are
    # asked for. Type checkers must not see this function, or every misspelt name would
    # be one of ours to them.
    def __getattr__(name: str):
        if name in _OPTIONAL:
            return _importlib.import_module(f"jaxjd.{name}")
        raise AttributeError(
            f"module 'jaxjd' has no attribute {name!r}",
            name=name,
            obj=_sys.modules[__name__],
        )


def __dir__() -> list[str]:
    hidden = {name for name in globals() if name.startswith("_")} - {"__version__"}
    return sorted((globals().keys() | _OPTIONAL) - hidden - _PRIVATE)
