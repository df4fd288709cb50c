"""The method, formula by formula: loops over coordinates, float64, one matrix. What every fast path is compared with.

Source: Yu, Wu, Gao, Fan, Jia, "Large-Scale Riemannian Meta-Optimization via Subspace Adaptation", arXiv 2501.15235,
for preset ``paper``; preset ``base`` is described in ``subspace_meta/adapter/base.py``. Nothing is shared with the fast
path but the manifolds' projections, gradients, transports and logarithms: no packing, no groups, no batch, and
retractions by the textbook (Householder QR, SVD). Steps are not shortened here, so the two agree for steps within the
bound of the fast path's retraction. Slow on purpose, and not to be differentiated (SVD).

Notation: R the Riemannian gradient, M its running mean, d rows, p columns; a *coordinate* is a row or a column; l and k
are the row and column scales.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from subspace_meta.manifolds import SPD, Euclidean, Grassmann, Manifold, PolarNewtonSchulz, Stiefel

RATIO_FLOOR = 1e-6
ZERO_GUARD = 1e-30
QUINTIC = ((8.0934, -23.6204, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526))


@dataclass(frozen=True)
class Coordinate:
    """What one row or one column remembers."""

    fast: float = 0.0  # running mean of its energy, short and long
    slow: float = 0.0
    hidden: tuple[Tensor, ...] = ()  # one (H,) vector per LSTM layer; () is zero
    cell: tuple[Tensor, ...] = ()
    maximum: float = -math.inf  # largest output so far (preset paper)


@dataclass(frozen=True)
class ReferenceState:
    """What one matrix remembers between steps; the default is the start."""

    step: int = 0
    budget: int = 0  # how many steps there will be; 0: unknown
    momentum: Tensor | None = None  # (d, p), tangent at the current point
    peak: float = 0.0
    first: float = 0.0  # the first mean energy that was not 0
    mass: float = 0.0  # what the weights of the momentum's mean add up to
    damping: float = 0.0  # what the last step adds to the logit of the momentum's decay
    rate: float = 0.0  # logarithm of the learning rate
    turn: float = 0.0  # cosine of the gradient and the momentum before it
    along: float = 0.0  # mean product of the gradient and the momentum
    noise: float = 0.0  # how much there seems to be
    average: Tensor | None = None  # (d, p), of the iterates, a point; None: none is handed out
    rows: tuple[Coordinate, ...] = field(default=())
    columns: tuple[Coordinate, ...] = field(default=())


def reference_step(
    weights: Mapping[str, Tensor],
    preset: str,
    manifold: Manifold,
    x: Tensor,
    gradient: Tensor,
    state: ReferenceState | None = None,
    steps: int = 0,
    averaging: bool = False,
    **settings: Any,
) -> tuple[Tensor, ReferenceState]:
    """Take one step with one matrix.

    Args:
        weights: the meta-parameters of the preset.
        preset: ``"base"`` or ``"paper"``.
        manifold: where ``x`` lives.
        x: the point, ``(d, p)``.
        gradient: the Euclidean gradient at ``x``, ``(d, p)``.
        state: what the last step returned; ``None`` at the start.
        steps: how many steps there will be, for preset ``"base"``; 0: as the state says.
        averaging: from the start, for preset ``"base"``: averages are handed out.
        settings: settings of the preset's adapter that are not the default, by its names.

    Returns:
        The new point ``(d, p)`` and the new state, in float64.

    Raises:
        ValueError: the preset is unknown, or ``x`` is not one matrix.
    """
    if preset not in ("base", "paper"):
        raise ValueError(f"preset {preset!r} is unknown; there are base, paper")
    if x.ndim != 2:
        raise ValueError(f"the reference takes one matrix (d, p), got shape {tuple(x.shape)}")
    theta = {name: value.double() for name, value in weights.items()}
    x, gradient = x.double(), gradient.double()
    d, p = x.shape
    if state is None:
        state = ReferenceState(momentum=torch.zeros_like(x), rows=(Coordinate(),) * d, columns=(Coordinate(),) * p)
        state = replace(state, average=x.clone() if averaging else None)
    if steps:
        state = replace(state, budget=steps)
    assert state.momentum is not None

    riemannian = manifold.coordinates(x, manifold.riemannian_gradient(x, gradient))
    momentum = manifold.coordinates(x, state.momentum)
    if preset == "base":
        update, state = _base(theta, riemannian, momentum, state, **settings)
    else:
        update, state = _paper(theta, riemannian, momentum, state, **settings)
    assert state.momentum is not None
    y = _retract(manifold, x, manifold.project(x, manifold.from_coordinates(x, update)))
    carried = manifold.transport(x, y, manifold.from_coordinates(x, state.momentum))
    average = state.average
    if average is not None:  # polynomial decay where there is noise, the iterate itself where there is none
        newest = 1 - state.noise + state.noise * 4 / (state.step + 3)
        back = manifold.log(y, average) if isinstance(manifold, SPD) else manifold.project(y, average - y)
        average = _retract(manifold, y, (1 - newest) * back)
    return y, replace(state, momentum=carried, average=average)


def _retract(manifold: Manifold, x: Tensor, tangent: Tensor) -> Tensor:
    """Return X + V on flat space, else its polar factor by SVD or its orthonormal factor with positive diagonal."""
    y = x + tangent
    if isinstance(manifold, Euclidean):
        return y
    if not isinstance(manifold, Stiefel | Grassmann):
        return manifold.retract(x, tangent)
    if isinstance(manifold.retraction, PolarNewtonSchulz):
        left, _, right = torch.linalg.svd(y, full_matrices=False)
        return left @ right
    q, r = torch.linalg.qr(y)
    for j in range(y.shape[1]):
        if r[j, j] < 0:
            q[:, j] = -q[:, j]
    return q


def _base(
    theta: Mapping[str, Tensor],
    gradient: Tensor,
    old_momentum: Tensor,
    state: ReferenceState,
    momentum_decay: float = 0.9,
    fast_decay: float = 0.9,
    slow_decay: float = 0.99,
    settling: float = 30.0,
    spectral: bool = True,
) -> tuple[Tensor, ReferenceState]:
    """Return the update of preset ``base`` and the state, its momentum not yet transported."""
    d, p = gradient.shape
    t = state.step + 1

    # The weight of the newest value in a running mean without Adam's bias towards zero.
    def weight(decay: float) -> float:
        return (1 - decay) / (1 - decay**t)

    # M <- M + w (R - M), the same for a decay that changes: the mass m <- b m + 1 - b stands for 1 - b^t.
    decay = _sigmoid(min(7.0, max(-6.0, float(theta["decay.bias"]) + state.damping))) if momentum_decay else 0.0
    mass = decay * state.mass + (1 - decay)
    momentum = old_momentum + (1 - decay) / mass * (gradient - old_momentum)

    def lines(other: Tensor) -> list[list[tuple[float, float]]]:
        """Return pairs of entries of the gradient and of another matrix, along every row, then along every column."""
        pairs = torch.stack([gradient, other], dim=-1)
        return [[(a, b) for a, b in line] for line in (*pairs.tolist(), *pairs.transpose(0, 1).tolist())]

    # Statistics of each coordinate: means of R*R, M*M and R*M over its entries, the last two also for the momentum
    # before (its mean square bounded below), and two running means of the first.
    after, earlier = lines(momentum), lines(old_momentum)
    energy = [sum(a * a for a, _ in line) / len(line) for line in after]
    momentum_energy = [sum(b * b for _, b in line) / len(line) for line in after]
    agreement = [sum(a * b for a, b in line) / len(line) for line in after]
    product = [sum(a * b for a, b in line) / len(line) for line in earlier]
    before = [sum(b * b + 1e-6 * a * a for a, b in line) / len(line) for line in earlier]
    old = [*state.rows, *state.columns]
    fast = [c.fast + weight(fast_decay) * (e - c.fast) for c, e in zip(old, energy, strict=True)]
    slow = [c.slow + weight(slow_decay) * (e - c.slow) for c, e in zip(old, energy, strict=True)]

    # Of the matrix: means over its rows, and the largest mean of the fast energy so far.
    mean_energy, mean_fast, mean_slow, mean_momentum, mean_agreement, mean_product, mean_before = (
        sum(values[:d]) / d for values in (energy, fast, slow, momentum_energy, agreement, product, before)
    )
    peak = max(state.peak, mean_fast)
    first = state.first if state.first > 0 else mean_energy
    turn = _cosine(mean_product, mean_energy, mean_before)
    small = 1e-3 * math.sqrt(mean_energy + ZERO_GUARD) * math.sqrt(mean_momentum + ZERO_GUARD)
    bend = (mean_product - state.along) / (abs(mean_product) + abs(state.along) + small)
    # Of a run of known length: the share that is left, of one step at the least.
    left, budget = 1.0, [0.0] * 4
    if state.budget:
        left = max(state.budget - state.step, 1) / state.budget
        budget = [1.0, 1 - left, math.log(left) / 4, math.log10(state.budget / 100) / 2]
    context = [
        _log_ratio(mean_momentum, mean_fast),
        _log_ratio(mean_fast, mean_slow),
        _log_ratio(mean_energy, mean_fast),
        _log_ratio(mean_fast, peak),
        math.tanh(t / 10 - 1),
        math.tanh(t / 100 - 1),
        math.tanh(t / 1000 - 1),
        turn,
        state.turn,
        bend,
        state.rate / 4,
        *budget,
    ]
    # How much noise there seems to be: from these and from what the network remembered before.
    evidence = float(theta["noise.bias"]) + sum(
        w * c for w, c in zip(theta["noise.skip"].tolist(), context, strict=True)
    )
    for side, of_side in enumerate((state.rows, state.columns)):
        remembered = [float(theta["noise.hidden"][side] @ c.hidden[0]) for c in of_side if c.hidden]
        evidence += sum(remembered) / len(of_side)
    noise = _sigmoid(10 * evidence)
    context.append(noise)

    scales, outputs, coordinates = [], [], []
    for n in range(d + p):
        side, head = (0, slice(0, 5)) if n < d else (1, slice(5, 10))
        relative = [
            _log_ratio(energy[n], mean_energy),
            _log_ratio(fast[n], mean_fast),
            _log_ratio(slow[n], mean_slow),
            _log_ratio(momentum_energy[n], mean_momentum),
        ]
        cosine = _cosine(product[n], energy[n], before[n])
        features = [*relative, cosine, *context, 1.0 if side == 0 else -1.0]
        hidden, cell = _lstm(theta, "lstm", "", torch.tensor(features, dtype=torch.float64), old[n], 0)
        output = (theta["head.weight"][head] @ hidden + theta["head.bias"][head, 0]).tolist()
        scales.append(output[0] + sum(w * f for w, f in zip(theta["scale.skip"][side].tolist(), relative, strict=True)))
        outputs.append(output)
        coordinates.append(Coordinate(fast[n], slow[n], (hidden,), (cell,)))

    # The other outputs speak for the matrix: how far to go, how much momentum to take, how to change the rate, and how
    # much of the orthonormal factor to take.
    def pooled(k: int) -> float:
        return sum(o[k] for o in outputs[:d]) / d + sum(o[k] for o in outputs[d:]) / p

    def skipped(name: str) -> float:
        return sum(w * c for w, c in zip(theta[name].tolist(), context, strict=True))

    change = 0.7 * math.tanh(skipped("rate.skip") + pooled(3)) / (1 + state.step / settling)
    rate = min(5.0, max(-14.0, state.rate + change))
    damping = skipped("decay.skip") if momentum_decay else 0.0
    mix = _sigmoid(float(theta["mix.bias"]) + pooled(2)) if momentum_decay else 0.0
    share = _sigmoid(float(theta["spectral.bias"]) + pooled(4)) if spectral else 0.0

    # D = diag(l) ((1-a) R + a M) diag(k), mixed with its orthonormal factor, the columns of both of root mean square
    # length 1, and brought to that length again; the update is -eta D.
    direction = torch.zeros_like(gradient)
    for i in range(d):
        for j in range(p):
            mixed = (1 - mix) * float(gradient[i, j]) + mix * float(momentum[i, j])
            direction[i, j] = math.exp(scales[i]) * mixed * math.exp(scales[d + j])

    # The length follows powers of what has no bound: the direction's size, the gradient's largest, time, the masses.
    def half_log(numerator: float, denominator: float) -> float:
        return 0.5 * math.log((numerator + ZERO_GUARD) / (denominator + ZERO_GUARD))

    # Of a size ten decades below the largest gradient it points nowhere any more, and shrinks.
    size, spent = float(direction.square().sum()) / p, 1e-20 * d * peak
    missing = spent / (size + spent + ZERO_GUARD)
    gauges = [
        half_log((size + spent) / d, peak),
        half_log(peak, first),
        math.log(t),
        math.log(mass) if momentum_decay else 0.0,
        0.5 * math.log(1 - slow_decay**t),
        math.log(left),
        noise * math.log(t),
    ]
    powers = sum(w * g for w, g in zip(theta["length.gauge"].tolist(), gauges, strict=True))
    length = 4.0 * _sigmoid(float(theta["length.bias"]) + skipped("length.skip") + pooled(1) + rate + powers)
    direction = _unit(direction, spent)
    direction = _unit((1 - share) * direction + share * _unit(_orthonormal(direction)), missing)
    rows, columns = tuple(coordinates[:d]), tuple(coordinates[d:])
    of_matrix = (peak, first, mass, damping, rate, turn, mean_agreement, noise, state.average)
    return -length * direction, ReferenceState(t, state.budget, momentum, *of_matrix, rows, columns)


def _unit(direction: Tensor, more: float = 0.0) -> Tensor:
    """Return the direction with columns of root mean square length 1, shorter where ``more`` is not negligible."""
    return direction / math.sqrt(float(direction.square().sum()) / direction.shape[1] + more + ZERO_GUARD)


def _orthonormal(direction: Tensor) -> Tensor:
    """Return the direction with its singular values s, relative to its norm, sent towards 1 by three quintic steps."""
    left, values, right = torch.linalg.svd(direction, full_matrices=False)
    values = values / math.sqrt(float(values.square().sum()) + ZERO_GUARD)
    for a, b, c in QUINTIC:
        values = a * values + b * values**3 + c * values**5
    return left @ torch.diag(values) @ right


def _paper(
    theta: Mapping[str, Tensor],
    gradient: Tensor,
    momentum: Tensor,
    state: ReferenceState,
    step_size: float = 1e-2,
    mean_statistics: float = False,
) -> tuple[Tensor, ReferenceState]:
    """Return the update of preset ``paper`` and the state. There is no momentum: it stays zero."""
    d, p = gradient.shape
    scaled = (step_size * gradient).tolist()
    lines = [[scaled[i][j] for j in range(p)] for i in range(d)] + [[scaled[i][j] for i in range(d)] for j in range(p)]
    old = [*state.rows, *state.columns]

    raw, hiddens, cells = [], [], []
    for n, line in enumerate(lines):
        statistic = sum(a * a for a in line) / (len(line) if mean_statistics else 1)
        feature = min(1.0, max(-1.0, math.log(statistic + ZERO_GUARD) / 10))
        x = torch.tensor([feature], dtype=torch.float64)
        hidden0, cell0 = _lstm(theta, "lstm0", "lstm0.hidden_bias", x, old[n], 0)
        hidden1, cell1 = _lstm(theta, "lstm1", "lstm1.hidden_bias", hidden0, old[n], 1)
        head = "row_head" if n < d else "column_head"
        raw.append(float(theta[f"{head}.weight"][0] @ hidden1 + theta[f"{head}.bias"][0, 0]))
        hiddens.append((hidden0, hidden1))
        cells.append((cell0, cell1))

    # l <- l - mean(l) + 1, rows and columns apart, then the running maximum over time.
    centred = [o - sum(raw[:d]) / d + 1 for o in raw[:d]] + [o - sum(raw[d:]) / p + 1 for o in raw[d:]]
    maxima = [max(c.maximum, o) for c, o in zip(old, centred, strict=True)]
    update = torch.zeros_like(gradient)
    for i in range(d):
        for j in range(p):
            update[i, j] = -maxima[i] * scaled[i][j] * maxima[d + j]
    coordinates = [Coordinate(hidden=h, cell=c, maximum=top) for h, c, top in zip(hiddens, cells, maxima, strict=True)]
    rows, columns = tuple(coordinates[:d]), tuple(coordinates[d:])
    return update, ReferenceState(state.step + 1, momentum=momentum, rows=rows, columns=columns)


def _lstm(
    theta: Mapping[str, Tensor], name: str, second_bias: str, x: Tensor, old: Coordinate, layer: int
) -> tuple[Tensor, Tensor]:
    """Return hidden and cell, ``(H,)`` each, of one coordinate after one LSTM layer.

    Gates lie in the order input, forget, candidate, output.
    """
    units = theta[f"{name}.weight"].shape[0] // 4
    zero = torch.zeros(units, dtype=torch.float64)
    hidden, cell = (old.hidden[layer], old.cell[layer]) if old.hidden else (zero, zero)
    gates = theta[f"{name}.weight"] @ torch.cat([x, hidden]) + theta[f"{name}.bias"][:, 0]
    if second_bias:
        gates = gates + theta[second_bias][:, 0]
    new_cell, new_hidden = [], []
    for unit in range(units):
        enter, forget, candidate, leave = (float(gates[gate * units + unit]) for gate in range(4))
        c = _sigmoid(forget) * float(cell[unit]) + _sigmoid(enter) * math.tanh(candidate)
        new_cell.append(c)
        new_hidden.append(_sigmoid(leave) * math.tanh(c))
    return torch.tensor(new_hidden, dtype=torch.float64), torch.tensor(new_cell, dtype=torch.float64)


def _log_ratio(numerator: float, denominator: float) -> float:
    """Return half the logarithm of a ratio of energies, bounded from below."""
    return 0.5 * math.log(numerator / (denominator + ZERO_GUARD) + RATIO_FLOOR)


def _cosine(product: float, energy_a: float, energy_b: float) -> float:
    """Return the cosine of two vectors from their mean product and mean squares."""
    return product / (math.sqrt(energy_a + ZERO_GUARD) * math.sqrt(energy_b + ZERO_GUARD))


def _sigmoid(value: float) -> float:
    """Return 1 / (1 + exp(-value)) without overflow."""
    return 0.5 * (1.0 + math.tanh(0.5 * value))
