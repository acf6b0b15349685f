"""What `jaxjd.explain` returns: the method, the reason for it, and a table."""

import dataclasses
from typing import Any

from jaxjd import engine


@dataclasses.dataclass(frozen=True)
class Explanation:
    """How a Jacobian would be computed; `str` and `print` show it.

    - `method`: `"dense"`, `"chunked"` or `"structured"`.
    - `reason`: why it is taken.
    - `chunk_size`: how many losses at once, None for all.
    - `estimate`: of the temporary arrays in bytes, with `chunk_size="auto"`.
    - `num_losses`: m.
    - `losses`: the shapes of the losses, a pytree like them.
    - `pieces`: how many losses are pulled back together, for one call of the function:
      (1, 1, 8) are two losses that are computed apart, and 8 that come out of one
      vectorised computation.
    - `parameters`: how the structured method treats each parameter, whether it is taken
      or not: it has one of the `entries` per parameter.
    """

    method: str
    reason: str
    chunk_size: int | None
    estimate: int | None
    num_losses: int
    losses: Any
    pieces: tuple[int, ...]
    parameters: engine.Table

    def __str__(self) -> str:
        heading = f"{self.num_losses} losses, {self.losses}"
        if len(self.pieces) > 1:
            heading += f", pulled back in {len(self.pieces)} pieces of {self.pieces}"
        method = f"method: {self.method}, because {self.reason}"
        if self.estimate is not None:
            size = "everything" if self.chunk_size is None else self.chunk_size
            method += f"\nchunk_size: {size}, about {self.estimate / 1e6:.3g} MB"
        if self.method != "structured":
            method += "\nthe structured method would do this:"
        return f"{heading}\n{method}\n{self.parameters}"
