"""The functions of `_tasks.py` in torch, and TorchJD's steps on them.

    python -m benchmarks._torch_tasks NAME M ROUNDS

prints the seconds of a step along the gradient of the sum, and the best ratio to it of
a step of TorchJD, for `benchmarks.tasks`.
"""

import itertools
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torchjd import autojac
from torchjd.aggregation import UPGrad

from benchmarks._timing import paired
from benchmarks._torch_models import Block, Cnn


class Tasks(NamedTuple):
    """`losses()` returns the m losses, and the features if there is a trunk.

    `vectorised`: whether the losses share more operations than those of the trunk.
    """

    losses: Callable[[], tuple[list[torch.Tensor], torch.Tensor | None]]
    shared: Sequence[nn.Parameter]
    own: Sequence[nn.Parameter]
    vectorised: bool = False


def dense_layers(sizes: tuple[int, ...], activation: type[nn.Module]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers)


def physics(m: int) -> Tasks:
    del m
    net = dense_layers((2, 64, 64, 64, 64), nn.Tanh).append(nn.Linear(64, 1))
    inside, start, edge = (2 * torch.rand(n, 2) - 1 for n in (2000, 256, 256))
    wanted = -torch.sin(torch.pi * start[:, 0])

    def slope(y: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(y.sum(), points, create_graph=True)[0]

    def losses() -> tuple[list[torch.Tensor], None]:
        points = inside.requires_grad_()
        u = net(points)[:, 0]
        u_x, u_t = slope(u, points).unbind(1)
        u_xx = slope(u_x, points)[:, 0]
        residual = u_t + u * u_x - 0.01 / torch.pi * u_xx
        boundary, initial = net(edge)[:, 0], net(start)[:, 0] - wanted
        return [x.square().mean() for x in (boundary, initial, residual)], None

    return Tasks(losses, list(net.parameters()), [])


def agent(m: int) -> Tasks:
    net = dense_layers((16 + m, 256, 256), nn.ReLU).append(nn.Linear(256, 1))
    inputs, returns = torch.randn(m, 256, 16), torch.randn(m, 256)

    def loss(task: int) -> torch.Tensor:
        which = torch.eye(m)[task].expand(256, m)
        values = net(torch.cat([inputs[task], which], 1))[:, 0]
        return (values - returns[task]).square().mean()

    def losses() -> tuple[list[torch.Tensor], None]:
        return [loss(task) for task in range(m)], None

    return Tasks(losses, list(net.parameters()), [])


def trunk_and_heads(
    trunk: nn.Module, heads: nn.ModuleList, x: torch.Tensor, labels: torch.Tensor
) -> Tasks:
    def loss(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(logits.movedim(-1, 1), wanted)

    def losses() -> tuple[list[torch.Tensor], torch.Tensor]:
        features = trunk(x)
        pairs = zip(heads, labels, strict=True)
        return [loss(head(features), wanted) for head, wanted in pairs], features

    return Tasks(losses, list(trunk.parameters()), list(heads.parameters()))


def heads(m: int, width: int, outputs: int) -> nn.ModuleList:
    return nn.ModuleList([nn.Linear(width, outputs) for _ in range(m)])


def mlp_trunk(m: int) -> Tasks:
    trunk = dense_layers((784, 512, 512, 512), nn.ReLU)
    labels = torch.randint(10, (m, 256))
    return trunk_and_heads(trunk, heads(m, 512, 10), torch.randn(256, 784), labels)


def vectorised(m: int) -> Tasks:
    trunk, head = dense_layers((64, 256, 256), nn.ReLU), nn.Linear(256, m)
    x, targets = torch.randn(512, 64), torch.randn(512, m)

    def losses() -> tuple[list[torch.Tensor], torch.Tensor]:
        features = trunk(x)
        errors = (head(features) - targets).square().mean(0)
        return list(errors.unbind()), features

    return Tasks(losses, list(trunk.parameters()), list(head.parameters()), True)


def cnn_trunk(m: int) -> Tasks:
    trunk = nn.Sequential(*list(Cnn())[:-3])
    labels = torch.randint(10, (m, 64))
    return trunk_and_heads(
        trunk, heads(m, 1024, 10), torch.randn(64, 3, 32, 32), labels
    )


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 128)
        self.place = nn.Parameter(0.02 * torch.randn(64, 128))
        self.blocks = nn.Sequential(Block(128), Block(128), nn.LayerNorm(128))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.blocks(self.embed(tokens) + self.place)


def transformer_trunk(m: int) -> Tasks:
    tokens, labels = torch.randint(256, (32, 64)), torch.randint(32, (m, 32, 64))
    return trunk_and_heads(Transformer(), heads(m, 128, 32), tokens, labels)


ROWS: dict[str, Callable[[int], Tasks]] = {
    "PINN": physics,
    "RL": agent,
    "MLP trunk": mlp_trunk,
    "CNN trunk": cnn_trunk,
    "transformer trunk": transformer_trunk,
    "one vmap": vectorised,
}


def torch_steps(tasks: Tasks) -> dict[str, Callable[[], Any]]:
    """The step along the sum, and TorchJD's with all rows at once and one by one."""
    parameters = [*tasks.shared, *tasks.own]

    def step(backward: Callable[..., None]) -> Callable[[], None]:
        optimizer = torch.optim.Adam(parameters, 1e-3)

        def run() -> None:
            losses, features = tasks.losses()
            optimizer.zero_grad()
            backward(losses, features)
            optimizer.step()

        return run

    def of_sum(losses: list[torch.Tensor], _: Any) -> None:
        torch.stack(losses).sum().backward()

    def torchjd(size: int | None) -> Callable[..., None]:
        def backward(losses: list[torch.Tensor], features: torch.Tensor | None) -> None:
            if features is None:
                autojac.backward(losses, parallel_chunk_size=size)
            else:
                autojac.mtl_backward(
                    losses,
                    features,
                    retain_graph=tasks.vectorised,
                    parallel_chunk_size=size,
                )
            autojac.jac_to_grad(tasks.shared, UPGrad())

        return backward

    return {
        "SGD": step(of_sum),
        "TorchJD": step(torchjd(None)),
        "one by one": step(torchjd(1)),
    }


def main() -> None:
    name, m, rounds = sys.argv[1:]
    torch.manual_seed(0)
    contenders = torch_steps(ROWS[name](int(m)))
    found = []
    for threads in sorted({1, os.cpu_count() or 1}):
        torch.set_num_threads(threads)
        for contender in contenders.values():
            contender()
        found.append(paired(contenders, "SGD", int(rounds)))
    # Each side with the number of threads that suits it best.
    seconds = {name: min(of[name].seconds for of in found) for name in contenders}
    best = min(seconds["TorchJD"], seconds["one by one"])
    print(json.dumps({"SGD": seconds["SGD"], "TorchJD": best}))


if __name__ == "__main__":
    main()
