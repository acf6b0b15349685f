"""The optax side: how a Jacobian becomes an update."""

from jaxjd.transform._aggregate import AggregateState as AggregateState
from jaxjd.transform._aggregate import aggregate as aggregate
from jaxjd.transform._aggregate import aggregator as aggregator
from jaxjd.transform._partition import PartitionState as PartitionState
from jaxjd.transform._partition import partition as partition
