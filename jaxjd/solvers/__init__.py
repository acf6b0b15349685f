"""Which quadratic programs over the cone of the gradients can be solved here?"""

from jaxjd.solvers._certificate import Certificate as Certificate
from jaxjd.solvers.dual_cone import DualConeProjection as DualConeProjection
from jaxjd.solvers.dual_cone import project_dual_cone as project_dual_cone
