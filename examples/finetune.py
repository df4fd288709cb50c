"""Orthogonal fine-tuning: a trained layer stays as it is, and only a rotation before it learns (Qiu et al. 2023).

A perceptron has learned to read digits; now they come mirrored. A rotation of the inputs keeps all angles and lengths
that the layer knows, so little can be forgotten, and from few images it learns to look at them the other way round.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

import subspace_meta as sm
from subspace_meta.tasks import data


class Rotated(nn.Module):
    """A frozen linear layer of inputs that a rotation has turned; at first it turns nothing."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.rotation = nn.Parameter(torch.eye(layer.in_features))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x @ self.rotation)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (model(images).argmax(1) == labels).float().mean().item()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = torch.randint(len(labels), (32,), generator=generator)
        optimizer.zero_grad()
        functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()


def main(steps: int = 200) -> tuple[float, float]:
    torch.manual_seed(0)
    images, labels = data.digits_second_half()
    images = images / images.std()
    mirrored = images.unflatten(1, (8, 8)).flip(2).flatten(1)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    train(model, torch.optim.Adam(model.parameters(), lr=1e-2), images[:600], labels[:600], 300)
    print(f"digits as they were: {accuracy(model, images[600:], labels[600:]):.1%} of the test images")
    before = accuracy(model, mirrored[600:], labels[600:])

    model = nn.Sequential(Rotated(model[0]), *model[1:]).requires_grad_(False)
    model[0].rotation.requires_grad_(True)
    optimizer = sm.optim.SubspaceMeta(model, {"0.rotation": sm.Rotations()})
    train(model, optimizer, mirrored[:200], labels[:200], steps)
    after = accuracy(model, mirrored[600:], labels[600:])
    print(f"mirrored: {before:.1%} before, {after:.1%} after {steps} steps on 200 images")
    print(f"violation {max(optimizer.check().values()):.1e}")
    return before, after


if __name__ == "__main__":
    main()
