"""How does a Jacobian-descent step cost no more than an SGD step?"""

from jaxjd.engine.structured._jacobian import Structured as Structured
from jaxjd.engine.structured._jacobian import structured as structured
