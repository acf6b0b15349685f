"""The models of `_models.py` in torch, and TorchJD's steps on them.

    python -m benchmarks._torch_models MODEL M ROUNDS THREADS

prints the seconds and the memory of each step, for `benchmarks.step`.
"""

import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import torch
import torchjd.aggregation
import torchjd.autogram
from torch import nn
from torch.nn import functional

from benchmarks._timing import alternating

RATE = 0.1


class Cnn(nn.Sequential):
    def __init__(self) -> None:
        layers: list[nn.Module] = []
        channels = 3
        for width in (32, 64, 64):
            layers += [
                nn.Conv2d(channels, width, 3, padding=1),
                nn.GroupNorm(8, width),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
            channels = width
        super().__init__(
            *layers, nn.Flatten(), nn.Linear(1024, 128), nn.ReLU(), nn.Linear(128, 10)
        )


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.project = nn.ModuleList([nn.Linear(width, width) for _ in range(4)])
        self.wide, self.narrow = (
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norms[0](x)
        heads = [
            layer(y).unflatten(-1, (4, -1)).transpose(1, 2)
            for layer in self.project[:3]
        ]
        y = functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.project[3](y.transpose(1, 2).flatten(2))
        return x + self.narrow(functional.gelu(self.wide(self.norms[1](x))))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 128)
        self.place = nn.Parameter(0.02 * torch.randn(64, 128))
        self.blocks = nn.ModuleList([Block(128), Block(128)])
        self.norm = nn.LayerNorm(128)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) + self.place
        for block in self.blocks:
            x = block(x)
        return self.norm(x) @ self.embed.weight.T


class Gru(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.last = nn.GRU(28, 64, batch_first=True), nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.cell(x)[0][:, -1])


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(784, 512),
        nn.ReLU(),
        nn.Linear(512, 512),
        nn.ReLU(),
        nn.Linear(512, 10),
    )


ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP": (mlp, (784,)),
    "CNN": (Cnn, (3, 32, 32)),
    "GRU": (Gru, (28, 28)),
    "transformer": (Decoder, ()),
}


def torch_steps(name: str, m: int) -> dict[str, Callable[[], Any]]:
    """Make the steps: SGD, TorchJD's engine with uniform weights, its UPGrad."""
    torch.manual_seed(0)
    make, shape = ARCHITECTURES[name]
    if name == "transformer":
        tokens = torch.randint(256, (m, 65))
        x, labels = tokens[:, :-1], tokens[:, 1:]
    else:
        x, labels = torch.randn(m, *shape), torch.randint(10, (m,))
    upgrad = torchjd.aggregation.UPGradWeighting()

    def uniform(gramian: torch.Tensor) -> torch.Tensor:
        return torch.full((m,), 1 / m)

    def step(weighting: Callable[[torch.Tensor], torch.Tensor] | None) -> Callable:
        # A model for each step, because TorchJD's engine leaves hooks in the modules.
        model = make()
        optimizer = torch.optim.SGD(model.parameters(), RATE)
        engine = weighting and torchjd.autogram.Engine(model, batch_dim=0)

        def run() -> None:
            optimizer.zero_grad()
            losses = functional.cross_entropy(
                model(x).movedim(-1, 1), labels, reduction="none"
            )
            losses = losses.reshape(m, -1).mean(1)
            if weighting is None or engine is None:
                losses.mean().backward()
            else:
                losses.backward(weighting(engine.compute_gramian(losses)))
            optimizer.step()

        return run

    return {"SGD": step(None), "engine": step(uniform), "UPGrad": step(upgrad)}


def peak() -> int:
    """The peak memory of this process so far, in bytes.

    `resource.getrusage` won't do: it starts from the memory of the parent process.
    """
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("VmHWM")]
    return 1024 * int(line.split()[1])


def main() -> None:
    name, m, rounds, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    contenders, memory = torch_steps(name, int(m)), {}
    before = peak()
    for kind, step in contenders.items():  # In order of increasing memory.
        step()
        memory[kind] = peak() - before
    seconds = alternating(contenders, int(rounds))
    print(json.dumps({"seconds": seconds, "memory": memory}))


if __name__ == "__main__":
    main()
