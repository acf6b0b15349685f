"""How does TorchJD use this library's solver for its own UPGrad and DualProj?"""

import torch
from jaxtyping import Float
from torchjd.linalg import DualConeProjector

from jaxjd.solvers import project_dual_cone

from .bridge import to_jax, to_torch
from .precision import jax_precision, torch_dtype


class JaxProjector(DualConeProjector):
    """Projects onto the dual cone with [`jaxjd.solvers.project_dual_cone`][].

    For TorchJD's own extension point: `UPGrad(projector=JaxProjector())` and
    `DualProj(projector=JaxProjector())` give the weights of TorchJD's
    `QuadprogProjector`, whose defaults these are, to rounding. All rows are solved at
    once, by a program that JAX compiles once for each shape, in the precision of the
    Gramian. Tensors cross by DLPack, so they must be on a device that JAX has too.

    Where `QuadprogProjector` raises, this returns NaN: for a Gramian with NaN or
    infinity.

    **Arguments:**

    - `norm_eps`, `reg_eps`: as those of [`jaxjd.solvers.project_dual_cone`][]. Both
      `None` keep UPGrad's promise where the norms of the gradients differ by orders of
      magnitude, where TorchJD's defaults do not.

    **Raises:** `ValueError` for those that [`jaxjd.solvers.project_dual_cone`][]
    refuses, when called.
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
            # A copy: users of torch may write to what they get, JAX forbids it.
            return to_torch(solution).to(G.dtype, copy=True)


def _compact(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In memory of its own, as to_jax needs it."""
    return tensor.detach().to(dtype, memory_format=torch.contiguous_format, copy=True)
