"""Linear classification: softmax regression with orthonormal weights, and logistic regression without constraints.

*Orthonormal.* X in St(d, classes), no bias: minimise the mean cross-entropy of softmax(s X^T z) over X in St(d, c). The
logit scale s is part of the problem (an orthonormal classifier cannot grow its own). The model is an ``nn.Module`` and
enters through ``torch.func.functional_call``, as a user's would. Source of the task: the face recognition experiment of
the subspace adaptation paper (arXiv 2501.15235, section 5) and of its predecessors.

*Logistic regression.* minimise mean log(1 + exp(-y (w^T z + b))) + decay (|w|^2 + b^2) / 2: strictly convex, with the
minimum by Newton's method. Source: Hastie, Tibshirani, Friedman, "The Elements of Statistical Learning", 2009, section
4.4.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subspace_meta.geometry import Geometry, Params
from subspace_meta.manifolds import Stiefel
from subspace_meta.tasks.base import (
    Batch,
    Data,
    Problem,
    TaskFamily,
    draw_epochs,
    draw_indices,
    draw_rows,
    once_per_task,
)

Function = Callable[[Params, dict[str, Tensor]], Tensor]


class OrthonormalClassifier(nn.Module):
    """Logits z X of inputs ``(B, d)``; the weight ``x`` ``(d, classes)`` has orthonormal columns."""

    def __init__(self, d: int, classes: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.empty(d, classes, device=device))

    def forward(self, z: Tensor) -> Tensor:
        """Return logits ``(B, classes)``."""
        return z @ self.x


def split(inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return inputs and labels for training and for the test, which is every fifth sample."""
    test = torch.arange(len(inputs), device=inputs.device) % 5 == 4
    return inputs[~test], labels[~test], inputs[test], labels[test]


def _cross_entropy(model: nn.Module, params: Params, inputs: Tensor, one_hot: Tensor) -> Tensor:
    logits = torch.func.functional_call(model, params, (inputs,))
    # With one-hot targets the loss has no gather, whose second derivative would be a scatter.
    return -(F.log_softmax(logits, dim=-1) * one_hot).sum() / inputs.shape[0]


def classification_functions(model: nn.Module) -> tuple[Function, Function, Function]:
    """Return loss, objective and test accuracy of a model that makes logits.

    The loss needs ``z`` and ``one_hot``; the objective ``inputs`` and ``one_hot``; the accuracy ``test_inputs`` and
    ``test_labels``.
    """

    def loss(params: Params, batch: Batch) -> Tensor:
        return _cross_entropy(model, params, batch["z"], batch["one_hot"])

    def objective(params: Params, data: Data) -> Tensor:
        return _cross_entropy(model, params, data["inputs"], data["one_hot"])

    def accuracy(params: Params, data: Data) -> Tensor:
        logits = torch.func.functional_call(model, params, (data["test_inputs"],))
        return (logits.argmax(dim=-1) == data["test_labels"]).float().mean()

    return loss, objective, accuracy


@functools.cache
def classification_problem(d: int, classes: int) -> Problem:
    """Return the problem of one size."""
    model = OrthonormalClassifier(d, classes, device="meta")
    geometry = Geometry.from_rules(dict(model.named_parameters()), {"x": Stiefel()})
    return Problem(geometry, *classification_functions(model))


@dataclass(frozen=True)
class OrthonormalClassification(TaskFamily):
    """Softmax regression with an orthonormal weight on a fixed data set.

    Attributes:
        source: name of the data set, for tables.
        load: cached function that returns inputs ``(n, d)`` and labels ``(n,)``.
        classes: number of classes.
        log10_logit_scale: the inputs are multiplied by 10^u, u uniform between these bounds for every task.
        rotate: give every task its own random rotation of the input space and permutation of the classes, and, for the
            objective, its own random subset of ``objective_size`` samples.
        load_test: the same for the test set, of a data set that has one; without it every fifth sample is the test set.
        epochs: draw each sample once an epoch (of one call) instead of with replacement.
    """

    source: str
    load: Callable[[], tuple[Tensor, Tensor]]
    classes: int
    batch_size: int = 64
    log10_logit_scale: tuple[float, float] = (0.5, 0.5)
    rotate: bool = False
    objective_size: int = 256
    load_test: Callable[[], tuple[Tensor, Tensor]] | None = None
    epochs: bool = False

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name with the size."""
        return f"orthonormal classification of {self.source} {self.load()[0].shape[1]}x{self.classes}"

    @property
    def problem(self) -> Problem:  # type: ignore[override]
        """The problem of this size."""
        return classification_problem(self.load()[0].shape[1], self.classes)

    def _split(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return split(*self.load()) if self.load_test is None else (*self.load(), *self.load_test())

    def _turn(self, inputs: Tensor, frame: Tensor) -> Tensor:
        """Rotate and scale ``(..., n, d)``, or scale alone: multiplying with an identity would cost a rotation."""
        return inputs @ frame if self.rotate else inputs * frame

    def draw(self, generator: torch.Generator, count: int) -> Data:
        """Return rotations times scales (or scales alone), and the samples of the objective."""
        inputs, labels, test_inputs, test_labels = self._split()
        d = inputs.shape[1]
        low, high = self.log10_logit_scale
        scale = (
            10 ** (low + (high - low) * torch.rand(count, generator=generator, device=generator.device))[:, None, None]
        )
        if self.rotate:
            frame = Stiefel().random_point((count, d, d), generator, device=generator.device) * scale
            order = torch.stack(
                [torch.randperm(self.classes, generator=generator, device=generator.device) for _ in range(count)]
            )
            chosen = torch.stack(
                [
                    torch.randperm(len(inputs), generator=generator, device=generator.device)[: self.objective_size]
                    for _ in range(count)
                ]
            )
        else:
            frame = scale
            order = torch.arange(self.classes, device=generator.device).expand(count, self.classes)
            chosen = torch.arange(len(inputs), device=generator.device).expand(count, len(inputs))
        return {
            "frame": frame,
            "order": order,
            "inputs": self._turn(inputs[chosen], frame),
            "one_hot": self._one_hot(labels[chosen], order),
            "test_inputs": self._turn(test_inputs, frame),
            "test_labels": order.gather(1, test_labels.expand(count, -1)),
            "reference": torch.zeros(count, device=generator.device),
        }

    def _one_hot(self, labels: Tensor, order: Tensor) -> Tensor:
        """Return permuted one-hot labels; ``labels`` ``(..., count, n)``, ``order`` ``(count, classes)``."""
        permuted = order.expand(*labels.shape[:-2], *order.shape).gather(-1, labels)
        return F.one_hot(permuted, self.classes).float()

    def sample(self, data: Data, generator: torch.Generator, steps: int) -> Batch:
        """Draw rows of the training part."""
        inputs, labels, _, _ = self._split()
        draw = draw_epochs if self.epochs else draw_indices
        indices = draw(len(inputs), (steps, len(data["reference"]), self.batch_size), generator)
        return {
            "z": self._turn(inputs[indices], data["frame"]),
            "one_hot": self._one_hot(labels[indices], data["order"]),
        }

    def measured(self, data: Data) -> Data:
        """Return everything but rotations and permutations, which are applied already."""
        return {name: value for name, value in data.items() if name not in ("frame", "order")}


DECAY = 1e-2


def logistic_loss(params: Params, batch: Batch) -> Tensor:
    """Return the mean of log(1 + exp(-y t)) for scores t and classes y of -1 or 1, with weight decay."""
    scores = batch["z"] @ params["w"] + params["b"]
    decay = 0.5 * DECAY * (params["w"].square().sum() + params["b"].square())
    return F.softplus(-batch["sign"] * scores).mean() + decay


def logistic_accuracy(params: Params, data: Data) -> Tensor:
    """Return the share of test samples on the right side."""
    scores = data["test_inputs"] @ params["w"] + params["b"]
    return (scores * data["test_sign"] > 0.0).float().mean()


@functools.cache
def logistic_problem(d: int) -> Problem:
    """Return the problem of one size, unconstrained."""
    shapes = {"w": (d,), "b": ()}
    geometry = Geometry.from_rules({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    return Problem(geometry, logistic_loss, logistic_loss, logistic_accuracy)


def best_logistic(z: Tensor, sign: Tensor, iterations: int = 50) -> Params:
    """Minimise by Newton's method with halved steps, in float64; ``z`` ``(n, d)``, ``sign`` ``(n,)``."""
    rows = torch.cat([z, torch.ones(len(z), 1, device=z.device)], dim=1).double() * sign.double()[:, None]

    def value(v: Tensor) -> Tensor:
        return F.softplus(-rows @ v).mean() + 0.5 * DECAY * v.square().sum()

    v = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    for _ in range(iterations):
        share = torch.sigmoid(-rows @ v)
        gradient = DECAY * v - rows.mT @ share / len(rows)
        hessian = (rows * (share * (1.0 - share))[:, None]).mT @ rows / len(rows) + DECAY * torch.eye(
            len(v), device=v.device
        )
        step = torch.linalg.solve(hessian, gradient)
        length = 1.0
        while value(v - length * step) > value(v) and length > 1e-6:
            length *= 0.5
        v = v - length * step
    return {"w": v[:-1], "b": v[-1]}


@dataclass(frozen=True)
class LogisticRegression(TaskFamily):
    """Odd classes against even ones. The reference is the minimum, in float64; the metric the test accuracy.

    Attributes:
        source: name of the data set, for tables.
        load: cached function that returns inputs ``(n, d)`` and labels ``(n,)``; every fifth sample is the test set.
    """

    source: str
    load: Callable[[], tuple[Tensor, Tensor]]
    batch_size: int = 64

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name with the size."""
        return f"logistic regression of {self.source} {self.load()[0].shape[1]}"

    @property
    def problem(self) -> Problem:  # type: ignore[override]
        """The problem of this size."""
        return logistic_problem(self.load()[0].shape[1])

    def draw(self, generator: torch.Generator, count: int) -> Data:
        """Return the samples, once a task."""
        z, labels, test_inputs, test_labels = split(*self.load())
        sign, test_sign = (2.0 * (value % 2) - 1.0 for value in (labels, test_labels))
        best = best_logistic(z, sign)
        reference = logistic_loss(best, {"z": z.double(), "sign": sign.double()}).float()
        values = {"z": z, "sign": sign, "test_inputs": test_inputs, "test_sign": test_sign, "reference": reference}
        return once_per_task(values, count)

    def sample(self, data: Data, generator: torch.Generator, steps: int) -> Batch:
        """Draw samples, with replacement."""
        return draw_rows(data, ("z", "sign"), self.batch_size, generator, steps)
