"""One room per way to get a Gramian, `G = J Jᵀ`, and a combination of rows, `Jᵀ w`.

- `dense`: the whole Jacobian in memory.
- `chunked`: a few rows at a time, computed when they are needed.
- `structured`: no rows at all, where that is possible.
- `concatenated`: the rows of several functions, each in its own way.
- `scaled`: the rows of another operator, with a factor for each parameter's entries.

Each is an `Operator` and a pytree. It works on flat lists of parameters and knows
nothing of how parameters and losses are structured: that is `jaxjd.jacobian`.
"""

from jaxjd.engine._convolutions import are_wrong as are_wrong
from jaxjd.engine._derivative import Derivative as Derivative
from jaxjd.engine._derivative import linearised as linearised
from jaxjd.engine._features import Named as Named
from jaxjd.engine._features import Split as Split
from jaxjd.engine._features import named as named
from jaxjd.engine._forwarded import forwarded as forwarded
from jaxjd.engine._function import LossFunction as LossFunction
from jaxjd.engine._function import trace as trace
from jaxjd.engine._operator import Method as Method
from jaxjd.engine._operator import Operator as Operator
from jaxjd.engine.chunked import Chunked as Chunked
from jaxjd.engine.concatenated import concatenated as concatenated
from jaxjd.engine.concatenated import products as products
from jaxjd.engine.dense import Dense as Dense
from jaxjd.engine.dense import stacked as stacked
from jaxjd.engine.scaled import scaled as scaled
from jaxjd.engine.structured import Choice as Choice
from jaxjd.engine.structured import Fit as Fit
from jaxjd.engine.structured import Plan as Plan
from jaxjd.engine.structured import Structured as Structured
from jaxjd.engine.structured import Table as Table
from jaxjd.engine.structured import explain as explain
from jaxjd.engine.structured import largest_chunk as largest_chunk
from jaxjd.engine.structured import of_whole as of_whole
from jaxjd.engine.structured import plan as plan
from jaxjd.engine.structured import rows_by_chunks as rows_by_chunks
from jaxjd.engine.structured import structured as structured
from jaxjd.engine.structured import with_rows as with_rows
from jaxjd.engine.structured import without_rows as without_rows
