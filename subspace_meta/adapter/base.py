"""The adapter of preset ``base``: from a Riemannian gradient and its momentum to a direction of chosen length.

    statistics   row and column means of R*R, M*M and R*M (M: momentum), two running averages of the first
    features     their ratios to the matrix mean, to each other, and to the largest mean seen so far; time; the cosine
                 of R and the momentum before it, now and a step ago; how far R fell along the momentum; the rate;
                 what share of the steps is done, where their number is known; how much noise there seems to be
    noise        a number from 0 to 1 for each matrix, a steep sigmoid of the matrix's other features and of what the
                 network remembers
    average      where one is handed out: after each step to X, Y <- Retr_X(s P_X(Y - X)), s = noise (t - 1)/(t + 3): X
                 itself where there is no noise, otherwise it looks back over a quarter of the steps; on SPD with the
                 logarithm for P_X(Y - X)
    network      one LSTM over all coordinates, a head for rows and a head for columns
    momentum     M <- M + w (R - M), the running mean with a decay for each matrix and step, the sigmoid of a weighted
                 sum of the matrix's features in the step before
    direction    D = diag(l) ((1-a) R + a M) diag(k), mixed with its orthonormal factor; columns of length 1 on average
    rate         one number rho a matrix, the logarithm of a learning rate: each step changes it by at most
                 RATE / (1 + t/settling), so within a doubling of the time by a bounded factor, at any age
    gauges       logarithms without a floor: of |D| over the largest size of R so far, of that over the first, of t,
                 of the momentum's and of the slow mean's mass (1 - decay^t for a constant decay), of the share of
                 steps that is left where their number is known, of t to the power of the noise
    length       each column moves by eta in (0, LONGEST) on average: the update is -eta D with
                 eta = LONGEST sigmoid(... + rho + powers of the gauges)

l, k come from the coordinate's own output; eta, rho, a and the share of the orthonormal factor from means of outputs
over a matrix: so the map (R, M) -> D is equivariant to permutations of rows and of columns, unchanged by duplication,
and the same weights serve every size. Multiplying all gradients by a constant changes nothing. Beyond arXiv 2501.15235
are the relative features, momentum, the learned length and rate, the orthonormal factor and the normalisation;
row/column statistics and per-coordinate scales are its idea.

The powers of the gauges put hand-made optimizers into the family: with a silent network (1, 1, 0, 1, 0) is gradient
descent with momentum, (1, 0, -1/2, 0, -1) with the exponents of RASA is RASA-LR with a/sqrt(t), and 0 with the
orthonormal factor alone is spectral descent with steps of one length (tests/adapter/test_family.py).

Cost a step: one pass over R and M for momentum and statistics, one for the scaling, 8 H (F + H) flops a coordinate for
the network, and what ``subspace_meta.adapter.spectral`` says.
"""

from __future__ import annotations

import math
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

from subspace_meta.adapter.features import FLOOR, TINY, budget, clock, cosine, log_ratio, unbounded_log_ratio
from subspace_meta.adapter.network import Weights, device_of, init_lstm, lstm_shapes
from subspace_meta.adapter.spectral import spectral_direction

COORDINATE_FEATURES = 5  # log energies relative to the matrix: gradient, fast, slow, momentum; cosine of R and old M
# momentum/fast, fast/slow, gradient/fast, fast/peak; three of time; turn, last turn, bend; rate; four of the budget
CONTEXT_FEATURES = 16  # and the noise
BUDGET_FEATURES = slice(11, 15)  # of these
FEATURES = COORDINATE_FEATURES + CONTEXT_FEATURES + 1  # and +1 on rows, -1 on columns
OUTPUTS = 5  # log scale; over a matrix: length, mix, rate, share of the orthonormal factor
GAUGES = 7  # direction/peak, peak/first, t, masses of momentum and slow mean, share of steps left, t^noise

LONGEST = 4.0  # the mean column motion of a step is shorter
NOISE_SLOPE = 10.0  # of the sigmoid: noise is there or not, and a step of Adam is to matter
AVERAGE_POWER = 3.0  # of the polynomial decay of averages (Shamir and Zhang, ICML 2013)
RATE = 0.7  # largest change of the log rate in one early step
RATE_BOUNDS = (-14.0, 5.0)
SPENT = 1e-20  # energy of a direction, relative to the gradient's largest, below which it points nowhere any more
DECAY_BOUNDS = (-6.0, 7.0)  # of its logit: a decay from 0.0025 to 0.9991

NETWORK = ("lstm.weight", "lstm.bias", "head.weight", "head.bias", "scale.skip")  # the fields of Network, in order


class BaseState(NamedTuple):
    """State of the adapter; N coordinates of B matrices, H hidden units."""

    step: Tensor  # scalar
    budget: Tensor  # scalar, how many steps there will be; 0: unknown
    momentum: tuple[Tensor, ...]  # per group (..., d, p), tangent at the current point; empty without momentum
    fast: Tensor  # (N,) running mean of the row and column energies
    slow: Tensor  # (N,)
    peak: Tensor  # (B,), largest mean energy of each matrix so far
    first: Tensor  # (B,), the first mean energy that was not 0
    mass: Tensor  # (B,), what the weights of the momentum's mean add up to
    damping: Tensor  # (B,), what the last step adds to the logit of the momentum's decay
    rate: Tensor  # (B,), logarithm of the learning rate
    turn: Tensor  # (B,), last cosine of gradient and momentum before it
    along: Tensor  # (B,), last mean product of gradient and momentum
    noise: Tensor  # (B,), how much there seems to be, from 0 to 1
    average: tuple[Tensor, ...]  # per group (..., d, p), of the iterates, a point; empty where none is handed out
    hidden: Tensor  # (H, N)
    cell: Tensor  # (H, N)


@dataclass(frozen=True)
class BaseAdapter:
    """Settings of the adapter; the meta-parameters are an argument of each call.

    Attributes:
        hidden: hidden units of the LSTM.
        momentum_decay: decay of the momentum at the start of meta-training; 0: the momentum is the gradient itself, and
            there is no buffer.
        fast_decay, slow_decay: decays of the two running means of the energies.
        settling: number of steps after which the rate changes at half the speed.
        spectral: mix directions with their orthonormal factors.
    """

    hidden: int = 20
    momentum_decay: float = 0.9
    fast_decay: float = 0.9
    slow_decay: float = 0.99
    settling: float = 30.0
    spectral: bool = True

    @property
    def name(self) -> str:
        """The preset this is, or is a variant of: ``light`` has no momentum."""
        return "base" if self.momentum_decay else "light"

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the names and shapes of the meta-parameters."""
        shapes: dict[str, tuple[int, ...]] = {
            **lstm_shapes("lstm", FEATURES, self.hidden),
            "head.weight": (2 * OUTPUTS, self.hidden),  # the outputs for rows, then those for columns
            "head.bias": (2 * OUTPUTS, 1),
            "scale.skip": (2, 4),
            "length.skip": (CONTEXT_FEATURES,),
            "length.gauge": (GAUGES,),
            "length.bias": (),
            "rate.skip": (CONTEXT_FEATURES,),
            "noise.skip": (CONTEXT_FEATURES - 1,),
            "noise.hidden": (2, self.hidden),  # for rows and for columns
            "noise.bias": (),
        }
        if self.momentum_decay:
            shapes.update({"mix.bias": (), "decay.skip": (CONTEXT_FEATURES,), "decay.bias": ()})
        if self.spectral:
            shapes.update({"spectral.bias": ()})
        return shapes

    def init_weights(self, generator: torch.Generator | None = None) -> Weights:
        """Draw meta-parameters that start as RASA-LR with momentum and steps of a tenth of a radian.

        The heads are zero, so the network is silent at first; ``scale.skip`` gives the RASA exponents. The rate rises
        while gradients agree with the momentum, and falls while they oppose it.
        """
        device = device_of(generator)
        weights = {name: torch.zeros(shape, device=device) for name, shape in self.weight_shapes().items()}
        weights.update(init_lstm("lstm", FEATURES, self.hidden, generator))
        weights["scale.skip"][:, 2] = -0.5  # half of a log energy: diag(L)^(-1/4) R diag(C)^(-1/4)
        weights["length.gauge"][0] = 0.95  # shorten the step as the gradient shrinks
        weights["length.gauge"][5] = 0.7  # and towards the end, if it is known
        weights["rate.skip"][7] = 0.2
        weights["length.bias"] -= 3.5
        weights["noise.bias"] -= 0.2
        if self.spectral:
            weights["spectral.bias"] -= 2.0
        if self.momentum_decay:
            weights["mix.bias"] += 1.0
            weights["decay.bias"] += math.log(self.momentum_decay / (1 - self.momentum_decay))
        return weights

    def init(self, layout: Layout, points: Sequence[Tensor], averaging: bool = False) -> BaseState:
        """Return the state at the start, for points of the layout's shapes; with averages, if they are wanted."""
        like = points[0]
        coordinates = layout.rows + layout.columns
        return BaseState(
            step=like.new_zeros(()),
            budget=like.new_zeros(()),
            momentum=tuple(torch.zeros_like(x) for x in points) if self.momentum_decay else (),
            fast=like.new_zeros(coordinates),
            slow=like.new_zeros(coordinates),
            peak=like.new_zeros(layout.matrices),
            first=like.new_zeros(layout.matrices),
            mass=like.new_zeros(layout.matrices),
            damping=like.new_zeros(layout.matrices),
            rate=like.new_zeros(layout.matrices),
            turn=like.new_zeros(layout.matrices),
            along=like.new_zeros(layout.matrices),
            noise=like.new_zeros(layout.matrices),
            average=tuple(x.clone() for x in points) if averaging else (),
            hidden=like.new_zeros(self.hidden, coordinates),
            cell=like.new_zeros(self.hidden, coordinates),
        )

    def buffers(self, state: BaseState) -> tuple[Tensor, ...]:
        """Return the tangent tensors that the optimizer has to transport, one per group."""
        return state.momentum

    def with_buffers(self, state: BaseState, buffers: Sequence[Tensor]) -> BaseState:
        """Return the state with transported tangent tensors."""
        return state._replace(momentum=tuple(buffers))

    def with_budget(self, state: BaseState, steps: int | Tensor) -> BaseState:
        """Return the state of a run that is to have so many steps."""
        return state._replace(budget=torch.as_tensor(steps, dtype=state.step.dtype, device=state.step.device))

    def sees_budget(self, weights: Mapping[str, Tensor]) -> bool:
        """Return whether the number of steps, told by :meth:`with_budget`, changes anything with these weights.

        Those that were trained before it was a feature have zeros in its places.
        """
        inputs = weights["lstm.weight"][:, COORDINATE_FEATURES:][:, BUDGET_FEATURES]
        names = ("length.skip", "rate.skip", "decay.skip", "noise.skip")
        skips = [weights[name][BUDGET_FEATURES] for name in names if name in weights]
        return any(bool(used.any()) for used in (inputs, *skips, weights["length.gauge"][5]))

    def kept_share(self, state: BaseState) -> Tensor:
        """Return how much of the average before a step stays in the one after it, ``(B,)``.

        Where there is noise, polynomial decay (Shamir and Zhang, ICML 2013, section 4); nothing where there is none.
        """
        return state.noise * (state.step - 1) / (state.step + AVERAGE_POWER)

    def sees_noise(self, weights: Mapping[str, Tensor]) -> bool:
        """Return whether averages are anything else than the iterates with these weights.

        Those that were trained without averages say that there is no noise, whatever they see.
        """
        seen = weights["noise.skip"].any() | weights["noise.hidden"].any()
        return bool(seen | (weights["noise.bias"] > -0.5))

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
        mass = state.mass
        if self.momentum_decay:
            decay = torch.sigmoid((weights["decay.bias"] + state.damping).clamp(*DECAY_BOUNDS))
            mass = decay * state.mass + (1 - decay)
            each = (1 - decay) / mass
            momentum, means = moments(gradients, state.momentum, each, layout, in_place)
            weight = layout.spread(layout.per_group(each))
            energy, before, product = means
            # Those of R * M' and M' * M', with M' = (1-w) M + w R; the second is not negative but for rounding.
            agreement = (1 - weight) * product + weight * energy
            momentum_energy = (1 - weight) * ((1 - weight) * before + weight * product) + weight * agreement
            momentum_energy = momentum_energy.clamp(min=0)
            before = before + FLOOR * energy  # a momentum a thousand times smaller than the gradient has no direction
        else:
            energy = momentum_energy = cross_means(gradients, gradients, layout)
            agreement = product = before = torch.zeros_like(energy)
        fast = state.fast + average_weight(self.fast_decay) * (energy - state.fast)
        slow = state.slow + average_weight(self.slow_decay) * (energy - state.slow)

        packed = torch.stack([energy, fast, slow, momentum_energy, agreement, product, before])
        matrix = row_means(packed[:, : layout.rows], layout)  # (7, B): means over a matrix are means over its rows
        peak = torch.maximum(state.peak, matrix[1])
        first = torch.where(state.first > 0, state.first, matrix[0])
        turn = cosine(matrix[5], matrix[0], matrix[6])
        # R fell from <R_{t-1}, M> to <R_t, M> along M: the secant's view of the curvature.
        small = 1e-3 * (matrix[0] + TINY).sqrt() * (matrix[3] + TINY).sqrt()
        bend = (matrix[5] - state.along) / (matrix[5].abs() + state.along.abs() + small)
        share_done, log_left = budget(state.step, state.budget)
        seen = torch.stack(
            [
                log_ratio(matrix[3], matrix[1]),
                log_ratio(matrix[1], matrix[2]),
                log_ratio(matrix[0], matrix[1]),
                log_ratio(matrix[1], peak),
                *clock(step)[:, None].expand(3, layout.matrices),
                turn,
                state.turn,
                bend,
                0.25 * state.rate,
                *share_done[:, None].expand(len(share_done), layout.matrices),
            ]
        )
        noise = self._noise(weights, state, seen, layout)
        context = torch.cat([seen, noise[None]])
        inputs = Inputs(packed[:4], matrix[:4], cosine(product, energy, before)[None], context)
        network = Network(*(weights[name] for name in NETWORK))
        output, hidden, cell = lstm_cell(network, inputs, state.hidden, state.cell, layout, in_place)
        # Outputs beside the scales are pooled over each matrix.
        pooled = row_means(output[1:, : layout.rows], layout) + column_means(output[1:, layout.rows :], layout)

        def skip(name: str) -> Tensor:
            return (weights[name][:, None] * context).sum(dim=0)

        change = torch.tanh(skip("rate.skip") + pooled[2]) * (RATE / (1 + state.step / self.settling))
        rate = (state.rate + change).clamp(*RATE_BOUNDS)
        mix = torch.sigmoid(weights["mix.bias"] + pooled[1]) if momentum else None
        scaled, squares = directions(gradients, momentum, mix, output[0], layout, out)
        # What momentum is left where the gradient has become 0 would be followed for ever, and its direction has a
        # derivative without a bound.
        rows = self._rows(layout, squares)
        spent = SPENT * rows * peak
        missing = spent / (squares + spent + TINY)
        squares = squares + spent
        gauges = torch.stack(
            [
                unbounded_log_ratio(squares / rows, peak),
                unbounded_log_ratio(peak, first),
                torch.log(step).expand_as(peak),
                torch.log(mass) if momentum else torch.zeros_like(peak),
                0.5 * torch.log(1 - self.slow_decay**step).expand_as(peak),
                log_left.expand_as(peak),
                noise * torch.log(step),
            ]
        )
        powers = (weights["length.gauge"][:, None] * gauges).sum(dim=0)
        length = LONGEST * torch.sigmoid(weights["length.bias"] + skip("length.skip") + pooled[0] + rate + powers)
        if self.spectral:
            shares = layout.per_group(torch.sigmoid(weights["spectral.bias"] + pooled[3]))
            groups = zip(scaled, layout.per_group(squares), layout.sizes, shares, strict=True)
            mixed = [spectral_direction(*group) for group in groups]
            scaled = [direction for direction, _ in mixed]
            squares = torch.cat([square.reshape(-1) for _, square in mixed]) + missing
        factors: list[Tensor | float] = [
            part[..., None, None] for part in layout.per_group(-length / (squares + TINY).sqrt())
        ]
        damping = skip("decay.skip") if momentum else state.damping
        of_matrices = (peak, first, mass, damping, rate, turn, matrix[4], noise)
        kept = (*of_matrices, state.average, hidden, cell)
        return scaled, factors, BaseState(step, state.budget, tuple(momentum), fast, slow, *kept)

    @staticmethod
    def _noise(weights: Mapping[str, Tensor], state: BaseState, seen: Tensor, layout: Layout) -> Tensor:
        """Return how much noise there seems to be in each matrix, ``(B,)``; the network's memory is a step old."""
        memory = row_means(state.hidden[:, : layout.rows], layout), column_means(state.hidden[:, layout.rows :], layout)
        evidence = weights["noise.bias"] + (weights["noise.skip"][:, None] * seen).sum(dim=0)
        for weight, mean in zip(weights["noise.hidden"], memory, strict=True):
            evidence = evidence + (weight[:, None] * mean).sum(dim=0)
        return torch.sigmoid(NOISE_SLOPE * evidence)

    @staticmethod
    def _rows(layout: Layout, like: Tensor) -> Tensor:
        """Return the number of rows of each matrix, ``(B,)``."""
        rows = [like.new_full((count,), d) for count, (d, _) in zip(layout.matrix_counts, layout.sizes, strict=True)]
        return torch.cat(rows)
