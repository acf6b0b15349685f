"""Which quadratic programs over the cone of the gradients can be solved here?"""

from jaxjd.solvers._certificate import Certificate as Certificate
from jaxjd.solvers.dual_cone import DualConeProjection as DualConeProjection
from jaxjd.solvers.dual_cone import project_dual_cone as project_dual_cone
from jaxjd.solvers.least_distance import LeastDistance as LeastDistance
from jaxjd.solvers.least_distance import least_distance as least_distance
from jaxjd.solvers.simplex import SimplexMinimum as SimplexMinimum
from jaxjd.solvers.simplex import minimise_on_simplex as minimise_on_simplex
