"""Small neural networks, with orthogonal hidden weights or without constraints.

The models are ``nn.Module`` s and enter through ``torch.func.functional_call``. The minimum is not known; the reference
is 0, the lower bound of cross-entropy and of squared error. Sources: Arjovsky, Shah, Bengio, "Unitary evolution
recurrent neural networks", ICML 2016 (orthogonal recurrence, the adding problem of Hochreiter and Schmidhuber 1997);
Bansal, Chen, Wang, "Can we gain more from orthogonality regularizations in training deep CNNs?", NeurIPS 2018.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subspace_meta.geometry import Geometry, Params
from subspace_meta.manifolds import Manifold, Orthogonal
from subspace_meta.tasks.base import Batch, Data, Problem, TaskFamily, draw_rows, once_per_task
from subspace_meta.tasks.classification import classification_functions, split

Rules = tuple[tuple[str, Manifold], ...]


class Perceptron(nn.Module):
    """64 inputs, two hidden layers of 32 with tanh, 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 32)
        self.second = nn.Linear(32, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, z: Tensor) -> Tensor:
        """Return logits ``(B, 10)`` of inputs ``(B, 64)``."""
        return self.head(self.second(self.first(z).tanh()).tanh())


class ConvolutionalNetwork(nn.Module):
    """8 x 8 images, two 3 x 3 convolutions (8 and 16 channels, stride 1 and 2), mean over positions, 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3)
        self.second = nn.Conv2d(8, 16, 3, stride=2)
        self.head = nn.Linear(16, 10)

    def forward(self, z: Tensor) -> Tensor:
        """Return logits ``(B, 10)`` of inputs ``(B, 64)``."""
        hidden = F.gelu(self.first(z.reshape(-1, 1, 8, 8)))
        return self.head(F.gelu(self.second(hidden)).mean(dim=(-2, -1)))


class RecurrentNetwork(nn.Module):
    """A recurrent network h <- tanh(W h + V z + b) of 32 units, with one output at the end."""

    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        self.recurrent = nn.Linear(hidden, hidden, bias=False)
        self.entry = nn.Linear(2, hidden)
        self.head = nn.Linear(hidden, 1)

    def forward(self, z: Tensor) -> Tensor:
        """Return one number for each sequence ``(B, T, 2)``, shape ``(B,)``."""
        entries = self.entry(z)
        state = torch.zeros_like(entries[:, 0])
        for entry in entries.unbind(1):
            state = (self.recurrent(state) + entry).tanh()
        return self.head(state)[:, 0]


def _model(build: Callable[[], nn.Module], rules: Rules) -> tuple[nn.Module, Geometry]:
    """Return a model without storage, and its geometry."""
    with torch.device("meta"):
        model = build()
    return model, Geometry.from_rules(dict(model.named_parameters()), dict(rules))


def _start_at_zero_bias(params: Params) -> Params:
    """Return the random start with biases of 0, as is usual; those of a geometry would be standard normal."""
    return {name: torch.zeros_like(value) if name.endswith("bias") else value for name, value in params.items()}


@functools.cache
def network_problem(build: Callable[[], nn.Module], rules: Rules) -> Problem:
    """Return the classification problem of one architecture and choice of manifolds."""
    model, geometry = _model(build, rules)
    return Problem(geometry, *classification_functions(model))


@dataclass(frozen=True)
class NetworkClassification(TaskFamily):
    """Softmax classification by a small network. The metric is the test accuracy.

    Attributes:
        source: name of the data set, for tables.
        load: cached function that returns inputs and labels; every fifth sample is the test set.
        title: name of the model, for tables.
        build: makes the model; a class or function, so that the family is hashable.
        rules: pairs of name pattern and manifold.
    """

    source: str
    load: Callable[[], tuple[Tensor, Tensor]]
    title: str
    build: Callable[[], nn.Module]
    rules: Rules = ()
    batch_size: int = 32

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name of model and data."""
        return f"{self.title} on {self.source}"

    @property
    def problem(self) -> Problem:  # type: ignore[override]
        """The problem of this model."""
        return network_problem(self.build, self.rules)

    def draw(self, generator: torch.Generator, count: int) -> Data:
        """Return the samples, once a task."""
        inputs, labels, test_inputs, test_labels = split(*self.load())
        values = {
            "inputs": inputs,
            "one_hot": F.one_hot(labels).float(),
            "test_inputs": test_inputs,
            "test_labels": test_labels,
            "reference": torch.zeros((), device=inputs.device),
        }
        return once_per_task(values, count)

    def sample(self, data: Data, generator: torch.Generator, steps: int) -> Batch:
        """Draw samples, with replacement."""
        batch = draw_rows(data, ("inputs", "one_hot"), self.batch_size, generator, steps)
        return {"z": batch["inputs"], "one_hot": batch["one_hot"]}

    def init(self, data: Data, generator: torch.Generator) -> Params:
        """Draw feasible weights; biases are 0."""
        return _start_at_zero_bias(super().init(data, generator))


@functools.cache
def adding_problem(hidden: int) -> Problem:
    """Return the problem of one size."""
    model, geometry = _model(functools.partial(RecurrentNetwork, hidden), (("recurrent.weight", Orthogonal()),))

    def loss(params: Params, batch: Batch) -> Tensor:
        return (torch.func.functional_call(model, params, (batch["z"],)) - batch["target"]).square().mean()

    def error(params: Params, data: Data) -> Tensor:
        return loss(params, data).sqrt()

    return Problem(geometry, loss, loss, error)


@dataclass(frozen=True)
class AddingProblem(TaskFamily):
    """The adding problem: a recurrent network with an orthogonal transition matrix adds two marked numbers.

    A sequence holds uniform numbers and markers, one in each half. Answering 1 always has the mean squared error 1/6.
    Mini-batches are new sequences; the objective is the error on a fixed set. The metric is the root mean square error.
    """

    length: int = 20
    hidden: int = 32
    objective_size: int = 256
    batch_size: int = 32

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name with the size."""
        return f"adding problem of length {self.length}, orthogonal recurrence {self.hidden}x{self.hidden}"

    @property
    def problem(self) -> Problem:  # type: ignore[override]
        """The problem of this size."""
        return adding_problem(self.hidden)

    def _sequences(self, shape: tuple[int, ...], generator: torch.Generator) -> Batch:
        """Return sequences ``(*shape, T, 2)`` and their answers ``(*shape,)``."""
        numbers = torch.rand(*shape, self.length, generator=generator, device=generator.device)
        half = self.length // 2
        first = torch.randint(half, shape, generator=generator, device=generator.device)
        second = half + torch.randint(self.length - half, shape, generator=generator, device=generator.device)
        markers = (F.one_hot(first, self.length) + F.one_hot(second, self.length)).float()
        return {"z": torch.stack([numbers, markers], dim=-1), "target": (numbers * markers).sum(dim=-1)}

    def draw(self, generator: torch.Generator, count: int) -> Data:
        """Draw the sequences of the objective."""
        return {
            **self._sequences((count, self.objective_size), generator),
            "reference": torch.zeros(count, device=generator.device),
        }

    def sample(self, data: Data, generator: torch.Generator, steps: int) -> Batch:
        """Draw new sequences."""
        return self._sequences((steps, len(data["reference"]), self.batch_size), generator)

    def init(self, data: Data, generator: torch.Generator) -> Params:
        """Draw feasible weights; biases are 0."""
        return _start_at_zero_bias(super().init(data, generator))
