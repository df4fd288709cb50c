"""Layers with orthonormal weights where they are least like perceptrons: attention, and a network of sines.

*Attention.* One layer of attention whose query, key and value projections have orthonormal columns finds, among pairs
of a key and a class, the class of the key that is asked for. Minimise the mean cross-entropy. Sources: Vaswani et al.,
"Attention is all you need", NeurIPS 2017; the task: Graves, Wayne, Danihelka, "Neural Turing machines", 2014, in the
form of Arora et al., "Zoology: measuring and improving recall in efficient language models", ICLR 2024.

*Sines.* A network that is an image: from the coordinates of a pixel to its grey level, with sines between orthogonal
layers and a tanh at the end. Minimise the mean squared error. Source: Sitzmann, Martel, Bergman, Lindell, Wetzstein,
"Implicit neural representations with periodic activation functions", NeurIPS 2020.

The minimum is not known; the reference is 0, the lower bound of both.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from subspace_meta.geometry import Geometry, Params
from subspace_meta.manifolds import Euclidean, Orthogonal, Stiefel
from subspace_meta.tasks.base import Batch, Data, Problem, TaskFamily, draw_rows, once_per_task
from subspace_meta.tasks.images import photographs

SHARPNESS = 4.0
FREQUENCY = 6.0


def recall_logits(params: Params, batch: Batch) -> Tensor:
    """Return logits ``(B, classes)`` for pairs ``tokens`` ``(B, L, d)`` and a key ``question`` ``(B, d)``."""
    tokens = batch["tokens"]
    query = batch["question"] @ params["query"]
    scores = ((tokens @ params["key"]) @ query[:, :, None])[..., 0]
    weights = torch.softmax(SHARPNESS * scores, dim=-1)
    read = (weights[..., None] * (tokens @ params["value"])).sum(dim=1)
    return read @ params["head"] + params["bias"]


def recall_loss(params: Params, batch: Batch) -> Tensor:
    """Return the mean cross-entropy."""
    logits = recall_logits(params, batch)
    return -(F.log_softmax(logits, dim=-1) * batch["answer"]).sum() / logits.shape[0]


def recall_accuracy(params: Params, data: Data) -> Tensor:
    """Return the share of right answers."""
    right = recall_logits(params, data).argmax(dim=-1) == data["answer"].argmax(dim=-1)
    return right.to(params["bias"].dtype).mean()


@functools.cache
def recall_problem(width: int, classes: int, head: int) -> Problem:
    """Return the problem of one size."""
    projection = torch.empty(width + classes, head, device="meta")
    shapes = {
        **dict.fromkeys(("query", "key", "value"), projection),
        "head": torch.empty(head, classes, device="meta"),
        "bias": torch.empty(classes, device="meta"),
    }
    rules = {"query": Stiefel(), "key": Stiefel(), "value": Stiefel(), "head": Euclidean(), "bias": Euclidean()}
    return Problem(Geometry.from_rules(shapes, rules), recall_loss, recall_loss, recall_accuracy)


@dataclass(frozen=True)
class AssociativeRecall(TaskFamily):
    """Attention with orthonormal projections recalls one of L classes by its key, a normal vector.

    A token is a key beside a one-hot class; the question is a noisy key beside nothing. Mini-batches are new sequences;
    the objective is the cross-entropy on a fixed set, the metric the share of right answers there.
    """

    width: int = 12
    classes: int = 8
    head: int = 10
    length: int = 6
    noise: float = 0.1
    objective_size: int = 128
    batch_size: int = 32

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name with the size."""
        return f"associative recall by attention, projections {self.width + self.classes}x{self.head}"

    @property
    def problem(self) -> Problem:  # type: ignore[override]
        """The problem of this size."""
        return recall_problem(self.width, self.classes, self.head)

    def _sequences(self, shape: tuple[int, ...], generator: torch.Generator) -> Batch:
        """Return tokens ``(*shape, L, d)``, questions ``(*shape, d)`` and one-hot answers."""
        keys = torch.randn(*shape, self.length, self.width, generator=generator) / self.width**0.5
        labels = torch.randint(self.classes, (*shape, self.length), generator=generator)
        # Keys are drawn at random, so the first is as good as any to be asked for: attention has no positions.
        noise = self.noise * torch.randn(*shape, self.width, generator=generator) / self.width**0.5
        one_hot = F.one_hot(labels, self.classes).float()
        asked = torch.cat([keys[..., 0, :] + noise, torch.zeros(*shape, self.classes)], dim=-1)
        tokens = torch.cat([keys, one_hot], dim=-1)
        return {"tokens": tokens, "question": asked, "answer": one_hot[..., 0, :]}

    def draw(self, generator: torch.Generator, count: int) -> Data:
        """Draw the sequences of the objective."""
        return {**self._sequences((count, self.objective_size), generator), "reference": torch.zeros(count)}

    def sample(self, data: Data, generator: torch.Generator, steps: int) -> Batch:
        """Draw new sequences."""
        return self._sequences((steps, len(data["reference"]), self.batch_size), generator)

    def init(self, data: Data, generator: torch.Generator) -> Params:
        """Draw feasible weights; the bias is 0."""
        start = super().init(data, generator)
        return {**start, "bias": torch.zeros_like(start["bias"])}


@functools.cache
def cameraman() -> tuple[Tensor, Tensor]:
    """Return coordinates ``(576, 2)`` in -1..1 and grey levels ``(576,)`` in -0.9..0.9 of a photograph.

    It is the middle of ``camera`` of scikit-image, averaged over blocks of 20 x 20 pixels.
    """
    (image,) = photographs("camera")
    grey = image[16:-16, 16:-16].reshape(24, 20, 24, 20).mean(dim=(1, 3))
    grid = torch.linspace(-1.0, 1.0, 24)
    coordinates = torch.cartesian_prod(grid, grid)
    low, high = grey.aminmax()
    levels = 0.9 * (2.0 * (grey - low) / (high - low) - 1.0)
    return coordinates, levels.flatten().float()


def sine_network(params: Params, z: Tensor) -> Tensor:
    """Return grey levels ``(B,)`` at ``z`` ``(B, 2)``: two orthogonal layers between sines."""
    hidden = torch.sin(FREQUENCY * (z @ params["entry"]) + params["entry.bias"])
    for name in ("first", "second"):
        hidden = torch.sin(2.0 * (hidden @ params[name]) + params[f"{name}.bias"])
    return (hidden @ params["head"] + params["head.bias"]).tanh()


def image_loss(params: Params, batch: Batch) -> Tensor:
    """Return the mean squared error of grey levels ``y`` ``(B,)`` at ``z`` ``(B, 2)``."""
    return (sine_network(params, batch["z"]) - batch["y"]).square().mean()


def image_error(params: Params, data: Data) -> Tensor:
    """Return the root mean square error."""
    return image_loss(params, data).sqrt()


@functools.cache
def image_problem(hidden: int) -> Problem:
    """Return the problem of one size."""
    shapes = {
        "entry": (2, hidden),
        "first": (hidden, hidden),
        "second": (hidden, hidden),
        "entry.bias": (hidden,),
        "first.bias": (hidden,),
        "second.bias": (hidden,),
        "head": (hidden,),
        "head.bias": (),
    }
    geometry = Geometry.from_rules(
        {name: torch.empty(shape, device="meta") for name, shape in shapes.items()},
        {"first": Orthogonal(), "second": Orthogonal()},
    )
    return Problem(geometry, image_loss, image_loss, image_error)


@dataclass(frozen=True)
class ImageRepresentation(TaskFamily):
    """A photograph as a network of sines with two orthogonal layers; mini-batches are pixels.

    The metric is the root mean square error.
    """

    hidden: int = 24
    batch_size: int = 48

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name with the size."""
        return f"image as an orthogonal network of sines {self.hidden}x{self.hidden}"

    @property
    def problem(self) -> Problem:  # type: ignore[override]
        """The problem of this size."""
        return image_problem(self.hidden)

    def draw(self, generator: torch.Generator, count: int) -> Data:
        """Return the pixels, once a task."""
        z, y = cameraman()
        return once_per_task({"z": z, "y": y, "reference": torch.zeros(())}, count)

    def sample(self, data: Data, generator: torch.Generator, steps: int) -> Batch:
        """Draw pixels, with replacement."""
        return draw_rows(data, ("z", "y"), self.batch_size, generator, steps)

    def init(self, data: Data, generator: torch.Generator) -> Params:
        """Draw feasible weights; biases are 0, and the head starts at a length of 1."""
        start = super().init(data, generator)
        start["head"] = start["head"] / self.hidden**0.5
        return {name: torch.zeros_like(value) if name.endswith("bias") else value for name, value in start.items()}
