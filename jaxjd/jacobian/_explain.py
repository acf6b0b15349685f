"""What `jaxjd.explain` returns: the method, the reason for it, and a table."""

import dataclasses
from typing import Any

from jaxjd import engine


@dataclasses.dataclass(frozen=True)
class Explanation:
    """How a Jacobian would be computed; `str` and `print` show it.

    - `method`: `"dense"`, `"chunked"` or `"structured"`.
    - `reason`: why it is taken.
    - `num_losses`: m.
    - `losses`: the shapes of the losses, a pytree like them.
    - `parameters`: how the structured method treats each parameter, whether it is taken
      or not: it has one of the `entries` per parameter.
    """

    method: str
    reason: str
    num_losses: int
    losses: Any
    parameters: engine.Table

    def __str__(self) -> str:
        heading = f"{self.num_losses} losses, {self.losses}"
        method = f"method: {self.method}, because {self.reason}"
        if self.method != "structured":
            method += "\nthe structured method would do this:"
        return f"{heading}\n{method}\n{self.parameters}"
