"""Two sets of variables, or one at two moments: slow features, partial least squares, canonical correlations.

*Slow features.* minimise tr (X^T B X)^{-1} X^T A X over Gr(d, p), A the second moment of a sequence's differences and B
that of its values: the subspace of the p smallest generalised eigenvalues. Sources: Wiskott and Sejnowski, "Slow
feature analysis: unsupervised learning of invariances", Neural Computation 14 (2002); the generalised Rayleigh
quotient: Absil, Mahony, Sepulchre, "Optimization Algorithms on Matrix Manifolds", 2008, section 2.1.

*Partial least squares.* maximise tr U^T E[a b^T] V over St(d, p) x St(n, p), by singular values. Source: Wegelin, "A
survey of partial least squares (PLS) methods, with emphasis on the two-block case", 2000.

*Canonical correlations.* maximise tr U^T K V N, N = diag(p, ..., 1), for the whitened cross-covariance K of a
sequence's past and future: the canonical variates themselves, in order. Source: Larimore, "Canonical variate analysis
in identification, filtering, and adaptive control", CDC 1990.

All reference values are sums of eigenvalues or singular values, computed in float64.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from subspace_meta.geometry import Geometry, Params
from subspace_meta.manifolds import Grassmann, Stiefel, StiefelCanonical
from subspace_meta.tasks.base import Batch, Data, Problem, TaskFamily, draw_rows, once_per_task, repeat
from subspace_meta.tasks.images import photographs

PATCH = 8


def subspace_sine(x: Tensor, solution: Tensor) -> Tensor:
    """Return the root mean square sine of the angles between the spans of two orthonormal ``(d, p)`` matrices."""
    return (solution - x @ (x.mT @ solution)).square().sum().sqrt() / solution.shape[-1] ** 0.5


def slowness(params: Params, batch: Batch) -> Tensor:
    """Return tr (X^T B X)^{-1} X^T A X / p."""
    x = params["x"]
    factor = torch.linalg.cholesky_ex(x.mT @ batch["values"] @ x).L
    return torch.cholesky_solve(x.mT @ batch["differences"] @ x, factor).diagonal().mean()


def slow_subspace_error(params: Params, data: Data) -> Tensor:
    """Return the root mean square sine of the angles to the slowest subspace."""
    return subspace_sine(params["x"], data["solution"])


@functools.cache
def slow_features_problem(d: int, p: int) -> Problem:
    """Return the problem of one size."""
    geometry = Geometry.from_rules({"x": torch.empty(d, p, device="meta")}, {"x": Grassmann()})
    return Problem(geometry, slowness, slowness, slow_subspace_error)


@dataclass(frozen=True)
class SlowFeatures(TaskFamily):
    """The p slowest directions of a mixture of d first-order autoregressive sequences.

    Their slowness, the mean square difference over the variance, spreads from ``slowest`` to 2, white noise; the
    singular values of the mixing spread over a factor of ``condition``. The metric is the root mean square sine of the
    angles to the slowest subspace of the sequence.
    """

    d: int
    p: int
    length: int = 2000
    slowest: float = 0.02
    condition: float = 5.0

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name with the size."""
        return f"slow features {self.d}x{self.p}"

    @property
    def problem(self) -> Problem:  # type: ignore[override]
        """The problem of this size."""
        return slow_features_problem(self.d, self.p)

    def draw(self, generator: torch.Generator, count: int) -> Data:
        """Draw sequences, and solve the generalised eigenvalue problem."""
        decay = 1.0 - 0.5 * self.slowest * (2.0 / self.slowest) ** torch.linspace(0.0, 1.0, self.d).double()
        noise = torch.randn(self.length, count, self.d, generator=generator, dtype=torch.float64)
        states = [noise[0]]
        for shock in noise[1:]:
            states.append(decay * states[-1] + (1.0 - decay.square()).sqrt() * shock)
        left, right = (Stiefel().random_point((count, self.d, self.d), generator, torch.float64) for _ in range(2))
        mixing = (left * self.condition ** -torch.linspace(0.0, 1.0, self.d).double()) @ right.mT
        z = torch.stack(states, dim=1) @ mixing.mT
        z = z - z.mean(dim=1, keepdim=True)
        differences = z.diff(dim=1)
        values = z.mT @ z / self.length
        moment = differences.mT @ differences / (self.length - 1)
        factor = torch.linalg.cholesky(values)
        half = torch.linalg.solve_triangular(factor, moment, upper=False)
        spectrum, vectors = torch.linalg.eigh(torch.linalg.solve_triangular(factor, half.mT, upper=False))
        slow = torch.linalg.solve_triangular(factor.mT, vectors[..., : self.p], upper=True)
        scale = values.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[:, None, None]  # both moments alike: it cancels
        return {
            "values": (values / scale).float(),
            "differences": (moment / scale).float(),
            "solution": torch.linalg.qr(slow)[0].float(),
            "reference": spectrum[:, : self.p].mean(dim=-1).float(),
        }

    def sample(self, data: Data, generator: torch.Generator, steps: int) -> Batch:
        """Return the moments at every step."""
        return repeat(data, ("values", "differences"), steps)


@functools.cache
def stereo_patches() -> tuple[Tensor, Tensor]:
    """Return patches ``(n, 64)`` of the left image of a stereo pair, and of the right one where it shows the same.

    Grey, without their means, of unit variance; where the disparity is known. The pair is the motorcycle of the
    Middlebury benchmark (Scharstein et al., "High-resolution stereo datasets with subpixel-accurate ground truth",
    GCPR 2014), which scikit-image ships.
    """
    left, right, disparity = photographs("stereo_motorcycle")
    grey = [image.mean(dim=-1) for image in (left, right)]
    rows = torch.arange(0, left.shape[0] - PATCH, 6)[:, None]
    columns = torch.arange(64, left.shape[1] - PATCH, 6)[None, :]
    moved = disparity[rows + PATCH // 2, columns + PATCH // 2]
    known = moved.isfinite()
    shift = torch.where(known, moved, 0.0).round().long()
    offsets = torch.arange(PATCH)

    def cut(image: Tensor, first: Tensor) -> Tensor:
        patches = image[rows[..., None, None] + offsets[:, None], first[..., None, None] + offsets]
        flat = patches.flatten(2)[known]
        flat = flat - flat.mean(dim=1, keepdim=True)
        flat = flat - flat.mean(dim=0)
        return (flat / flat.square().mean().sqrt()).float()

    return cut(grey[0], columns), cut(grey[1], columns - shift)


def negative_covariance(params: Params, batch: Batch) -> Tensor:
    """Return -tr U^T E[a b^T] V over its largest value, for samples ``a`` ``(B, d)`` and ``b`` ``(B, n)``."""
    along = (batch["a"] @ params["u"]) * (batch["b"] @ params["v"])
    return -(along * batch["scale"].unsqueeze(-1)).sum() / along.shape[0]


def negative_covariance_of_all(params: Params, data: Data) -> Tensor:
    """Return -tr U^T C V over its largest value."""
    return -(params["u"] * (data["cross"] @ params["v"])).sum()


def left_subspace_error(params: Params, data: Data) -> Tensor:
    """Return the root mean square sine of the angles between U and the best subspace."""
    return subspace_sine(params["u"], data["solution"])


@functools.cache
def least_squares_problem(d: int, n: int, p: int) -> Problem:
    """Return the problem of one size."""
    geometry = Geometry.from_rules(
        {"u": torch.empty(d, p, device="meta"), "v": torch.empty(n, p, device="meta")}, {"u": Stiefel(), "v": Stiefel()}
    )
    return Problem(geometry, negative_covariance, negative_covariance_of_all, left_subspace_error)


@functools.cache
def _stereo_data(p: int) -> Data:
    """Return the entries of the one task."""
    a, b = stereo_patches()
    cross = a.double().mT @ b.double() / len(a)
    left, values, _ = torch.linalg.svd(cross)
    scale = 1.0 / values[:p].sum()
    return {
        "a": a,
        "b": b,
        "scale": scale.float().expand(len(a)),
        "cross": (scale * cross).float(),
        "solution": left[:, :p].float(),
        "reference": torch.tensor(-1.0),
    }


@dataclass(frozen=True)
class StereoLeastSquares(TaskFamily):
    """Partial least squares of corresponding patches of a stereo pair; mini-batches are pairs of patches.

    Scaled by the sum of the p largest singular values, so that the reference is -1. The metric is the root mean square
    sine of the angles to the best subspace of the left patches.
    """

    p: int
    batch_size: int = 64

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name with the size."""
        return f"partial least squares of stereo patches {PATCH**2}x{self.p}, {PATCH**2}x{self.p}"

    @property
    def problem(self) -> Problem:  # type: ignore[override]
        """The problem of this size."""
        return least_squares_problem(PATCH**2, PATCH**2, self.p)

    def draw(self, generator: torch.Generator, count: int) -> Data:
        """Return the patches, once a task."""
        return once_per_task(_stereo_data(self.p), count)

    def sample(self, data: Data, generator: torch.Generator, steps: int) -> Batch:
        """Draw pairs of patches, with replacement."""
        return draw_rows(data, ("a", "b", "scale"), self.batch_size, generator, steps)

    def measured(self, data: Data) -> Data:
        """Return cross-covariance and solution."""
        return {name: data[name] for name in ("cross", "solution", "reference")}


def ordered_correlation(params: Params, batch: Batch) -> Tensor:
    """Return -tr U^T K V N, N = diag(p, ..., 1), over what the singular values of K allow."""
    u, v = params["u"], params["v"]
    weights = torch.arange(u.shape[-1], 0, -1, dtype=u.dtype, device=u.device)
    return -((u * (batch["cross"] @ v)).sum(dim=-2) * weights).sum()


def variate_error(params: Params, data: Data) -> Tensor:
    """Return the mean of 1 - (u_i^T l_i)^2 over the columns, for the left singular vectors l_i."""
    return (1.0 - (params["u"] * data["solution"]).sum(dim=0).square()).mean()


@functools.cache
def canonical_variates_problem(d: int, p: int) -> Problem:
    """Return the problem of one size."""
    shapes = {name: torch.empty(d, p, device="meta") for name in ("u", "v")}
    geometry = Geometry.from_rules(shapes, {"u": StiefelCanonical(), "v": StiefelCanonical()})
    return Problem(geometry, ordered_correlation, ordered_correlation, variate_error)


@dataclass(frozen=True)
class CanonicalVariates(TaskFamily):
    """Canonical variates of past and future of a sequence: ``channels`` noisy mixtures of damped oscillators.

    Past and future are windows of ``window`` moments each, whitened. Scaled so that the reference is -1. The metric is
    the mean squared sine of the angles between U and the variates of the past.
    """

    channels: int
    window: int
    p: int
    oscillators: int = 5
    length: int = 2000
    noise: float = 0.5

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name with the size."""
        d = self.channels * self.window
        return f"canonical variates of past and future {d}x{self.p}, {d}x{self.p}"

    @property
    def problem(self) -> Problem:  # type: ignore[override]
        """The problem of this size."""
        return canonical_variates_problem(self.channels * self.window, self.p)

    def draw(self, generator: torch.Generator, count: int) -> Data:
        """Draw sequences. The damping of an oscillator is a tenth to a fiftieth of its state each moment."""

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        frequency = 0.1 + 2.0 * torch.rand(count, self.oscillators, generator=generator, dtype=torch.float64)
        radius = 1.0 - torch.logspace(-1.0, -1.7, self.oscillators, dtype=torch.float64)
        cosine, sine = radius * frequency.cos(), radius * frequency.sin()
        shocks = (1.0 - radius.square()).sqrt()[None, :, None] * normal(self.length, count, self.oscillators, 2)
        states = [shocks[0]]
        for shock in shocks[1:]:
            x, y = states[-1].unbind(-1)
            states.append(torch.stack([cosine * x - sine * y, sine * x + cosine * y], dim=-1) + shock)
        mixing = normal(count, self.channels, 2 * self.oscillators) / (2 * self.oscillators) ** 0.5
        z = torch.stack(states, dim=1).flatten(2) @ mixing.mT
        z = z + self.noise * normal(*z.shape)
        z = z - z.mean(dim=1, keepdim=True)
        windows = z.unfold(1, 2 * self.window, 1)  # (count, n, channels, 2 window)
        past, future = (part.flatten(2) for part in windows.split(self.window, dim=-1))
        n = past.shape[1]

        def whitening(values: Tensor) -> Tensor:
            spectrum, vectors = torch.linalg.eigh(values.mT @ values / n)
            return (vectors * spectrum.rsqrt()[:, None, :]) @ vectors.mT

        cross = whitening(past) @ (past.mT @ future / n) @ whitening(future)
        left, values, _ = torch.linalg.svd(cross)
        weights = torch.arange(self.p, 0, -1, dtype=torch.float64)
        best = (weights * values[:, : self.p]).sum(dim=-1)
        return {
            "cross": (cross / best[:, None, None]).float(),
            "solution": left[..., : self.p].float(),
            "reference": -torch.ones(count),
        }

    def sample(self, data: Data, generator: torch.Generator, steps: int) -> Batch:
        """Return the cross-covariance at every step."""
        return repeat(data, ("cross",), steps)
