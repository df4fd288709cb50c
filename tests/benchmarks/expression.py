"""What the preset ``base`` cannot say, and what saying it is worth: a trial of two additions to its family.

Tuned momentum wins late on problems without noise, because its steps shrink with the gradient by themselves and its
decay suits the problem. ``base`` has the momentum's decay of 0.9 for ever, and the size of the gradient only as a
feature with a floor. The trial adds to it

* **gauges**: logarithms without a floor that the step's length may follow by a power. With D the scaled direction
  before its columns are brought to length 1: log(|D| / peak), log(peak / first), log t, log of the momentum's mass
  (what Adam's bias correction divides by), and the same of the slow mean. Powers (1, 1, 0, 1, 0) and no network are
  gradient descent with momentum; (1, 0, -1/2, 0, -1) and the RASA exponents are RASA-LR with a/sqrt(t);
* **decay**: that of the momentum, one a matrix and step, sigmoid of a weighted sum of what is known before the step.

``python tests/benchmarks/expression.py --outer-steps 320 --seeds 0 1`` meta-trains each variant for the same number of
outer steps on the distribution of the release, judges it on seventeen tasks of the suite on which ``base-2`` loses, and
prints a Markdown table; four CPU minutes a row.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from subspace_kernels import Inputs, Layout, Network, column_means, cross_means, directions, lstm_cell, row_means
from torch import Tensor

import subspace_meta as sm
from subspace_meta.adapter.base import (
    CONTEXT_FEATURES,
    LONGEST,
    NETWORK,
    RATE,
    RATE_BOUNDS,
    BaseAdapter,
)
from subspace_meta.adapter.features import FLOOR, TINY, clock, cosine, log_ratio
from subspace_meta.adapter.spectral import spectral_direction
from subspace_meta.evaluation.comparison import Comparison, compare
from subspace_meta.meta.distribution import training_streams
from subspace_meta.meta.trainer import Trainer, TrainSettings
from subspace_meta.optimizers.subspace import PRESETS
from subspace_meta.tasks.suite import evaluation_suite

GAUGES = 5
STEPS = (20, 50, 100, 200, 400)
HARD = (
    "ordered eigenvectors 100x8",
    "Rayleigh quotient 200",
    "leading subspace 200x20",
    "max-cut relaxation 15x100",
    "joint diagonalisation 32x8",
    "Karcher means of MNIST 10x5x5",
    "unbalanced Procrustes 40x10",
    "synthetic PCA 64x8",
    "PCA of MNIST 784x10",
    "orthonormal classification of digits 64x10",
    "independent components 32x8",
    "sparse PCA 100x5",
    "orthogonal perceptron on digits",
    "matrix completion 100x5",
    "synchronisation of 30 rotations SO(3)",
    "PCA of digits 64x8",
    "trace-ratio discriminant of digits 64x5",
)


class TrialState(NamedTuple):
    """The state of ``BaseState``, and the first energy and the momentum's mass of each matrix."""

    step: Tensor
    momentum: tuple[Tensor, ...]
    fast: Tensor
    slow: Tensor
    peak: Tensor
    first: Tensor
    mass: Tensor
    rate: Tensor
    turn: Tensor
    along: Tensor
    hidden: Tensor
    cell: Tensor


@dataclass(frozen=True)
class Trial(BaseAdapter):
    """``BaseAdapter`` with gauges, with a decay of its own for each matrix, or both. In plain torch, no kernels."""

    gauges: bool = True
    decays: bool = True
    exponent: float = 0.95  # of the direction's size, at the start

    @property
    def name(self) -> str:
        """The preset this is a variant of."""
        return "trial"

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the names and shapes of the meta-parameters."""
        return {
            **super().weight_shapes(),
            "length.gauge": (GAUGES,),
            "decay.skip": (CONTEXT_FEATURES,),
            "decay.bias": (),
        }

    def init_weights(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Draw meta-parameters that start as those of ``base``, with a length that follows the gradient's size."""
        weights = super().init_weights(generator)
        weights["decay.bias"] += math.log(self.momentum_decay / (1 - self.momentum_decay))
        if self.gauges:
            weights["length.skip"][3] = 0.0
            weights["length.gauge"][0] = self.exponent
        return weights

    def init(self, layout: Layout, points: Sequence[Tensor]) -> TrialState:  # type: ignore[override]
        """Return the state at the start."""
        base = super().init(layout, points)._asdict()
        zero = torch.zeros_like(base["peak"])
        return TrialState(**base, first=zero, mass=zero)

    def __call__(  # type: ignore[override]
        self,
        weights: Mapping[str, Tensor],
        state: TrialState,
        layout: Layout,
        gradients: Sequence[Tensor],
        in_place: bool = False,
        out: Sequence[Tensor] | None = None,
    ) -> tuple[list[Tensor], list[Tensor], TrialState]:
        """Turn Riemannian gradients into updates; see ``BaseAdapter``."""
        step = state.step + 1

        def average_weight(decay: float) -> Tensor:
            return (1 - decay) / (1 - decay**step)

        def means(values: Tensor) -> Tensor:
            return row_means(values[:, : layout.rows], layout)

        energy = cross_means(gradients, gradients, layout)
        before = cross_means(state.momentum, state.momentum, layout)
        product = cross_means(gradients, state.momentum, layout)
        fast = state.fast + average_weight(self.fast_decay) * (energy - state.fast)
        slow = state.slow + average_weight(self.slow_decay) * (energy - state.slow)
        known = means(torch.stack([energy, fast, slow, product, before + FLOOR * energy]))
        turn = cosine(known[3], known[0], known[4])
        peak = torch.maximum(state.peak, known[1])
        first = torch.where(state.first > 0, state.first, known[0])

        decay = torch.full_like(peak, self.momentum_decay)
        times = clock(step)[:, None].expand(3, layout.matrices)
        if self.decays:
            nothing = torch.zeros_like(turn)
            early = [
                nothing,
                log_ratio(known[1], known[2]),
                nothing,
                log_ratio(known[1], peak),
                *times,
                turn,
                state.turn,
            ]
            early = torch.stack([*early, nothing, 0.25 * state.rate])
            raw = weights["decay.bias"] + (weights["decay.skip"][:, None] * early).sum(dim=0)
            decay = torch.sigmoid(raw.clamp(-6.0, 7.0))
        mass = decay * state.mass + (1 - decay)
        newest = layout.per_group((1 - decay) / mass)
        momentum = [m + w[..., None, None] * (r - m) for m, r, w in zip(state.momentum, gradients, newest, strict=True)]
        weight = layout.spread(newest)
        agreement = (1 - weight) * product + weight * energy
        momentum_energy = (1 - weight) * ((1 - weight) * before + weight * product) + weight * agreement
        before = before + FLOOR * energy
        packed = torch.stack([energy, fast, slow, momentum_energy.clamp(min=0), agreement, product, before])
        matrix = means(packed)
        small = 1e-3 * (matrix[0] + TINY).sqrt() * (matrix[3] + TINY).sqrt()
        bend = (matrix[5] - state.along) / (matrix[5].abs() + state.along.abs() + small)
        context = torch.stack(
            [
                log_ratio(matrix[3], matrix[1]),
                log_ratio(matrix[1], matrix[2]),
                log_ratio(matrix[0], matrix[1]),
                log_ratio(matrix[1], peak),
                *times,
                turn,
                state.turn,
                bend,
                0.25 * state.rate,
            ]
        )
        inputs = Inputs(packed[:4], matrix[:4], cosine(product, energy, before)[None], context)
        network = Network(*(weights[name] for name in NETWORK))
        output, hidden, cell = lstm_cell(network, inputs, state.hidden, state.cell, layout, in_place)
        pooled = row_means(output[1:, : layout.rows], layout) + column_means(output[1:, layout.rows :], layout)
        length, rate = ((weights[name][:, None] * context).sum(dim=0) for name in ("length.skip", "rate.skip"))
        change = torch.tanh(rate + pooled[2]) * (RATE / (1 + state.step / self.settling))
        rate = (state.rate + change).clamp(*RATE_BOUNDS)
        mix = torch.sigmoid(weights["mix.bias"] + pooled[1])
        scaled, squares = directions(gradients, momentum, mix, output[0], layout, out)
        length = weights["length.bias"] + length + pooled[0] + rate
        if self.gauges:
            rows = [peak.new_full((n,), d) for n, (d, _) in zip(layout.matrix_counts, layout.sizes, strict=True)]
            gauges = [
                0.5 * torch.log((squares / torch.cat(rows) + TINY) / (peak + TINY)),
                0.5 * torch.log((peak + TINY) / (first + TINY)),
                torch.log(step).expand_as(peak),
                torch.log(mass),
                0.5 * torch.log(1 - self.slow_decay**step).expand_as(peak),
            ]
            length = length + (weights["length.gauge"][:, None] * torch.stack(gauges)).sum(dim=0)
        length = LONGEST * torch.sigmoid(length.clamp(-40.0, 20.0))
        if self.spectral:
            shares = layout.per_group(torch.sigmoid(weights["spectral.bias"] + pooled[3]))
            groups = zip(scaled, layout.per_group(squares), layout.sizes, shares, strict=True)
            mixed = [spectral_direction(*group) for group in groups]
            scaled = [direction for direction, _ in mixed]
            squares = torch.cat([square.reshape(-1) for _, square in mixed])
        factors = [part[..., None, None] for part in layout.per_group(-length / (squares + TINY).sqrt())]
        energies = (fast, slow, peak, first, mass, rate, turn, matrix[4])
        return scaled, factors, TrialState(step, tuple(momentum), *energies, hidden, cell)


VARIANTS: dict[str, BaseAdapter] = {
    "base": BaseAdapter(),
    "gauges": Trial(decays=False),
    "decay": Trial(gauges=False),
    "gauges and decay": Trial(),
}


def row(name: str, seed: int, outer_steps: int) -> str:
    """Meta-train a variant and judge it; return a row of the table."""
    PRESETS[name] = VARIANTS[name]
    settings = TrainSettings(
        training_streams(), name, outer_steps, longest=80, horizon=(40, 1000), warmup=50, seed=seed
    )
    trainer, start = Trainer(settings), time.process_time()
    for _ in trainer.run():
        pass
    taken = time.process_time() - start
    make = partial(sm.SubspaceOptimizer, weights=trainer.theta, preset=name)
    tasks = [task for task in evaluation_suite() if task.row in HARD]
    found = [result for _, result in compare(name, make, tasks) if not isinstance(result, str)]
    comparison = Comparison(name, tuple(found))
    counts = " / ".join(str(comparison.no_worse(step)[0]) for step in STEPS)
    middle, low, high = comparison.speed()
    return f"| {name} | {seed} | {taken:.0f} | {counts} | {middle:.2f} [{low:.2f}, {high:.2f}] |"


def main() -> None:
    """Print the table, a row as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--outer-steps", type=int, default=320)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"| | seed | CPU seconds | no worse, of {len(HARD)}, after {' / '.join(map(str, STEPS))} steps | speed-up |")
    print("|---|---|---|---|---|", flush=True)
    for seed in arguments.seeds:
        for name in arguments.variants:
            print(row(name, seed, arguments.outer_steps), flush=True)


if __name__ == "__main__":
    main()
