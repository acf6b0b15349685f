"""Move weights and arrays between torch and JAX, and compare jaxjd with TorchJD.

- `to_linen`, `to_nnx`: the weights of a torch model for the same model in Flax.
- `to_jax`, `to_torch`: arrays from one library in the other, without a copy.
- `python -m interop`: jaxjd and TorchJD on the same inputs, and how far apart they are.

This is `jaxjd.interop` in an installed jaxjd, `python -m jaxjd.interop` then, and needs
the extra of that name: `pip install "jaxjd[interop]"`.
"""

try:
    from .bridge import to_jax as to_jax
    from .bridge import to_torch as to_torch
    from .convert import to_linen as to_linen
    from .convert import to_nnx as to_nnx
except ModuleNotFoundError as error:
    raise ImportError(
        f"`jaxjd.interop` needs {error.name}. Install it and the rest with "
        "`pip install 'jaxjd[interop]'`."
    ) from error
