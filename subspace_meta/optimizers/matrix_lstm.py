"""The predecessor of subspace adaptation: two matrix LSTMs on whole gradients, one for direction, one for step length.

Source: Gao, Wu, Fan, Harandi, Jia, "Learning to optimize on Riemannian manifolds", TPAMI 2022 (there gmLSTM), and Gao,
Wu, Jia, Harandi, "Learning to optimize on SPD manifolds", CVPR 2020. With the Euclidean gradient G, a d x p matrix, and
R_X(.), which makes a Riemannian gradient of a Euclidean one,

    X <- Retr_X(-lr l R_X(G + D)),    D = direction network of G,    l = length network of G.

A matrix LSTM is an LSTM whose gates are W U + V H, with d x d matrices W, V on the input U and the hidden H, entry-wise
sigmoid and tanh, and no biases. Both networks have two such layers and a last d x d matrix; the length network goes on
with relu, a dense layer dp -> 1024, relu, and a dense layer 1024 -> 1. Per distinct d x p that are

    2 (2 * 8 d^2 + d^2) + (1024 dp + 1024) + (1024 + 1) = 34 d^2 + 1024 dp + 2049

numbers. The count is that of the later papers. Two networks and the form of the update are the paper's; which layers
there are, the sum G + D and the memory (both networks read one; it becomes the product of what the two would keep, each
matrix divided by its Frobenius norm) are facts of the authors' released implementation. Ours are: the start of
:meth:`MatrixLSTM.init_weights`, weights shared by all parameters of one matrix shape, and the use of the same formula
on Euclidean parameters and on every manifold.

Cost a step: 68 d^2 p + 2048 dp flops and 4dp numbers of state a matrix: what subspace adaptation is there to avoid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from subspace_meta._tracing import is_compiling
from subspace_meta.adapter.features import TINY
from subspace_meta.adapter.network import Weights, device_of
from subspace_meta.geometry import Geometry, Params
from subspace_meta.manifolds.base import euclidean_inner
from subspace_meta.manifolds.stiefel import random_orthonormal
from subspace_meta.optimizers.base import (
    check_rate,
    check_start,
    check_weight_dtype,
    check_weight_shapes,
    gather_euclidean,
)

WIDTH = 1024


class MatrixLSTMState(NamedTuple):
    """Per group hidden and cell of the two layers, ``(..., 2, d, p)``; both networks read them."""

    hidden: tuple[Tensor, ...]
    cell: tuple[Tensor, ...]


def matrix_lstm(
    weights: Mapping[str, Tensor], name: str, x: Tensor, hidden: Tensor, cell: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Advance the two layers of one network; return its output (after its last matrix), hidden and cell.

    Args:
        weights: holds ``name.layer0.input``, ``name.layer0.hidden`` (4, d, d), gates in the order input, forget,
            candidate, output; the same of ``layer1``; ``name.output`` (d, d).
        name: the network.
        x: ``(..., d, p)``.
        hidden, cell: of both layers, ``(..., 2, d, p)``.
    """
    kept = []
    for layer, (hidden_before, cell_before) in enumerate(zip(hidden.unbind(-3), cell.unbind(-3), strict=True)):
        gates = weights[f"{name}.layer{layer}.input"] @ x[..., None, :, :]
        gates = gates + weights[f"{name}.layer{layer}.hidden"] @ hidden_before[..., None, :, :]
        enter, forget, candidate, leave = gates.unbind(-3)
        memory = torch.sigmoid(forget) * cell_before + torch.sigmoid(enter) * torch.tanh(candidate)
        x = torch.sigmoid(leave) * torch.tanh(memory)
        kept.append((x, memory))
    hiddens, cells = zip(*kept, strict=True)
    return weights[f"{name}.output"] @ x, torch.stack(hiddens, dim=-3), torch.stack(cells, dim=-3)


def normalized_product(a: Tensor, b: Tensor) -> Tensor:
    """Return A * B, entry by entry, divided by its Frobenius norm for each matrix; 0 stays 0."""
    product = a * b
    return product / (euclidean_inner(product, product) + TINY).sqrt()[..., None, None]


@dataclass(frozen=True, eq=False)
class MatrixLSTM:
    """The matrix LSTM optimizer, on every manifold.

    Attributes:
        geometry: where the parameters live.
        weights: the meta-parameters, a dict of tensors with the names and shapes of :meth:`weight_shapes`.
        lr: a fixed factor on the learned length; a float or a scalar tensor.

    Raises:
        ValueError: the weights are not those of this geometry.
    """

    geometry: Geometry
    weights: Weights
    lr: float | Tensor = 1e-2

    def __post_init__(self) -> None:
        check_rate(self.lr)
        if not is_compiling():
            check_weight_shapes(self.weights, self.weight_shapes(self.geometry), "MatrixLSTM", " for this geometry")

    @staticmethod
    def weight_shapes(geometry: Geometry) -> dict[str, tuple[int, ...]]:
        """Return names and shapes of the meta-parameters: 34 d^2 + 1024 dp + 2049 numbers per distinct d x p."""
        shapes: dict[str, tuple[int, ...]] = {}
        for d, p in sorted({(group.shape[-2], group.shape[-1]) for group in geometry.groups}):
            for network in ("direction", "length"):
                name = f"{d}x{p}.{network}"
                for layer in range(2):
                    shapes[f"{name}.layer{layer}.input"] = (4, d, d)
                    shapes[f"{name}.layer{layer}.hidden"] = (4, d, d)
                shapes[f"{name}.output"] = (d, d)
            shapes[f"{d}x{p}.dense0.weight"] = (WIDTH, d * p)
            shapes[f"{d}x{p}.dense0.bias"] = (WIDTH,)
            shapes[f"{d}x{p}.dense1.weight"] = (WIDTH,)
            shapes[f"{d}x{p}.dense1.bias"] = ()
        return shapes

    @staticmethod
    def init_weights(geometry: Geometry, generator: torch.Generator | None = None) -> Weights:
        """Draw meta-parameters that start as gradient descent with step ``lr``.

        Matrices of the LSTMs are orthogonal, as in the released implementation; the dense layer is uniform in
        +-1/sqrt(dp); the direction's last matrix and the last dense layer are zero, but for a length of 1.
        """
        device, shapes = device_of(generator), MatrixLSTM.weight_shapes(geometry)
        weights = {name: torch.zeros(shape, device=device) for name, shape in shapes.items()}
        for name, value in weights.items():
            if "layer" in name or name.endswith("length.output"):
                weights[name] = random_orthonormal(tuple(value.shape), generator, None, device)
            elif name.endswith(("dense0.weight", "dense0.bias")):
                fan_in = weights[name.replace("bias", "weight")].shape[1]
                weights[name] = (2.0 * torch.rand(value.shape, generator=generator, device=device) - 1.0) / fan_in**0.5
            elif name.endswith("dense1.bias"):
                weights[name] = torch.ones((), device=device)
        return weights

    def init(self, params: Mapping[str, Tensor]) -> MatrixLSTMState:
        """Return zero memory; parameters and weights must have one dtype."""
        check_start(self.geometry, params)
        check_weight_dtype(self.weights, params)
        memory = tuple(x.new_zeros(*x.shape[:-2], 2, *x.shape[-2:]) for x in self.geometry.gather(params))
        return MatrixLSTMState(memory, tuple(map(torch.clone, memory)))

    def update(
        self,
        grads: Mapping[str, Tensor],
        state: MatrixLSTMState,
        params: Mapping[str, Tensor],
        value: Tensor | None = None,
    ) -> tuple[Params, MatrixLSTMState]:
        """Take one step; see :meth:`subspace_meta.optimizers.base.Optimizer.update`."""
        points, gradients = self.geometry.gather(params), gather_euclidean(self.geometry, grads)
        moved, hiddens, cells = [], [], []
        groups = zip(self.geometry.groups, points, gradients, state.hidden, state.cell, strict=True)
        for group, x, g, hidden, cell in groups:
            g = g.to(x.dtype)
            name = f"{x.shape[-2]}x{x.shape[-1]}"
            direction, hidden0, cell0 = matrix_lstm(self.weights, f"{name}.direction", g, hidden, cell)
            features, hidden1, cell1 = matrix_lstm(self.weights, f"{name}.length", g, hidden, cell)
            features = torch.relu(features).flatten(-2) @ self.weights[f"{name}.dense0.weight"].mT
            features = torch.relu(features + self.weights[f"{name}.dense0.bias"])
            length = features @ self.weights[f"{name}.dense1.weight"] + self.weights[f"{name}.dense1.bias"]
            tangent = group.manifold.riemannian_gradient(x, g + direction)
            moved.append(group.manifold.retract(x, (-self.lr * length)[..., None, None] * tangent))
            hiddens.append(normalized_product(hidden0, hidden1))
            cells.append(normalized_product(cell0, cell1))
        return self.geometry.scatter(moved), MatrixLSTMState(tuple(hiddens), tuple(cells))
