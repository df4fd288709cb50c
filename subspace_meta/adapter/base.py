"""The adapter of preset ``base``: from a Riemannian gradient and its momentum to a direction of chosen length.

    statistics   row and column means of R*R, M*M and R*M (M: momentum), two running averages of the first
    features     their ratios to the matrix mean, to each other, and to the largest mean seen so far; time
    network      one LSTM over all coordinates, a head for rows and a head for columns
    direction    D = diag(l) ((1-a) R + a M) diag(k), divided by its root mean square
    length       each column moves by eta in (0, 1) on average: the update is -eta D / sqrt(d)

l, k come from the coordinate's own output, eta and a from means of outputs over a matrix: so the map (R, M) -> D is
equivariant to permutations of rows and of columns, unchanged by duplication, and the same weights serve every size.
Multiplying all gradients by a constant changes nothing. Beyond arXiv 2501.15235 are the relative features, momentum,
the learned length and the normalisation; row/column statistics and per-coordinate scales are its idea.

Cost a step: one pass over R and M for momentum and statistics, one for the scaling, and 8 H (F + H) flops a coordinate
for the network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from subspace_kernels import (
    Inputs,
    Layout,
    Network,
    column_means,
    cross_means,
    directions,
    lstm_cell,
    moments,
    row_means,
)
from torch import Tensor

from subspace_meta.adapter.features import TINY, clock, cosine, log_ratio
from subspace_meta.adapter.network import Weights, init_lstm, lstm_shapes

COORDINATE_FEATURES = 5  # log energies relative to the matrix: gradient, fast, slow, momentum; cosine of R and M
CONTEXT_FEATURES = 8  # momentum/fast, fast/slow, gradient/fast, fast/peak, cosine of R and M; three of time
FEATURES = COORDINATE_FEATURES + CONTEXT_FEATURES + 1  # and +1 on rows, -1 on columns

NETWORK = ("lstm.weight", "lstm.bias", "head.weight", "head.bias", "scale.skip")  # the fields of Network, in order


class BaseState(NamedTuple):
    """State of the adapter; N coordinates of B matrices, H hidden units."""

    step: Tensor  # scalar
    momentum: tuple[Tensor, ...]  # per group (..., d, p), tangent at the current point; empty without momentum
    fast: Tensor  # (N,) running mean of the row and column energies
    slow: Tensor  # (N,)
    peak: Tensor  # (B,), largest mean energy of each matrix so far
    hidden: Tensor  # (H, N)
    cell: Tensor  # (H, N)


@dataclass(frozen=True)
class BaseAdapter:
    """Settings of the adapter; the meta-parameters are an argument of each call.

    Attributes:
        hidden: hidden units of the LSTM.
        momentum_decay: decay of the momentum; 0: the momentum is the gradient itself, and there is no buffer.
        fast_decay, slow_decay: decays of the two running means of the energies.
    """

    hidden: int = 20
    momentum_decay: float = 0.9
    fast_decay: float = 0.9
    slow_decay: float = 0.99

    name = "base"

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the names and shapes of the meta-parameters."""
        return {
            **lstm_shapes("lstm", FEATURES, self.hidden),
            "head.weight": (6, self.hidden),  # three outputs for rows, three for columns
            "head.bias": (6, 1),
            "scale.skip": (2, 4),
            "length.skip": (CONTEXT_FEATURES,),
            "length.bias": (),
            "mix.bias": (),
        }

    def init_weights(self, generator: torch.Generator | None = None) -> Weights:
        """Draw meta-parameters that start as RASA-LR with momentum and steps of a tenth of a radian.

        The heads are zero, so the network is silent at first; ``scale.skip`` gives the RASA exponents.
        """
        weights = {name: torch.zeros(shape) for name, shape in self.weight_shapes().items()}
        weights.update(init_lstm("lstm", FEATURES, self.hidden, generator))
        weights["scale.skip"][:, 2] = -0.5  # half of a log energy: diag(L)^(-1/4) R diag(C)^(-1/4)
        weights["length.skip"][3] = 0.5  # shorten the step as the gradient shrinks
        weights["length.bias"] -= 2.0
        weights["mix.bias"] += 1.0
        return weights

    def init(self, layout: Layout, points: Sequence[Tensor]) -> BaseState:
        """Return the state at the start, for points of the layout's shapes."""
        like = points[0]
        coordinates = layout.rows + layout.columns
        return BaseState(
            step=like.new_zeros(()),
            momentum=tuple(torch.zeros_like(x) for x in points) if self.momentum_decay else (),
            fast=like.new_zeros(coordinates),
            slow=like.new_zeros(coordinates),
            peak=like.new_zeros(layout.matrices),
            hidden=like.new_zeros(self.hidden, coordinates),
            cell=like.new_zeros(self.hidden, coordinates),
        )

    def buffers(self, state: BaseState) -> tuple[Tensor, ...]:
        """Return the tangent tensors that the optimizer has to transport, one per group."""
        return state.momentum

    def with_buffers(self, state: BaseState, buffers: Sequence[Tensor]) -> BaseState:
        """Return the state with transported tangent tensors."""
        return state._replace(momentum=tuple(buffers))

    def __call__(
        self,
        weights: Mapping[str, Tensor],
        state: BaseState,
        layout: Layout,
        gradients: Sequence[Tensor],
        in_place: bool = False,
        out: Sequence[Tensor] | None = None,
    ) -> tuple[list[Tensor], list[Tensor | float], BaseState]:
        """Turn Riemannian gradients into updates.

        Args:
            weights: the meta-parameters.
            state: the state so far.
            layout: shapes of the groups.
            gradients: per group ``(..., d, p)``.
            in_place: the new state may be written over ``state``, which is then of no use.
            out: tensors like ``gradients`` (or these themselves) into which directions may be written.

        Returns:
            Per group a direction ``(..., d, p)`` and its factor ``(..., 1, 1)``: the update, to be projected and
            retracted, is their product. The factor is apart because it depends on the length of the whole direction:
            multiplied later, where the projection is at hand, it costs no pass of its own. And the new state.
        """
        step = state.step + 1

        def average_weight(decay: float) -> Tensor:
            # The running mean with Adam's bias correction folded into the weight of the newest value.
            return (1 - decay) / (1 - decay**step)

        momentum: list[Tensor] = []
        if self.momentum_decay:
            weight = average_weight(self.momentum_decay)
            momentum, means = moments(gradients, state.momentum, weight, layout, in_place)
            energy, momentum_energy, agreement = means
        else:
            energy = momentum_energy = agreement = cross_means(gradients, gradients, layout)
        fast = state.fast + average_weight(self.fast_decay) * (energy - state.fast)
        slow = state.slow + average_weight(self.slow_decay) * (energy - state.slow)

        packed = torch.stack([energy, fast, slow, momentum_energy, agreement])
        matrix = row_means(packed[:, : layout.rows], layout)  # (5, B): means over a matrix are means over its rows
        peak = torch.maximum(state.peak, matrix[1])
        context = torch.stack(
            [
                log_ratio(matrix[3], matrix[1]),
                log_ratio(matrix[1], matrix[2]),
                log_ratio(matrix[0], matrix[1]),
                log_ratio(matrix[1], peak),
                cosine(matrix[4], matrix[0], matrix[3]),
                *clock(step)[:, None].expand(3, layout.matrices),
            ]
        )
        inputs = Inputs(packed[:4], matrix[:4], cosine(agreement, energy, momentum_energy)[None], context)
        network = Network(*(weights[name] for name in NETWORK))
        output, hidden, cell = lstm_cell(network, inputs, state.hidden, state.cell, layout, in_place)
        # Outputs beside the scales are pooled over each matrix: its length and its mix.
        pooled = row_means(output[1:, : layout.rows], layout) + column_means(output[1:, layout.rows :], layout)
        skipped = (weights["length.skip"][:, None] * context).sum(dim=0)
        length = torch.sigmoid(weights["length.bias"] + skipped + pooled[0])
        mix = torch.sigmoid(weights["mix.bias"] + pooled[1]) if momentum else None
        scaled, squares = directions(gradients, momentum, mix, output[0], layout, out)
        factors: list[Tensor | float] = [
            part[..., None, None] for part in layout.per_group(-length / (squares + TINY).sqrt())
        ]
        return scaled, factors, BaseState(step, tuple(momentum), fast, slow, peak, hidden, cell)
