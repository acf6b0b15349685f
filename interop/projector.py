"""A projector that lets TorchJD's UPGrad and DualProj use this library's solver."""

import torch
from jaxtyping import Float
from torchjd.linalg import DualConeProjector

from jaxjd.solvers import project_dual_cone

from .bridge import to_jax, to_torch
from .precision import jax_precision, torch_dtype


class JaxProjector(DualConeProjector):
    """Projects onto the dual cone with [`jaxjd.solvers.project_dual_cone`][].

    It plugs into TorchJD: `UPGrad(projector=JaxProjector())` and
    `DualProj(projector=JaxProjector())` give the same weights as TorchJD's
    `QuadprogProjector`, to rounding, because the defaults are the same. All rows are
    solved at once in the precision of the Gramian, by a program that JAX compiles once
    per shape. Tensors cross by DLPack, so they must be on a device that JAX has too.

    For a Gramian with NaN or infinity, this returns NaN, where `QuadprogProjector`
    raises.

    **Arguments:**

    - `norm_eps`, `reg_eps`: as in [`jaxjd.solvers.project_dual_cone`][]. With `None`
      for both, UPGrad keeps its promise even if the norms of the gradients differ by
      orders of magnitude. With TorchJD's defaults it does not.

    **Raises:** `ValueError`, when called, for arguments that
    [`jaxjd.solvers.project_dual_cone`][] refuses.
    """

    def __init__(
        self, *, norm_eps: float | None = 1e-4, reg_eps: float | None = 1e-4
    ) -> None:
        super().__init__()
        self.norm_eps = norm_eps
        self.reg_eps = reg_eps

    def __repr__(self) -> str:
        return f"JaxProjector(norm_eps={self.norm_eps}, reg_eps={self.reg_eps})"

    def __call__(
        self, U: Float[torch.Tensor, "... m"], G: Float[torch.Tensor, "m m"]
    ) -> Float[torch.Tensor, "... m"]:
        """The weights for each row of U, in the dtype of G."""
        wide = "float64" if G.dtype == torch.float64 else "float32"
        with jax_precision(wide):
            solution = project_dual_cone(
                to_jax(_compact(U, torch_dtype(wide))),
                to_jax(_compact(G, torch_dtype(wide))),
                norm_eps=self.norm_eps,
                reg_eps=self.reg_eps,
            ).solution
            # A copy, because torch users may write to the result, which JAX forbids.
            return to_torch(solution).to(G.dtype, copy=True)


def _compact(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Copy to compact, aligned memory, which `to_jax` needs."""
    return tensor.detach().to(dtype, memory_format=torch.contiguous_format, copy=True)
