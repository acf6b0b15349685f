"""The two models that both libraries differentiate, with the same weights in each."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
import torch
from flax import linen
from jaxtyping import Array, Float, Int, PyTree

from .bridge import to_jax
from .convert import State, to_linen
from .precision import Precision, torch_dtype

NUM_CLASSES = 10


class Batch(NamedTuple):
    """Examples and their classes, as torch has them."""

    inputs: Float[torch.Tensor, "examples *input"]
    labels: Int[torch.Tensor, " examples"]


class Twins(NamedTuple):
    """One model in both frameworks.

    `convert` turns a `state_dict` into Flax variables. `input_shape` is the shape of
    one example in torch. `axes` lists the axes of a torch batch in Flax's order.
    """

    torch_model: torch.nn.Module
    flax_model: linen.Module
    convert: Callable[[State], PyTree[Float[Array, "..."]]]
    input_shape: tuple[int, ...]
    axes: tuple[int, ...]
    precision: Precision

    def variables(self) -> PyTree[Float[Array, "..."]]:
        """Copy the current weights of the torch model."""
        return self.convert(self.torch_model.state_dict())

    def batch(self, size: int, seed: int) -> Batch:
        """Noisy examples of ten classes, the same numbers in both precisions."""
        return make_batch(self.input_shape, self.precision, size, seed)

    def jax_batch(self, batch: Batch) -> tuple[Float[Array, "..."], Int[Array, "..."]]:
        """The batch as JAX arrays, in torch's memory where possible."""
        # Labels become int32, because JAX has no int64 in single precision.
        labels = batch.labels.to(torch.int32)
        return to_jax(batch.inputs.permute(self.axes)), to_jax(labels)

    def torch_losses(self, batch: Batch) -> Float[torch.Tensor, " examples"]:
        scores = self.torch_model(batch.inputs)
        return torch.nn.functional.cross_entropy(scores, batch.labels, reduction="none")

    def loss(
        self,
        variables: PyTree[Float[Array, "..."]],
        image: Float[Array, "..."],
        label: Int[Array, ""],
    ) -> Float[Array, ""]:
        """The loss of one example."""
        scores = self.flax_model.apply(variables, image[None])[0]
        return optax.losses.softmax_cross_entropy_with_integer_labels(scores, label)

    def losses(
        self,
        variables: PyTree[Float[Array, "..."]],
        images: Float[Array, "examples ..."],
        labels: Int[Array, " examples"],
    ) -> Float[Array, " examples"]:
        """The losses of all examples."""
        scores: Any = self.flax_model.apply(variables, images)
        return optax.losses.softmax_cross_entropy_with_integer_labels(scores, labels)


class MLP(linen.Module):
    @linen.compact
    def __call__(
        self, inputs: Float[Array, "examples d"]
    ) -> Float[Array, "examples c"]:
        hidden = linen.elu(linen.Dense(48)(inputs))
        hidden = linen.elu(linen.Dense(32)(hidden))
        return linen.Dense(NUM_CLASSES)(hidden)


class CNN(linen.Module):
    @linen.compact
    def __call__(
        self, images: Float[Array, "examples h w c"]
    ) -> Float[Array, "examples classes"]:
        hidden = linen.elu(linen.Conv(8, (3, 3))(images))
        hidden = linen.Conv(16, (3, 3), feature_group_count=2)(hidden)
        hidden = linen.elu(linen.GroupNorm(4, epsilon=1e-5)(hidden))
        hidden = linen.max_pool(hidden, (2, 2), (2, 2))
        hidden = linen.elu(linen.Conv(16, (3, 3), padding="VALID")(hidden))
        hidden = hidden.reshape(hidden.shape[0], -1)
        hidden = linen.elu(linen.Dense(32)(hidden))
        return linen.Dense(NUM_CLASSES)(hidden)


def mlp(precision: Precision) -> Twins:
    """Three dense layers."""

    def make() -> torch.nn.Module:
        return torch.nn.Sequential(
            torch.nn.Linear(20, 48),
            torch.nn.ELU(),
            torch.nn.Linear(48, 32),
            torch.nn.ELU(),
            torch.nn.Linear(32, NUM_CLASSES),
        )

    model = _seeded(make).to(torch_dtype(precision))
    return _twins(
        model,
        MLP(),
        (20,),
        axes=(0, 1),
        precision=precision,
        names={"0": "Dense_0", "2": "Dense_1", "4": "Dense_2"},
    )


def cnn(precision: Precision) -> Twins:
    """Three convolutions, one of them grouped and normalised, and two dense layers."""

    def make() -> torch.nn.Module:
        return torch.nn.Sequential(
            torch.nn.Conv2d(1, 8, 3, padding="same"),
            torch.nn.ELU(),
            torch.nn.Conv2d(8, 16, 3, padding="same", groups=2),
            torch.nn.GroupNorm(4, 16),
            torch.nn.ELU(),
            torch.nn.MaxPool2d(2),
            torch.nn.Conv2d(16, 16, 3),
            torch.nn.ELU(),
            torch.nn.Flatten(),
            torch.nn.Linear(16 * 4 * 4, 32),
            torch.nn.ELU(),
            torch.nn.Linear(32, NUM_CLASSES),
        )

    model = _seeded(make).to(torch_dtype(precision))
    return _twins(
        model,
        CNN(),
        (1, 12, 12),
        axes=(0, 2, 3, 1),
        precision=precision,
        names={
            "0": "Conv_0",
            "2": "Conv_1",
            "3": "GroupNorm_0",
            "6": "Conv_2",
            "9": "Dense_0",
            "11": "Dense_1",
        },
        flattened={"9": (16, 4, 4)},
    )


def make_batch(
    shape: tuple[int, ...], precision: Precision, size: int, seed: int
) -> Batch:
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn((NUM_CLASSES, *shape), generator=generator)
    generator.manual_seed(1 + seed)
    labels = torch.randint(NUM_CLASSES, (size,), generator=generator)
    noise = torch.randn((size, *shape), generator=generator)
    return Batch((centers[labels] + noise).to(torch_dtype(precision)), labels)


def _seeded(make: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """Make a model from seed 0, then restore torch's global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def _twins(
    torch_model: torch.nn.Module,
    flax_model: linen.Module,
    input_shape: tuple[int, ...],
    *,
    axes: tuple[int, ...],
    precision: Precision,
    **conversion: Any,
) -> Twins:
    batch = make_batch(input_shape, precision, size=1, seed=0)
    images = to_jax(batch.inputs.permute(axes))
    shapes = jax.eval_shape(flax_model.init, jax.random.key(0), images)
    # Flax makes float32 parameters, whatever the dtype of the images.
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, images.dtype), shapes)
    convert = functools.partial(to_linen, variables=shapes, **conversion)
    return Twins(torch_model, flax_model, convert, input_shape, axes, precision)
