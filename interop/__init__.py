"""Move weights and arrays between torch and JAX, and compare jaxjd with TorchJD.

- `to_linen`, `to_nnx`: convert the weights of a torch model to the same model in Flax.
- `to_jax`, `to_torch`: pass arrays from one library to the other, without a copy.
- `python -m interop`: run jaxjd and TorchJD on the same inputs and print how far apart
  they are.

When jaxjd is installed, this package is `jaxjd.interop` (`python -m jaxjd.interop`). It
needs the extra of the same name: `pip install "jaxjd[interop]"`.
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
