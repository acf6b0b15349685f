"""Solve convex problems in the gradients, given their Gramian."""

from jaxjd.solvers._certificate import Certificate as Certificate
from jaxjd.solvers.ball import BallMaximum as BallMaximum
from jaxjd.solvers.ball import maximise_on_ball as maximise_on_ball
from jaxjd.solvers.bargaining import Bargain as Bargain
from jaxjd.solvers.bargaining import bargain as bargain
from jaxjd.solvers.dual_cone import DualConeProjection as DualConeProjection
from jaxjd.solvers.dual_cone import project_dual_cone as project_dual_cone
from jaxjd.solvers.least_distance import LeastDistance as LeastDistance
from jaxjd.solvers.least_distance import least_distance as least_distance
from jaxjd.solvers.simplex import SimplexMinimum as SimplexMinimum
from jaxjd.solvers.simplex import minimise_on_simplex as minimise_on_simplex
