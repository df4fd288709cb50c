"""Angles and poses: phase synchronisation, averaging of poses on a graph, registration of many views, two views.

*Phase synchronisation.* minimise the mean over measured pairs of |z_i - h_ij z_j|^2 over unit complex numbers, held as
columns (real, imaginary) of a matrix in the oblique manifold (2, n). Sources: Singer, "Angular synchronization by
eigenvectors and semidefinite programming", Appl. Comput. Harmon. Anal. 30 (2011); Bandeira, Boumal, Singer, "Tightness
of the maximum likelihood semidefinite relaxation for angular synchronization", Math. Program. 163 (2017): with little
noise the global minimum has a certificate, which the tests check.

*Pose averaging.* minimise the mean over the edges of a graph of |R_j - R_i R_ij|^2 + tau rho(|t_j - t_i - R_i t_ij|^2)
over SO(3)^N x R^{3N}. Source: Rosen, Carlone, Bandeira, Leonard, "SE-Sync", IJRR 38 (2019), problem 1.

*Registration.* N views, each a rigid motion of a part of one cloud of points, with known correspondences: minimise the
weighted mean of rho(|R_i p_ik + t_i - c_k|^2), c_k the mean of the images of point k. Source: Chaudhury, Khoo, Singer,
"Global registration of multiple point clouds using semidefinite programming", SIAM J. Optim. 25 (2015).

In both rho(s) = 2 (sqrt(1 + s) - 1), which is s near 0 and grows like a distance far away, as is usual where a
correspondence may be wrong (Charbonnier et al., "Deterministic edge-preserving regularization in computed imaging",
IEEE Trans. Image Process. 6, 1997); its gradient is bounded, whatever the translations.

*Essential matrices.* minimise the mean of sqrt(e^2 + c^2) - c, e = b^T [t]_x R a, over SO(3) x S^2, for corresponding
directions a, b in two views. Sources: Helmke, Huper, Lee, Moore, "Essential matrix estimation using Gauss-Newton
iterations on a manifold", IJCV 74 (2007); Tron and Daniilidis, "The space of essential matrices as a Riemannian
quotient manifold", SIAM J. Imaging Sci. 10 (2017).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from subspace_meta.geometry import Geometry, MatrixView, Params, Rule
from subspace_meta.manifolds import Euclidean, Oblique, Rotations, Sphere
from subspace_meta.tasks.base import Batch, Data, Problem, TaskFamily, draw_rows, repeat
from subspace_meta.tasks.references import reference_by_descent

TRANSLATION_WEIGHT = 4.0
ROBUST = 0.02


def phase_loss(params: Params, batch: Batch) -> Tensor:
    """Return the mean over pairs of |z_i - h_ij z_j|^2 for H = ``real`` + i ``imaginary``, 0 where not measured."""
    z = params["z"]
    a, b = z.unbind(0)
    # z^* H z for the Hermitian H: its imaginary part is antisymmetric, so both mixed terms are the same.
    agreement = (z * (z @ batch["real"])).sum() + 2.0 * b @ batch["imaginary"] @ a
    return 2.0 - 2.0 * agreement / batch["pairs"]


def phase_error(params: Params, data: Data) -> Tensor:
    """Return the root of 1 - |z^* truth|^2 / n^2: it does not see a common phase."""
    z, truth = params["z"], data["truth"]
    real, imaginary = (z * truth).sum(), (z[0] * truth[1] - z[1] * truth[0]).sum()
    return (1.0 - (real.square() + imaginary.square()) / z.shape[1] ** 2).clamp(min=0.0).sqrt()


@functools.cache
def phase_problem(n: int) -> Problem:
    """Return the problem of one size."""
    rule = Rule(Oblique(), MatrixView("c n -> c n"))  # the default view turns a wide matrix
    geometry = Geometry.from_rules({"z": torch.empty(2, n, device="meta")}, {"z": rule})
    return Problem(geometry, phase_loss, phase_loss, phase_error)


def neighbours(n: int, reach: int, chords: float, generator: torch.Generator, count: int) -> Tensor:
    """Return random graphs ``(count, n, n)``, upper triangles: a path, all within ``reach`` of it, and some chords."""
    index = torch.arange(n)
    distance = index[None, :] - index[:, None]
    chosen = torch.rand(count, n, n, generator=generator) < chords
    return ((chosen | (distance <= reach)) & (distance >= 1)).float()


@dataclass(frozen=True)
class PhaseSynchronisation(TaskFamily):
    """n phases from noisy differences: those of neighbours on a path, and of a share ``chords`` of all other pairs.

    The reference is what descent in float64 reaches from the truth, which has a certificate. The metric is the root of
    one minus the squared correlation with the truth.
    """

    n: int
    reach: int = 3
    chords: float = 0.03
    noise: float = 0.3

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name with the size."""
        return f"phase synchronisation 2x{self.n}"

    @property
    def problem(self) -> Problem:  # type: ignore[override]
        """The problem of this size."""
        return phase_problem(self.n)

    def draw(self, generator: torch.Generator, count: int) -> Data:
        """Draw phases, graphs and measurements."""
        phase = 2.0 * math.pi * torch.rand(count, self.n, generator=generator)
        upper = neighbours(self.n, self.reach, self.chords, generator, count)
        noise = self.noise * torch.randn(count, self.n, self.n, generator=generator)
        measured = phase[:, :, None] - phase[:, None, :] + noise
        real, imaginary = upper * measured.cos(), upper * measured.sin()
        data = {
            "real": real + real.mT,
            "imaginary": imaginary - imaginary.mT,
            "pairs": 2.0 * upper.sum(dim=(1, 2)),
        }
        truth = torch.stack([phase.cos(), phase.sin()], dim=1)
        reference = reference_by_descent(self.problem, {"z": truth}, data).float()
        return {**data, "truth": truth, "reference": reference}

    def sample(self, data: Data, generator: torch.Generator, steps: int) -> Batch:
        """Return the measurements at every step."""
        return repeat(data, ("real", "imaginary", "pairs"), steps)


def turned(rotations: Tensor, points: Tensor) -> Tensor:
    """Return R p for ``(..., 3, 3)`` and ``(..., 3)``."""
    return (rotations * points[..., None, :]).sum(dim=-1)


def small_rotations(noise: float, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return rotations ``(*shape, 3, 3)`` by about ``noise`` in every plane."""
    turn = noise * torch.randn(*shape, 3, 3, generator=generator)
    return torch.linalg.matrix_exp((turn - turn.mT) / 2**0.5)


def relative_pose_error(params: Params, data: Data) -> Tensor:
    """Return the root mean square of |R_i^T R_j - T_i^T T_j| over all pairs: it does not see a turn of the world."""
    r, truth = params["r"].mT.flatten(0, 1), data["truth"].mT.flatten(0, 1)
    return (r @ r.mT - truth @ truth.mT).square().sum().sqrt() / params["r"].shape[0]


def robust(squares: Tensor) -> Tensor:
    """Return 2 (sqrt(1 + s) - 1), without cancellation near 0."""
    return 2.0 * squares / ((1.0 + squares).sqrt() + 1.0)


def pose_loss(params: Params, batch: Batch) -> Tensor:
    """Return the mean over edges of |R_j - R_i R_ij|^2 + tau rho(|t_j - t_i - R_i t_ij|^2).

    ``tail`` and ``head`` ``(E, N)`` pick i and j; ``turns`` ``(E, 3, 3)`` and ``shifts`` ``(E, 3)`` are measured.
    """
    r, t = params["r"].flatten(1), params["t"]
    # Products with one-hot rows, not an index: their derivative is a product again, not a scatter.
    first, second = ((batch[name] @ r).reshape(-1, 3, 3) for name in ("tail", "head"))
    turn = second - first @ batch["turns"]
    shift = (batch["head"] - batch["tail"]) @ t - turned(first, batch["shifts"])
    return (turn.square().sum() + TRANSLATION_WEIGHT * robust(shift.square().sum(dim=-1)).sum()) / turn.shape[0]


@functools.cache
def pose_problem(n: int) -> Problem:
    """Return the problem of one size."""
    shapes = {"r": torch.empty(n, 3, 3, device="meta"), "t": torch.empty(n, 3, device="meta")}
    geometry = Geometry.from_rules(shapes, {"r": Rotations(), "t": Euclidean()})
    return Problem(geometry, pose_loss, pose_loss, relative_pose_error)


@dataclass(frozen=True)
class PoseAveraging(TaskFamily):
    """N poses along a helix of two turns and unit radius, from noisy relative poses of neighbours and at loop closures.

    The reference is what descent in float64 reaches from the truth: the best known value. The metric is the root mean
    square error of all relative rotations.

    Attributes:
        poses: number of poses.
        reach: poses that are so near on the path are measured.
        closures: number of further pairs.
        noise: of rotations, in every plane; translations have a third of it in every coordinate.
    """

    poses: int
    reach: int = 2
    closures: int = 20
    noise: float = 0.1

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name with the size."""
        return f"averaging of {self.poses} poses SE(3)"

    @property
    def problem(self) -> Problem:  # type: ignore[override]
        """The problem of this size."""
        return pose_problem(self.poses)

    def draw(self, generator: torch.Generator, count: int) -> Data:
        """Draw graphs, orientations and measurements."""
        n = self.poses
        angle = torch.linspace(0.0, 4.0 * math.pi, n)
        place = torch.stack([angle.cos(), angle.sin(), angle / (2.0 * math.pi) - 1.0], dim=-1)
        near = [(i, i + step) for step in range(1, self.reach + 1) for i in range(n - step)]
        far = torch.triu_indices(n, n, self.reach + 1)
        chosen = torch.stack([torch.randperm(far.shape[1], generator=generator)[: self.closures] for _ in range(count)])
        path = torch.tensor(near).mT.expand(count, 2, -1)
        tail, head = torch.cat([path, far[:, chosen].movedim(0, 1)], dim=-1).unbind(1)  # (count, E) each
        truth = Rotations().random_point((count, n, 3, 3), generator)
        task = torch.arange(count)[:, None]
        edges = tuple(tail.shape)
        before, after = truth[task, tail], truth[task, head]
        shifts = turned(before.mT, place[head] - place[tail])
        data = {
            "tail": F.one_hot(tail, n).float(),
            "head": F.one_hot(head, n).float(),
            "turns": before.mT @ after @ small_rotations(self.noise, edges, generator),
            "shifts": shifts + self.noise / 3.0 * torch.randn(*edges, 3, generator=generator),
        }
        start = {"r": truth, "t": place.expand(count, n, 3)}
        return {**data, "truth": truth, "reference": reference_by_descent(self.problem, start, data).float()}

    def sample(self, data: Data, generator: torch.Generator, steps: int) -> Batch:
        """Return the measurements at every step."""
        return repeat(data, ("tail", "head", "turns", "shifts"), steps)


def registration_loss(params: Params, batch: Batch) -> Tensor:
    """Return the mean over points of the weighted mean of rho(squared distance of an image from the centre of all).

    ``points`` ``(B, N, 3)`` are what the N views see, ``weights`` ``(B, N)`` sum to 1 over the views, 0 where not seen.
    """
    weights = batch["weights"]
    images = torch.einsum("nij,bnj->bni", params["r"], batch["points"]) + params["t"]
    residual = images - (weights[..., None] * images).sum(dim=1, keepdim=True)
    return (weights * robust(residual.square().sum(dim=-1))).sum() / images.shape[0]


@functools.cache
def registration_problem(views: int) -> Problem:
    """Return the problem of one size."""
    shapes = {"r": torch.empty(views, 3, 3, device="meta"), "t": torch.empty(views, 3, device="meta")}
    geometry = Geometry.from_rules(shapes, {"r": Rotations(), "t": Euclidean()})
    return Problem(geometry, registration_loss, registration_loss, relative_pose_error)


@dataclass(frozen=True)
class Registration(TaskFamily):
    """N views of one cloud of points, each seeing a point with probability ``seen``; mini-batches are points.

    The cloud is four times as long as it is thick, and lies off the origin, which couples rotations and translations.
    The reference is what descent in float64 reaches from the truth: the best known value. The metric is the root mean
    square error of all relative rotations.
    """

    views: int
    samples: int = 300
    seen: float = 0.5
    noise: float = 0.03
    batch_size: int = 16

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name with the size."""
        return f"registration of {self.views} views SE(3)"

    @property
    def problem(self) -> Problem:  # type: ignore[override]
        """The problem of this size."""
        return registration_problem(self.views)

    def draw(self, generator: torch.Generator, count: int) -> Data:
        """Draw clouds, views and who sees what. Every point is seen by the first view or by the two after it."""
        shape = (count, self.samples, self.views)
        cloud = torch.randn(count, self.samples, 1, 3, generator=generator) * torch.tensor([1.0, 0.5, 0.25]) + 0.5
        truth = Rotations().random_point((count, self.views, 3, 3), generator)
        shift = torch.randn(count, self.views, 3, generator=generator)
        noise = self.noise * torch.randn(*shape, 3, generator=generator)
        points = turned(truth[:, None].mT, cloud - shift[:, None]) + noise
        seen = torch.rand(*shape, generator=generator) < self.seen
        seen[..., 1:3] |= ~seen[..., :1]
        weights = seen.float() / seen.sum(dim=-1, keepdim=True)
        data = {"points": points, "weights": weights}
        start = {"r": truth, "t": shift}
        return {**data, "truth": truth, "reference": reference_by_descent(self.problem, start, data).float()}

    def sample(self, data: Data, generator: torch.Generator, steps: int) -> Batch:
        """Draw points, with replacement."""
        return draw_rows(data, ("points", "weights"), self.batch_size, generator, steps)


def epipolar_loss(params: Params, batch: Batch) -> Tensor:
    """Return the mean of sqrt(e^2 + c^2) - c, e = b^T [t]_x R a = t . (R a x b), ``a`` and ``b`` ``(B, K, 3)``."""
    moved = torch.einsum("kij,bkj->bki", params["r"], batch["a"])
    error = (torch.linalg.cross(moved, batch["b"]) * params["t"][..., 0]).sum(dim=-1)
    return ((error.square() + ROBUST**2).sqrt() - ROBUST).mean()


def essential_error(params: Params, data: Data) -> Tensor:
    """Return the mean over pairs of views of the distance |E +- E*| / 2 of the essential matrices."""
    # Column j of [t]_x R is t x r_j.
    essential = torch.linalg.cross(params["t"].expand_as(params["r"]), params["r"], dim=-2)
    apart = [(essential + sign * data["truth"]).square().sum(dim=(-2, -1)) for sign in (1.0, -1.0)]
    return torch.minimum(*apart).sqrt().mean() / 2.0


@functools.cache
def essential_problem(pairs: int) -> Problem:
    """Return the problem of one size."""
    shapes = {"r": torch.empty(pairs, 3, 3, device="meta"), "t": torch.empty(pairs, 3, 1, device="meta")}
    geometry = Geometry.from_rules(shapes, {"r": Rotations(), "t": Sphere()})
    return Problem(geometry, epipolar_loss, epipolar_loss, essential_error)


@dataclass(frozen=True)
class EssentialMatrices(TaskFamily):
    """The relative pose of each of several pairs of cameras, from directions that correspond, some of them wrongly.

    Cameras see all around; points are one and a half to four and a half times as far as the cameras are apart, whose
    orientations differ by about half a radian. The reference is what descent in float64 reaches from the truth: the
    best known value; the twisted pose has the same essential matrix, up to sign. The metric is the mean distance of the
    essential matrices, up to sign.
    """

    pairs: int
    samples: int = 200
    outliers: float = 0.2
    noise: float = 0.005
    batch_size: int = 32

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name with the size."""
        return f"essential matrices of {self.pairs} pairs of views"

    @property
    def problem(self) -> Problem:  # type: ignore[override]
        """The problem of this size."""
        return essential_problem(self.pairs)

    def draw(self, generator: torch.Generator, count: int) -> Data:
        """Draw cameras, points and correspondences."""
        shape = (count, self.samples, self.pairs)
        turn = small_rotations(0.3, (count, self.pairs), generator)
        t = F.normalize(torch.randn(count, self.pairs, 3, generator=generator), dim=-1)
        depth = 1.5 + 3.0 * torch.rand(*shape, 1, generator=generator)
        points = depth * F.normalize(torch.randn(*shape, 3, generator=generator), dim=-1)
        other = turned(turn[:, None], points) + t[:, None]
        # A wrong correspondence is that of the point before.
        wrong = torch.rand(*shape, 1, generator=generator) < self.outliers
        seen = [F.normalize(x, dim=-1) for x in (points, torch.where(wrong, other.roll(1, dims=1), other))]
        a, b = (F.normalize(x + self.noise * torch.randn(*shape, 3, generator=generator), dim=-1) for x in seen)
        data = {"a": a, "b": b}
        truth = torch.linalg.cross(t[..., None].expand_as(turn), turn, dim=-2)
        reference = reference_by_descent(self.problem, {"r": turn, "t": t[..., None]}, data).float()
        return {**data, "truth": truth, "reference": reference}

    def sample(self, data: Data, generator: torch.Generator, steps: int) -> Batch:
        """Draw correspondences, with replacement."""
        return draw_rows(data, ("a", "b"), self.batch_size, generator, steps)
