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

Cost a step: three passes over R and M for statistics and scaling, and 8 H (F + H) flops a coordinate for the network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from subspace_kernels import rank2
from torch import Tensor

from subspace_meta.adapter.features import TINY, clock, cosine, log_ratio
from subspace_meta.adapter.layout import Layout
from subspace_meta.adapter.network import Weights, init_lstm, linear, lstm_cell, lstm_shapes
from subspace_meta.adapter.statistics import cross_means, matrix_mean

COORDINATE_FEATURES = 5  # log energies relative to the matrix: gradient, fast, slow, momentum; cosine of R and M
CONTEXT_FEATURES = 8  # momentum/fast, fast/slow, gradient/fast, fast/peak, cosine of R and M; three of time
FEATURES = COORDINATE_FEATURES + CONTEXT_FEATURES + 1  # and +1 on rows, -1 on columns


class BaseState(NamedTuple):
    """State of the adapter; N coordinates, H hidden units."""

    step: Tensor  # scalar
    momentum: tuple[Tensor, ...]  # per group (..., d, p), tangent at the current point
    fast: Tensor  # (N,) running mean of the row and column energies
    slow: Tensor  # (N,)
    peak: tuple[Tensor, ...]  # per group (...), largest mean energy so far
    hidden: Tensor  # (H, N)
    cell: Tensor  # (H, N)


@dataclass(frozen=True)
class BaseAdapter:
    """Settings of the adapter; the meta-parameters are an argument of each call.

    Attributes:
        hidden: hidden units of the LSTM.
        momentum_decay: decay of the momentum.
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
            momentum=tuple(torch.zeros_like(x) for x in points),
            fast=like.new_zeros(coordinates),
            slow=like.new_zeros(coordinates),
            peak=tuple(x.new_zeros(x.shape[:-2]) for x in points),
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
    ) -> tuple[list[Tensor], BaseState]:
        """Turn Riemannian gradients into updates.

        Args:
            weights: the meta-parameters.
            state: the state so far.
            layout: shapes of the groups.
            gradients: per group ``(..., d, p)``.

        Returns:
            Per group the update ``(..., d, p)`` (to be projected and retracted), and the new state.
        """
        step = state.step + 1
        sizes = layout.sizes

        def average(decay: float, old: Tensor, new: Tensor) -> Tensor:
            # The running mean with Adam's bias correction folded into the weight of the newest value.
            return old + (1 - decay) / (1 - decay**step) * (new - old)

        momentum = [average(self.momentum_decay, m, r) for m, r in zip(state.momentum, gradients, strict=True)]
        energy_means = [cross_means(r, r, size) for r, size in zip(gradients, sizes, strict=True)]
        momentum_means = [cross_means(m, m, size) for m, size in zip(momentum, sizes, strict=True)]
        agreement_means = [cross_means(r, m, size) for r, m, size in zip(gradients, momentum, sizes, strict=True)]
        energy, momentum_energy, agreement = (
            layout.pack(*zip(*means, strict=True)) for means in (energy_means, momentum_means, agreement_means)
        )
        fast = average(self.fast_decay, state.fast, energy)
        slow = average(self.slow_decay, state.slow, energy)

        # Means over a matrix, from its rows: (5, ...) per group.
        packed = torch.stack([energy, fast, slow, momentum_energy, agreement])
        matrix_means = [matrix_mean(rows, d) for rows, (d, _) in zip(layout.unpack(packed)[0], sizes, strict=True)]
        peak = [torch.maximum(old, means[1]) for old, means in zip(state.peak, matrix_means, strict=True)]
        time = clock(step)
        context = [
            torch.stack(
                [
                    log_ratio(means[3], means[1]),
                    log_ratio(means[1], means[2]),
                    log_ratio(means[0], means[1]),
                    log_ratio(means[1], top),
                    cosine(means[4], means[0], means[3]),
                    *(time[i].expand(means.shape[1:]) for i in range(3)),
                ],
                dim=-1,
            )
            for means, top in zip(matrix_means, peak, strict=True)
        ]

        mean_energies = layout.spread([means[:4] for means in matrix_means])
        relative = log_ratio(packed[:4], mean_energies)
        side = torch.ones_like(energy)
        side = torch.cat([side[: layout.rows], -side[layout.rows :]])
        features = torch.cat(
            [
                relative,
                cosine(agreement, energy, momentum_energy)[None],
                layout.spread([c.movedim(-1, 0) for c in context]),
                side[None],
            ]
        )
        hidden, cell = lstm_cell(weights, "lstm", features, state.hidden, state.cell)
        # One small product for both sides costs less than two: each takes its half of the outputs.
        output = linear(weights, "head", hidden)
        output = torch.cat([output[:3, : layout.rows], output[3:, layout.rows :]], dim=-1)
        skip = weights["scale.skip"]
        skipped = [
            (skip[i][:, None] * part).sum(dim=0)
            for i, part in enumerate((relative[:, : layout.rows], relative[:, layout.rows :]))
        ]
        # Outputs beside the scales are pooled over each matrix: its length and its mix.
        row_outputs, column_outputs = layout.unpack(torch.cat([(output[0] + torch.cat(skipped))[None], output[1:]]))

        updates = []
        groups = zip(gradients, momentum, row_outputs, column_outputs, context, sizes, strict=True)
        for r, m, rows, columns, c, (d, p) in groups:
            pooled = matrix_mean(rows[1:], d) + matrix_mean(columns[1:], p)
            length = torch.sigmoid(weights["length.bias"] + (c * weights["length.skip"]).sum(dim=-1) + pooled[0])
            mix = torch.sigmoid(weights["mix.bias"] + pooled[1])[..., None, None]
            direction = rank2(torch.lerp(r, m, mix), torch.exp(rows[0]), torch.exp(columns[0]))
            mean_square = direction.square().sum(dim=(-2, -1), keepdim=True) / (d * p)
            factor = length[..., None, None] / (mean_square + TINY).sqrt() / d**0.5
            updates.append(-factor * direction)
        return updates, BaseState(step, tuple(momentum), fast, slow, tuple(peak), hidden, cell)
