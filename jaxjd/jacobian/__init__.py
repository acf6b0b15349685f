"""What a user of the engine sees: `value_and_jac`, `jac`, `explain` and `Jacobian`."""

from jaxjd.jacobian._checks import ChunkSize as ChunkSize
from jaxjd.jacobian._checks import Method as Method
from jaxjd.jacobian._checks import check_argnums as check_argnums
from jaxjd.jacobian._checks import check_fun as check_fun
from jaxjd.jacobian._checks import check_in_axes as check_in_axes
from jaxjd.jacobian._checks import split_aux as split_aux
from jaxjd.jacobian._concatenate import concatenate as concatenate
from jaxjd.jacobian._explain import Explanation as Explanation
from jaxjd.jacobian._jacobian import Jacobian as Jacobian
from jaxjd.jacobian._layout import Losses as Losses
from jaxjd.jacobian._layout import Parameters as Parameters
from jaxjd.jacobian._layout import Source as Source
from jaxjd.jacobian._layout import as_prefix as as_prefix
from jaxjd.jacobian._value_and_jac import MEMORY as MEMORY
from jaxjd.jacobian._value_and_jac import explain as explain
from jaxjd.jacobian._value_and_jac import jac as jac
from jaxjd.jacobian._value_and_jac import value_and_jac as value_and_jac
