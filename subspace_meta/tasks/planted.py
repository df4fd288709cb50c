"""Synthetic problems for meta-training, drawn so that conditioning, noise and scale differ from task to task.

*Least squares.* minimise E |C^{1/2} (X^T a - y)|^2 with y = X*^T a + noise, X* a random point of the manifold: the
minimum over the manifold is at X*, whatever the manifold. Noise is relative to the signal at the start.

*Classification.* Softmax regression with orthonormal weights on normal clusters in a badly conditioned space that need
not be centred, with a random logit scale: from almost linear losses to perceptrons.

*Karcher means.* Samples around centres at random distances from the start, the identity.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subspace_meta.geometry import Geometry, Params
from subspace_meta.manifolds import Manifold, Stiefel
from subspace_meta.tasks.base import Batch, Data, Problem, TaskFamily, draw_rows, repeat
from subspace_meta.tasks.classification import classification_problem
from subspace_meta.tasks.covariances import identities, inverse_root, karcher_loss, karcher_means, karcher_problem


def _uniform(low: float, high: float, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator, device=generator.device)


def least_squares_loss(params: Params, batch: Batch) -> Tensor:
    """Return the mean of |C^{1/2} (X^T a - y)|^2 over rows ``a`` ``(B, d)``, ``y`` ``(B, p)``."""
    return ((batch["a"] @ params["x"] - batch["y"]) * batch["weights"]).square().sum() / batch["a"].shape[0]


def least_squares_objective(params: Params, data: Data) -> Tensor:
    """Return the excess of the expected loss."""
    difference = (data["root"].mT @ (params["x"] - data["solution"])) * data["weights"]
    return difference.square().sum()


@functools.cache
def least_squares_problem(d: int, p: int, manifold: Manifold) -> Problem:
    """Return the problem of one size."""
    geometry = Geometry.from_rules({"x": torch.empty(d, p, device="meta")}, {"x": manifold})
    return Problem(geometry, least_squares_loss, least_squares_objective)


def random_root(d: int, count: int, generator: torch.Generator) -> Tensor:
    """Return square roots ``(count, d, d)`` of covariances of trace 1: power laws of exponent 0 to 2, random bases."""
    spectrum = torch.arange(1, d + 1, device=generator.device) ** -_uniform(0.0, 2.0, (count, 1), generator)
    spectrum = spectrum / spectrum.sum(dim=-1, keepdim=True)
    basis = Stiefel().random_point((count, d, d), generator, device=generator.device)
    keep = (torch.rand(count, generator=generator, device=generator.device) < 0.3)[:, None, None]
    return torch.where(keep, torch.eye(d, device=generator.device), basis) * spectrum.sqrt()[:, None, :]


@dataclass(frozen=True)
class PlantedLeastSquares(TaskFamily):
    """Least squares with a known solution on a manifold; ``batch_size`` 0 is the expected loss itself."""

    d: int
    p: int
    manifold: Manifold
    batch_size: int = 64

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name with the size."""
        return f"least squares on {type(self.manifold).__name__} {self.d}x{self.p}"

    @property
    def problem(self) -> Problem:  # type: ignore[override]
        """The problem of this size."""
        return least_squares_problem(self.d, self.p, self.manifold)

    def draw(self, generator: torch.Generator, count: int) -> Data:
        """Draw covariances, solutions, weights of the columns, and noise."""
        weights = 10 ** (
            -_uniform(0.0, 1.0, (count, 1, 1), generator) * torch.linspace(0.0, 1.0, self.p, device=generator.device)
        )
        solution = self.manifold.random_point((count, self.d, self.p), generator, device=generator.device)
        noise = 10 ** _uniform(-3.0, 0.0, (count, 1, 1), generator) * (2.0 / self.d) ** 0.5
        return {
            "root": random_root(self.d, count, generator),
            "solution": solution,
            "weights": weights,
            "noise": noise,
            "reference": torch.zeros(count, device=generator.device),
        }

    def sample(self, data: Data, generator: torch.Generator, steps: int) -> Batch:
        """Draw rows, or return those whose mean is the expectation."""
        if not self.batch_size:
            a = data["root"].mT * self.d**0.5
            return repeat({"a": a, "y": a @ data["solution"], "weights": data["weights"]}, ("a", "y", "weights"), steps)
        count = len(data["reference"])
        a = (
            torch.randn(steps, count, self.batch_size, self.d, generator=generator, device=generator.device)
            @ data["root"].mT
        )
        noise = torch.randn(steps, count, self.batch_size, self.p, generator=generator, device=generator.device)
        weights = data["weights"].expand(steps, *data["weights"].shape)
        return {"a": a, "y": a @ data["solution"] + data["noise"] * noise, "weights": weights}


@dataclass(frozen=True)
class PlantedClassification(TaskFamily):
    """Orthonormal softmax regression on normal clusters."""

    d: int
    classes: int
    batch_size: int = 64
    samples: int = 512
    log10_logit_scale: tuple[float, float] = (-0.5, 2.0)

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name with the size."""
        return f"orthonormal classification of clusters {self.d}x{self.classes}"

    @property
    def problem(self) -> Problem:  # type: ignore[override]
        """The problem of this size."""
        return classification_problem(self.d, self.classes)

    def draw(self, generator: torch.Generator, count: int) -> Data:
        """Draw clusters, and the samples."""
        d, c = self.d, self.classes
        root = random_root(d, count, generator) * d**0.5
        centres = torch.randn(count, c, d, generator=generator, device=generator.device) @ root.mT
        apart = 10 ** _uniform(-0.5, 0.5, (count, 1, 1), generator)
        shift = torch.randn(count, 1, d, generator=generator, device=generator.device) * 10 ** _uniform(
            -1.0, 0.7, (count, 1, 1), generator
        )
        within = random_root(d, count, generator) * d**0.5
        labels = torch.randint(c, (count, self.samples), generator=generator, device=generator.device)
        noise = torch.randn(count, self.samples, d, generator=generator, device=generator.device) @ within.mT
        one_hot = F.one_hot(labels, c).float()
        inputs = apart * (one_hot @ centres) + noise + shift
        scale = 10 ** _uniform(*self.log10_logit_scale, (count, 1, 1), generator)
        inputs = inputs / inputs.square().mean(dim=(1, 2), keepdim=True).sqrt() * scale
        return {
            "inputs": inputs,
            "one_hot": one_hot,
            "test_inputs": inputs[:, :1],
            "test_labels": labels[:, :1],
            "reference": torch.zeros(count, device=generator.device),
        }

    def sample(self, data: Data, generator: torch.Generator, steps: int) -> Batch:
        """Draw samples, with replacement."""
        rows = draw_rows(data, ("inputs", "one_hot"), self.batch_size, generator, steps)
        return {"z": rows["inputs"], "one_hot": rows["one_hot"]}


@dataclass(frozen=True)
class PlantedKarcherMeans(TaskFamily):
    """Karcher means of samples around centres at random distances from the identity.

    The loss has wrong second derivatives at equal eigenvalues, so meta-gradients are to be of first order.
    """

    classes: int
    n: int
    batch_size: int = 64
    samples: int = 256

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name with the size."""
        return f"planted Karcher means {self.classes}x{self.n}x{self.n}"

    @property
    def problem(self) -> Problem:  # type: ignore[override]
        """The problem of this size."""
        return karcher_problem(self.classes, self.n)

    def draw(self, generator: torch.Generator, count: int) -> Data:
        """Draw centres and samples; the minimum by a fixed-point iteration in float64."""
        found = [self._draw_one(generator) for _ in range(count)]
        return {name: torch.stack([one[name] for one in found]) for name in found[0]}

    def _draw_one(self, generator: torch.Generator) -> Data:
        n, draw = (
            self.n,
            functools.partial(torch.randn, generator=generator, dtype=torch.float64, device=generator.device),
        )
        distance = math.exp(float(_uniform(math.log(0.5), math.log(16.0), (), generator)))
        spread = math.exp(float(_uniform(math.log(0.1), math.log(1.5), (), generator)))

        def normal(*shape: int) -> Tensor:
            a = draw(*shape, n, n)
            return (a + a.mT) / (2 * n)

        # Most of a long way is a common scale: with condition numbers above 1e5 float32 says nothing.
        logs = normal(1) + 0.3 * normal(self.classes)
        eye = torch.eye(n, dtype=torch.float64, device=generator.device)
        logs = logs - logs.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[:, None, None] * eye
        turned = min(distance, 4.0) * float(_uniform(0.2, 1.0, (), generator))
        logs = logs * (turned / torch.linalg.matrix_norm(logs).mean())
        along = math.sqrt(max(distance**2 - turned**2, 0.0) / n) * (1.0 if float(draw(())) > 0.0 else -1.0)
        logs = logs + along * eye
        root = torch.linalg.matrix_exp(0.5 * logs)
        labels = torch.arange(self.samples, device=generator.device) % self.classes
        noise = torch.linalg.matrix_exp(spread * normal(self.samples))
        samples = root[labels] @ noise @ root[labels]
        roots, one_hot = inverse_root(0.5 * (samples + samples.mT)), F.one_hot(labels, self.classes).double()
        means = karcher_means(roots, one_hot, iterations=12)
        reference = karcher_loss({"means": means}, {"roots": roots, "one_hot": one_hot})
        values = {"roots": roots, "one_hot": one_hot, "reference": reference}
        return {name: value.float() for name, value in values.items()}

    def sample(self, data: Data, generator: torch.Generator, steps: int) -> Batch:
        """Draw matrices, with replacement."""
        return draw_rows(data, ("roots", "one_hot"), self.batch_size, generator, steps)

    def init(self, data: Data, generator: torch.Generator) -> Params:
        """Return identities."""
        return identities(len(data["reference"]), self.classes, self.n, generator.device)


@dataclass(frozen=True)
class PerceptronOf:
    """Builds perceptrons with tanh between layers of the given widths, inputs and classes included."""

    widths: tuple[int, ...]

    def __call__(self) -> nn.Module:
        """Return a model; its layers are ``0``, ``2``, ``4``, ..."""
        layers: list[nn.Module] = []
        for width, following in zip(self.widths, self.widths[1:], strict=False):
            layers += [nn.Linear(width, following), nn.Tanh()]
        return nn.Sequential(*layers[:-1])
