"""A pytree as an annotation: of given leaves to a reader, anything to a type checker.

jaxtyping's `PyTree` has no type at all in the eyes of a checker in strict mode, which
then complains of whoever uses it.
"""

from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from typing_extensions import TypeAliasType

    _Leaf = TypeVar("_Leaf")
    PyTree = TypeAliasType("PyTree", Any, type_params=(_Leaf,))
else:
    from jaxtyping import PyTree as PyTree
