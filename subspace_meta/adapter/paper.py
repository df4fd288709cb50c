"""The adapter of preset ``paper``: the published method, as its released implementation computes it.

Source: Yu, Wu, Gao, Fan, Jia, "Large-Scale Riemannian Meta-Optimization via Subspace Adaptation", arXiv 2501.15235:
one two-layer LSTM (1 -> 20) shared by rows and columns and two linear heads, 5,242 meta-parameters. Features are
clip(log(diag(R R^T))/10, -1, 1) and the same of R^T R, sums over the matrix, of a gradient that was first multiplied by
a fixed step. The scales are shifted to mean 1 and their running maximum over time is taken.

Known weakness, and the reason it is the baseline here: when the gradient is small all features saturate at -1, all
coordinates look alike, and the method is gradient descent with a fixed step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from subspace_kernels import Layout, cross, cross_means, rank2
from subspace_kernels.reference import matrix_mean
from torch import Tensor

from subspace_meta.adapter.features import TINY
from subspace_meta.adapter.network import Weights, device_of, init_lstm, linear, lstm_cell, lstm_shapes


class PaperState(NamedTuple):
    """State of the adapter: two LSTM layers and the running maxima of the scales; N coordinates."""

    hidden: Tensor  # (2, H, N)
    cell: Tensor  # (2, H, N)
    maximum: Tensor  # (N,)


@dataclass(frozen=True)
class PaperAdapter:
    """Settings of the published adapter.

    Attributes:
        hidden: hidden units of each of the two LSTM layers.
        step_size: the fixed factor on the gradient.
        mean_statistics: divide the statistics by p and d, as the published ResNet-50 variant does.
    """

    hidden: int = 20
    step_size: float = 1e-2
    mean_statistics: bool = False

    name = "paper"

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the names and shapes of the meta-parameters: 5,242 numbers with 20 hidden units."""
        # The published cell has two bias vectors; the second is redundant and kept for the same count.
        return {
            **lstm_shapes("lstm0", 1, self.hidden),
            "lstm0.hidden_bias": (4 * self.hidden, 1),
            **lstm_shapes("lstm1", self.hidden, self.hidden),
            "lstm1.hidden_bias": (4 * self.hidden, 1),
            "row_head.weight": (1, self.hidden),
            "row_head.bias": (1, 1),
            "column_head.weight": (1, self.hidden),
            "column_head.bias": (1, 1),
        }

    def init_weights(self, generator: torch.Generator | None = None) -> Weights:
        """Draw meta-parameters that start close to gradient descent with the fixed step."""
        device = device_of(generator)
        weights = {name: torch.zeros(shape, device=device) for name, shape in self.weight_shapes().items()}
        weights.update(init_lstm("lstm0", 1, self.hidden, generator))
        weights.update(init_lstm("lstm1", self.hidden, self.hidden, generator))
        for side in ("row_head.weight", "column_head.weight"):
            weights[side] = 0.1 * torch.randn(1, self.hidden, generator=generator, device=device)
        return weights

    def init(self, layout: Layout, points: Sequence[Tensor]) -> PaperState:
        """Return the state at the start."""
        coordinates = layout.rows + layout.columns
        memory = points[0].new_zeros(2, self.hidden, coordinates)
        return PaperState(memory, memory.clone(), points[0].new_full((coordinates,), -torch.inf))

    def buffers(self, state: PaperState) -> tuple[Tensor, ...]:
        """Return nothing: there is no momentum to transport."""
        return ()

    def with_buffers(self, state: PaperState, buffers: Sequence[Tensor]) -> PaperState:
        """Return the state as it is."""
        return state

    def __call__(
        self,
        weights: Mapping[str, Tensor],
        state: PaperState,
        layout: Layout,
        gradients: Sequence[Tensor],
        in_place: bool = False,
        out: Sequence[Tensor] | None = None,
    ) -> tuple[list[Tensor], list[Tensor | float], PaperState]:
        """Turn Riemannian gradients into updates; see :class:`subspace_meta.adapter.base.BaseAdapter`.

        Neither the state nor ``out`` is written over. The factor is the fixed step.
        """
        if self.mean_statistics:
            statistics = cross_means(gradients, gradients, layout)
        else:
            statistics = torch.cat(cross(gradients, gradients))
        x = (torch.log(self.step_size**2 * statistics + TINY) / 10).clamp(-1, 1)[None]
        hidden, cell = [], []
        for layer in range(2):
            name = f"lstm{layer}"
            layer_weights = {**weights, f"{name}.bias": weights[f"{name}.bias"] + weights[f"{name}.hidden_bias"]}
            x, c = lstm_cell(layer_weights, name, x, state.hidden[layer], state.cell[layer])
            hidden.append(x)
            cell.append(c)
        row_raw = linear(weights, "row_head", x[:, : layout.rows])[0]
        column_raw = linear(weights, "column_head", x[:, layout.rows :])[0]
        rows, columns = layout.unpack(torch.cat([row_raw, column_raw]))
        sizes = layout.sizes
        rows = [v - matrix_mean(v, d)[..., None] + 1 for v, (d, _) in zip(rows, sizes, strict=True)]
        columns = [v - matrix_mean(v, p)[..., None] + 1 for v, (_, p) in zip(columns, sizes, strict=True)]
        maximum = torch.maximum(state.maximum, layout.pack(rows, columns))
        scaled = rank2(gradients, maximum[: layout.rows], maximum[layout.rows :])
        factors: list[Tensor | float] = [-self.step_size] * len(scaled)
        return scaled, factors, PaperState(torch.stack(hidden), torch.stack(cell), maximum)
