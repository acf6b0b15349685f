"""One room per way to get a Gramian, `G = J Jᵀ`, and a combination of rows, `Jᵀ w`.

- `dense`: the whole Jacobian in memory.
- `chunked`: a few rows at a time, computed anew when needed.
- `structured`: no rows at all, where that is possible.

Each is a pytree with the methods `rows`, `rows_at`, `gramian`, `vjp`, `jvp` and
`restrict`, on flat lists of parameters, and knows nothing of how parameters and losses
are structured: that is `jaxjd.jacobian`.
"""

from jaxjd.engine._batch_statistics import (
    BATCH_STATISTICS_ADVICE as BATCH_STATISTICS_ADVICE,
)
from jaxjd.engine._forwarded import forwarded as forwarded
from jaxjd.engine._function import LossFunction as LossFunction
from jaxjd.engine._function import trace as trace
from jaxjd.engine.chunked import Chunked as Chunked
from jaxjd.engine.chunked import products_by_blocks as products_by_blocks
from jaxjd.engine.dense import Dense as Dense
from jaxjd.engine.dense import dense as dense
from jaxjd.engine.structured import Choice as Choice
from jaxjd.engine.structured import Explanation as Explanation
from jaxjd.engine.structured import Plan as Plan
from jaxjd.engine.structured import Structured as Structured
from jaxjd.engine.structured import explain as explain
from jaxjd.engine.structured import plan as plan
from jaxjd.engine.structured import saves_memory as saves_memory
from jaxjd.engine.structured import structured as structured
