"""From the losses to one scalar, whose gradient is a step: one method per file.

>>> import jax, jax.numpy as jnp
>>> import jaxjd
>>> scalarizer = jaxjd.scalarization.geometric_mean()
>>> jax.value_and_grad(scalarizer)(jnp.array([1.0, 4.0]))
(Array(2., dtype=float32), Array([1.  , 0.25], dtype=float32))
"""

from jaxjd.scalarization._cosmos import cosmos as cosmos
from jaxjd.scalarization._dwa import dwa as dwa
from jaxjd.scalarization._famo import famo as famo
from jaxjd.scalarization._geometric_mean import geometric_mean as geometric_mean
from jaxjd.scalarization._gradnorm import gradnorm as gradnorm
from jaxjd.scalarization._imtl_l import imtl_l as imtl_l
from jaxjd.scalarization._linear import constant as constant
from jaxjd.scalarization._linear import mean as mean
from jaxjd.scalarization._linear import random as random
from jaxjd.scalarization._linear import sum as sum
from jaxjd.scalarization._pbi import pbi as pbi
from jaxjd.scalarization._scalarizer import Scalarizer as Scalarizer
from jaxjd.scalarization._stch import stch as stch
from jaxjd.scalarization._uw import uw as uw
