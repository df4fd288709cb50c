"""Residual networks whose convolutions have orthonormal filters, trained without a learning rate.

python examples/resnet.py                   # a narrow one on 5,000 digits of MNIST, half a minute
python examples/resnet.py --data digits     # on the 1,797 digits of scikit-learn
python examples/resnet.py --resnet50        # some steps of ResNet-50 on images of 64 x 64: time and memory
"""

import argparse
import resource
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

import subspace_meta as sm
from subspace_meta.tasks import data


def convolution(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


class Block(nn.Module):
    """Adds what its convolutions find to what comes in; where shapes change, to a 1 x 1 convolution of it."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        shapes = self.shapes(inputs, width, stride)
        self.convolutions = nn.ModuleList(convolution(*shape) for shape in shapes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(shape[1]) for shape in shapes)
        outputs = width * self.expansion
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def shapes(self, inputs: int, width: int, stride: int) -> list[tuple[int, int, int, int]]:
        return [(inputs, width, 3, stride), (width, width, 3, 1)]

    def forward(self, x: Tensor) -> Tensor:
        found = x
        for i, (convolve, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            found = norm(convolve(functional.relu(found) if i else found))
        return functional.relu(found + self.shortcut(x))


class Bottleneck(Block):
    """Three convolutions; that of 3 x 3 sees a quarter of the channels."""

    expansion = 4

    def shapes(self, inputs: int, width: int, stride: int) -> list[tuple[int, int, int, int]]:
        return [(inputs, width, 1, 1), (width, width, 3, stride), (width, 4 * width, 1, 1)]


class ResNet(nn.Module):
    """A residual network (He et al. 2016): as many stages as ``depths``, each of twice the channels of the last.

    Args:
        block: kind of its blocks.
        depths: how many blocks each stage has.
        width: channels of the first stage, before the expansion of its blocks.
        channels: of the images.
        classes: how many outputs there are.
        small: images have some tens of pixels: the stem is 3 x 3, and only halves their sides.
    """

    def __init__(
        self, block: type[Block], depths: list[int], width: int = 64, channels: int = 3, classes: int = 1000,
        small: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        pool = nn.Identity() if small else nn.MaxPool2d(3, 2, padding=1)
        self.stem = nn.Sequential(
            convolution(channels, width, 3 if small else 7, 2), nn.BatchNorm2d(width), nn.ReLU(), pool
        )
        blocks, inputs = [], width
        for stage, depth in enumerate(depths):
            for i in range(depth):
                blocks.append(block(inputs, width * 2**stage, 2 if stage and not i else 1))
                inputs = width * 2**stage * block.expansion
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(images)).mean((2, 3)))


def resnet18(**settings: int) -> ResNet:
    return ResNet(Block, [2, 2, 2, 2], **settings)


def resnet50(**settings: int) -> ResNet:
    return ResNet(Bottleneck, [3, 4, 6, 3], **settings)


def orthonormal_convolutions(model: nn.Module) -> dict[str, sm.Stiefel]:
    """Return rules: every convolution's filters are orthonormal, or, where they are too many for that, its rows."""
    return {f"{name}.weight": sm.Stiefel() for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}


def images(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return images and labels to train on, then those to test on; each pixel is centred, and no set is drawn from."""
    inputs, labels = {"mnist": data.mnist_labelled, "digits": data.digits_second_half}[name]()
    side = round(inputs.shape[1] ** 0.5)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    inputs, labels = (inputs / inputs.std()).reshape(-1, 1, side, side)[order], labels[order]
    held_out = len(labels) // 5
    return inputs[held_out:], labels[held_out:], inputs[:held_out], labels[:held_out]


def narrow(seed: int) -> ResNet:
    """Return one of the smallest residual networks: seven convolutions, and two 1 x 1 shortcuts."""
    torch.manual_seed(seed)
    return ResNet(Block, [1, 1, 1], width=16, channels=1, classes=10, small=True)


def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        right = (model(inputs).argmax(1) == labels).float().mean().item()
    model.train()
    return right


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    sets: tuple[Tensor, Tensor, Tensor, Tensor],
    steps: int,
    seed: int,
    marks: range,
    penalty: Callable[[nn.Module], Tensor] | None = None,
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
) -> dict[int, float]:
    """Train on batches of 128; return the share of test images that are recognised, after the steps in ``marks``."""
    inputs, labels, *test = sets
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for step in range(1, steps + 1):
        batch = torch.randint(len(labels), (128,), generator=generator)
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(inputs[batch]), labels[batch])
        (loss if penalty is None else loss + penalty(model)).backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        if step in marks:
            found[step] = accuracy(model, *test)
    return found


def main(name: str = "mnist", steps: int = 150, every: int = 25) -> dict[int, float]:
    model = narrow(seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sm.optim.ProjectionWarning)  # PyTorch's random filters are not orthonormal
        optimizer = sm.optim.SubspaceMeta(model, orthonormal_convolutions(model))  # the others are AdamW's
    began, found, sets = time.perf_counter(), {}, images(name)
    for start in range(0, steps, every):
        part = min(every, steps - start)
        found[start + part] = fit(model, optimizer, sets, part, start, range(part, part + 1))[part]
        print(f"step {start + part}: {found[start + part]:.1%} of the test images", flush=True)
    violation = max(optimizer.check().values())
    print(f"{time.perf_counter() - began:.0f} s; largest violation {violation:.1e}")
    return found


def measure_resnet50(optimizer: str, steps: int = 3) -> None:
    torch.manual_seed(0)
    model = resnet50()
    rules = orthonormal_convolutions(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sm.optim.ProjectionWarning)
        if optimizer == "radam":
            stepper: sm.optim.Riemannian = sm.optim.Riemannian(model, rules, sm.RAdam, lr=1e-3)
        else:
            stepper = sm.optim.SubspaceMeta(model, rules, preset=optimizer)
    inputs, labels = torch.randn(8, 3, 64, 64), torch.randint(1000, (8,))
    for step in range(steps):
        began = time.perf_counter()
        stepper.zero_grad()
        loss = functional.cross_entropy(model(inputs), labels)
        loss.backward()
        between = time.perf_counter()
        stepper.step()
        taken = f"forward and backward {between - began:.2f} s, optimizer {time.perf_counter() - between:.2f} s"
        print(f"step {step}: loss {loss.item():.3f}, {taken}", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"peak memory of the process {peak / 1e9:.2f} GB; largest violation {max(stepper.check().values()):.1e}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", choices=("mnist", "digits"), default="mnist")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--resnet50", action="store_true", help="time some steps of ResNet-50 instead")
    parser.add_argument("--optimizer", choices=("base", "light", "radam"), default="base", help="for --resnet50")
    arguments = parser.parse_args()
    if arguments.resnet50:
        measure_resnet50(arguments.optimizer)
    else:
        main(arguments.data, arguments.steps)
