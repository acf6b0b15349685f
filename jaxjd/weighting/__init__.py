"""From the Gramian of the losses to their weights, one method per file.

>>> import jax.numpy as jnp
>>> import jaxjd
>>> jacobian = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
>>> weighting = jaxjd.weighting.mean()
>>> weighting(jacobian @ jacobian.T)
Array([0.5, 0.5], dtype=float32)
"""

from jaxjd.weighting._aligned_mtl import aligned_mtl as aligned_mtl
from jaxjd.weighting._cagrad import cagrad as cagrad
from jaxjd.weighting._conflict_free import conflict_free as conflict_free
from jaxjd.weighting._constant import constant as constant
from jaxjd.weighting._cr_mogm import cr_mogm as cr_mogm
from jaxjd.weighting._dualproj import dualproj as dualproj
from jaxjd.weighting._fairgrad import fairgrad as fairgrad
from jaxjd.weighting._gradvac import gradvac as gradvac
from jaxjd.weighting._imtl_g import imtl_g as imtl_g
from jaxjd.weighting._krum import krum as krum
from jaxjd.weighting._mean import mean as mean
from jaxjd.weighting._mgda import mgda as mgda
from jaxjd.weighting._modo import modo as modo
from jaxjd.weighting._nash_mtl import nash_mtl as nash_mtl
from jaxjd.weighting._normalize import normalize as normalize
from jaxjd.weighting._pcd import pcd as pcd
from jaxjd.weighting._pcgrad import pcgrad as pcgrad
from jaxjd.weighting._random import random as random
from jaxjd.weighting._regularize import regularize as regularize
from jaxjd.weighting._scale_by_losses import scale_by_losses as scale_by_losses
from jaxjd.weighting._sdmgrad import sdmgrad as sdmgrad
from jaxjd.weighting._sum import sum as sum
from jaxjd.weighting._upgrad import upgrad as upgrad
from jaxjd.weighting._weighting import Weighting as Weighting
