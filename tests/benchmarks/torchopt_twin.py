"""The same derivative in TorchOpt: Adam on a perceptron, task after task, as its users write it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torchopt
from torch import Tensor, nn


class Perceptron(nn.Module):
    """Two layers with tanh between."""

    def __init__(self, params: dict[str, Tensor]) -> None:
        super().__init__()
        for name, value in params.items():
            self.register_parameter(name, nn.Parameter(value.clone()))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = torch.tanh(x @ self.w1.T + self.b1)
        return (hidden @ self.w2.T + self.b2 - y).square().mean()


def caller(params: dict[str, Tensor], batches: dict[str, Tensor], lr: float) -> Callable[[], dict[str, Tensor]]:
    """Return a function that returns the derivative of each task's last loss to its starting point."""

    def call() -> dict[str, Tensor]:
        gradients: dict[str, list[Tensor]] = {name: [] for name in params}
        for i in range(len(params["b1"])):
            network = Perceptron({name: value[i] for name, value in params.items()})
            start = dict(network.named_parameters())
            optimizer = torchopt.MetaAdam(network, lr=lr)
            for x, y in zip(batches["x"][:, i], batches["y"][:, i], strict=True):
                optimizer.step(network(x, y))
            found = torch.autograd.grad(network(batches["x"][-1, i], batches["y"][-1, i]), list(start.values()))
            for name, value in zip(start, found, strict=True):
                gradients[name].append(value)
        return {name: torch.stack(values) for name, values in gradients.items()}

    return call
