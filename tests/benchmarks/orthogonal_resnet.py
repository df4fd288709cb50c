"""A narrow residual network with orthonormal convolutions: the learned optimizer, untuned, beside tuned ones.

``python tests/benchmarks/orthogonal_resnet.py [--data mnist]`` chooses the learning rates of each hand-made optimizer
(and the rate of the unconstrained parameters, or the weight of the penalty) by the test accuracy of one seed, and
reports the mean of three others; each with a constant rate and with a cosine schedule to the last step, which knows
where the training ends. The learned optimizer leaves what is on no manifold to AdamW with PyTorch's settings, which
is its default; beside it are two other rates of AdamW, and the learned optimizer for every parameter. An hour on one
core.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

import subspace_meta as sm

_PATH = Path(__file__).parents[2] / "examples" / "resnet.py"
_SPEC = importlib.util.spec_from_file_location("resnet", _PATH)
assert _SPEC is not None
assert _SPEC.loader is not None
resnet = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(resnet)

MARKS = range(25, 301, 25)
SEEDS = (1, 2, 3)
Setting = dict[str, float]


class Curve(NamedTuple):
    """Test accuracy after each of the marked steps, and the loss on all training images after the last one."""

    accuracy: dict[int, float]
    training_loss: float


class OrthogonalConvolution(nn.Module):
    """A convolution whose filters are the rows of a matrix that torch keeps orthogonal by parametrization."""

    def __init__(self, given: nn.Conv2d) -> None:
        super().__init__()
        self.shape, self.stride, self.padding = given.weight.shape, given.stride, given.padding
        self.matrix = orthogonal(nn.Linear(given.weight[0].numel(), len(given.weight), bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.matrix.weight.view(self.shape), None, self.stride, self.padding)


def parametrized(model: nn.Module) -> nn.Module:
    """Replace every convolution."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Conv2d):
                setattr(module, name, OrthogonalConvolution(child))
    return model


def softly_orthogonal(model: nn.Module, weight: float) -> Tensor:
    """Return the squared distance of all filters' Gram matrices (the smaller ones) from the identity."""
    total = torch.zeros(())
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            matrix = module.weight.flatten(1)
            tall = matrix.mT if len(matrix) <= matrix.shape[1] else matrix
            total = total + (tall.mT @ tall - torch.eye(tall.shape[1])).square().sum()
    return weight * total


def riemannian(kind: Callable, model: nn.Module, setting: Setting) -> torch.optim.Optimizer:
    others = functools.partial(torch.optim.AdamW, lr=setting["others"])
    extra = {"momentum": 0.9} if kind is sm.RSGD else {}
    rules = resnet.orthonormal_convolutions(model)
    return sm.optim.Riemannian(model, rules, kind, lr=setting["lr"], others=others, **extra)


def learned(preset: str, model: nn.Module, setting: Setting) -> torch.optim.Optimizer:
    others = functools.partial(torch.optim.AdamW, lr=setting["others"]) if setting else None
    return sm.optim.SubspaceMeta(model, resnet.orthonormal_convolutions(model), preset=preset, others=others)


def adam(model: nn.Module, setting: Setting) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=setting["lr"])


def grid(**values: tuple[float, ...]) -> list[Setting]:
    return [dict(zip(values, choice, strict=True)) for choice in itertools.product(*values.values())]


RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
OTHERS = (1e-3, 1e-2)
LEARNED: list[tuple[str, Setting]] = [  # none is chosen: all are shown; the first is beside the hand-made ones
    *(("base", setting) for setting in grid(others=(1e-3, 3e-3, 1e-2))), ("base", {}),
    ("light", {"others": 1e-3}), ("light", {}),
]  # fmt: skip
HAND_MADE = {
    "RSGD, momentum 0.9": (functools.partial(riemannian, sm.RSGD), grid(lr=(1e-2, 3e-2, 0.1, 0.3, 1.0), others=OTHERS)),
    "RAdam": (functools.partial(riemannian, sm.RAdam), grid(lr=RATES, others=OTHERS)),
    "Adam, soft orthogonality": (adam, grid(lr=RATES, penalty=(1e-2, 1e-1, 1.0))),
    "Adam, torch's orthogonal parametrization": (adam, grid(lr=RATES)),
}  # fmt: skip


def run(name: str, make: Callable, setting: Setting, cosine: bool, sets: tuple, seed: int) -> Curve:
    model = resnet.narrow(seed)
    if "parametrization" in name:
        model = parametrized(model)
    penalty = functools.partial(softly_orthogonal, weight=setting["penalty"]) if "penalty" in setting else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sm.optim.ProjectionWarning)
        optimizer = make(model, setting)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, MARKS[-1]) if cosine else None
    accuracy = resnet.fit(model, optimizer, sets, MARKS[-1], 100 + seed, MARKS, penalty, schedule)
    model.eval()
    with torch.no_grad():
        return Curve(accuracy, nn.functional.cross_entropy(model(sets[0]), sets[1]).item())


def mean(curves: list[Curve]) -> Curve:
    accuracy = {step: statistics.mean(curve.accuracy[step] for curve in curves) for step in MARKS}
    return Curve(accuracy, statistics.mean(curve.training_loss for curve in curves))


def tuned(name: str, cosine: bool, sets: tuple) -> Iterator[tuple[int, Setting, Curve]]:
    """Yield, for each step that the rates are chosen for, the settings and the mean of fresh seeds."""
    make, settings = HAND_MADE[name]
    curves = [run(name, make, setting, cosine, sets, 0) for setting in settings]
    done: dict[int, Curve] = {}
    for step in MARKS[-1:] if cosine else (100, 200, 300):
        best = max(range(len(settings)), key=lambda i: curves[i].accuracy[step])
        if best not in done:
            done[best] = mean([run(name, make, settings[best], cosine, sets, seed) for seed in SEEDS])
        yield step, settings[best], done[best]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", choices=("mnist", "digits"), default="mnist")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sets = resnet.images(arguments.data)
    print("| | chosen for step | setting | after " + " / ".join(map(str, MARKS)) + " steps "
          "| training loss at the end | learned is there after |")  # fmt: skip
    print("|---|---|---|---|---|---|")

    def shown(curve: Curve) -> str:
        return " / ".join(f"{100 * value:.1f}" for value in curve.accuracy.values()) + f" | {curve.training_loss:.4f}"

    ours = []
    for preset, setting in LEARNED:
        start = time.process_time()
        make = functools.partial(learned, preset)
        curve = mean([run(preset, make, setting, False, sets, seed) for seed in SEEDS])
        taken = (time.process_time() - start) / len(SEEDS)
        ours.append(curve)
        words = f"AdamW {setting['others']:g} for the others" if setting else "for every parameter"
        print(f"| **learned, `{preset}`** | | {words} ({taken:.0f} s a run) | {shown(curve)} | |", flush=True)
    for name, cosine in itertools.product(HAND_MADE, (False, True)):
        for step, setting, curve in tuned(name, cosine, sets):
            there = next((str(s) for s in MARKS if ours[0].accuracy[s] >= curve.accuracy[step]), "not within 300")
            words = ", ".join(f"{key} {value:g}" for key, value in setting.items())
            print(f"| {name}{', cosine' if cosine else ''} | {step} | {words} | {shown(curve)} | {there} |", flush=True)


if __name__ == "__main__":
    main()
