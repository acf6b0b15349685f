"""The optax side: transformations that turn a Jacobian into an update."""

from jaxjd.transform._aggregate import AggregateState as AggregateState
from jaxjd.transform._aggregate import aggregate as aggregate
from jaxjd.transform._aggregate import aggregator as aggregator
from jaxjd.transform._excess_mtl import ExcessMTLState as ExcessMTLState
from jaxjd.transform._excess_mtl import excess_mtl as excess_mtl
from jaxjd.transform._graddrop import GradDropState as GradDropState
from jaxjd.transform._graddrop import graddrop as graddrop
from jaxjd.transform._momentum_conflict_free import (
    MomentumConflictFreeState as MomentumConflictFreeState,
)
from jaxjd.transform._momentum_conflict_free import (
    momentum_conflict_free as momentum_conflict_free,
)
from jaxjd.transform._partition import PartitionState as PartitionState
from jaxjd.transform._partition import partition as partition
from jaxjd.transform._precondition_by_rms import (
    PreconditionByRmsState as PreconditionByRmsState,
)
from jaxjd.transform._precondition_by_rms import (
    precondition_by_rms as precondition_by_rms,
)
from jaxjd.transform._trimmed_mean import trimmed_mean as trimmed_mean
