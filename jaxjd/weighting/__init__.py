"""From the Gramian of the losses to their weights, one method per file.

>>> import jax.numpy as jnp
>>> import jaxjd
>>> jacobian = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
>>> weighting = jaxjd.weighting.mean()
>>> weighting(jacobian @ jacobian.T)
Array([0.5, 0.5], dtype=float32)
"""

from jaxjd.weighting._cagrad import cagrad as cagrad
from jaxjd.weighting._constant import constant as constant
from jaxjd.weighting._dualproj import dualproj as dualproj
from jaxjd.weighting._fairgrad import fairgrad as fairgrad
from jaxjd.weighting._mean import mean as mean
from jaxjd.weighting._mgda import mgda as mgda
from jaxjd.weighting._nash_mtl import nash_mtl as nash_mtl
from jaxjd.weighting._pcd import pcd as pcd
from jaxjd.weighting._sum import sum as sum
from jaxjd.weighting._upgrad import upgrad as upgrad
from jaxjd.weighting._weighting import Weighting as Weighting
