"""An addition of zero, which only derivatives see."""

import jax
from jaxtyping import Array


@jax.custom_jvp
def perturbed(value: Array, perturbation: Array) -> Array:
    """`value + perturbation` for a perturbation of zero, which is never computed."""
    del perturbation
    return value


@perturbed.defjvp
def _perturbed_jvp(primals, tangents):
    return primals[0], tangents[0] + tangents[1]


# Under `jit`, so that equations that perturb arrays of one shape are recognised as the
# same, whatever custom rules are inside.
perturb = jax.jit(perturbed)
