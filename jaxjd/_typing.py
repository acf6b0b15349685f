"""Annotations that several modules share.

`PyTree` is one of given leaves to a reader, and anything to a type checker.

jaxtyping's `PyTree` has no type at all in the eyes of a checker in strict mode, which
then complains of whoever uses it.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from jaxtyping import Array, Float

if TYPE_CHECKING:
    from typing_extensions import TypeAliasType

    _Leaf = TypeVar("_Leaf")
    PyTree = TypeAliasType("PyTree", Any, type_params=(_Leaf,))
else:
    from jaxtyping import PyTree as PyTree

# A number for each loss: m numbers in the order of the rows, or a dict like the losses.
PerLoss = Float[Array, " m"] | Sequence[float] | Mapping[str, Any]
