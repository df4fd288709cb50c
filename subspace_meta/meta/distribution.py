"""What the shipped weights are trained on: many kinds of problems, each in many sizes.

Sizes and batch sizes are drawn log-uniformly, once, by a fixed seed; conditioning, noise and scale are drawn anew with
every task. Data sets are those of the training partition of ``subspace_meta.tasks.data``. On purpose left out, so that
the evaluation can ask what was learned: the manifolds ``Oblique``, ``StiefelCanonical`` and products; matrix
completion, Procrustes, independent components, sparse PCA, dictionaries,
ordered eigenvectors, k-means, max-cut, Wahba's problem,
low-rank factorisations, trace ratios, incomplete samples; convolutional and recurrent networks; everything larger than
128 rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from subspace_meta.manifolds import SPD, Euclidean, Grassmann, Manifold, Orthogonal, Rotations, Stiefel
from subspace_meta.meta.trainer import StreamSettings
from subspace_meta.tasks import data
from subspace_meta.tasks.alignment import Synchronisation
from subspace_meta.tasks.base import TaskFamily
from subspace_meta.tasks.classification import LogisticRegression, OrthonormalClassification
from subspace_meta.tasks.covariances import MetricLearning
from subspace_meta.tasks.eigenvalues import LeadingSubspace, RayleighQuotient
from subspace_meta.tasks.networks import NetworkClassification
from subspace_meta.tasks.pca import SampledPCA, SyntheticPCA
from subspace_meta.tasks.planted import PerceptronOf, PlantedClassification, PlantedKarcherMeans, PlantedLeastSquares
from subspace_meta.tasks.robust_subspace import RobustSubspace
from subspace_meta.tasks.source_separation import JointDiagonalisation

SEED = 20


def _log_uniform(low: int, high: int, generator: torch.Generator) -> int:
    """Draw an integer from ``low`` to ``high``, its logarithm uniformly."""
    share = float(torch.rand((), generator=generator, device=generator.device))
    return min(high, int(math.exp(math.log(low) + share * math.log((high + 1) / low))))


def _sizes(count: int, rows: tuple[int, int], generator: torch.Generator) -> Iterator[tuple[int, int, int]]:
    """Draw rows d, columns p from 2 to d/2, and batch sizes from 16 to 256."""
    for _ in range(count):
        d = _log_uniform(*rows, generator)
        yield d, _log_uniform(2, d // 2, generator), _log_uniform(16, 256, generator)


def training_streams(far: int | None = None, near: int | None = None) -> tuple[StreamSettings, ...]:
    """Return the streams of the release; loads their data sets.

    Args:
        far: length of the truncation segments of the streams where noise limits progress; derivatives through their
            inner loops are of use over many steps.
        near: of the others, where they often explode. ``None``: as the settings of the training say.
    """
    generator = torch.Generator().manual_seed(SEED)
    orthonormal: tuple[Manifold, ...] = (Stiefel(), Grassmann())
    digits, wine, cancer = data.digits_first_half, data.wine, data.breast_cancer

    def least_squares(count: int, high: int, manifolds: tuple[Manifold, ...], square: bool) -> tuple[TaskFamily, ...]:
        """Every third one without noise."""
        drawn = _sizes(count, (3 if square else 8, high), generator)
        return tuple(
            PlantedLeastSquares(d, d if square else p, manifolds[i % len(manifolds)], batch if i % 3 else 0)
            for i, (d, p, batch) in enumerate(drawn)
        )

    synthetic = tuple(
        SyntheticPCA(d, p, batch, manifold=orthonormal[i % 2])
        for i, (d, p, batch) in enumerate(_sizes(12, (8, 128), generator))
    )
    patches = ("face", data.face_patches), ("brick", data.brick_patches), ("gravel", data.gravel_patches)
    sampled = tuple(
        SampledPCA(f"{name} patches", load, p, rotate=True, manifold=orthonormal[i % 2])
        for i, (p, (name, load)) in enumerate((p, patch) for p in (3, 8, 16) for patch in patches)
    )
    clusters = tuple(PlantedClassification(d, p, batch) for d, p, batch in _sizes(8, (8, 128), generator))
    tables = tuple(
        OrthonormalClassification(
            name, load, classes, batch_size=batch, rotate=True, objective_size=128, log10_logit_scale=(-0.5, 1.0)
        )
        for name, load, classes in (("digits, first half", digits, 10), ("wine", wine, 3), ("breast cancer", cancer, 2))
        for batch in (16, 64)
    )
    eigenvalues = (
        *(
            LeadingSubspace(d, p, 0.3 + 1.7 * (i % 4) / 3, orthonormal[i % 2])
            for i, (d, p, _) in enumerate(_sizes(6, (12, 128), generator))
        ),
        *(RayleighQuotient(_log_uniform(12, 128, generator)) for _ in range(2)),
    )
    regression = (
        LogisticRegression("breast cancer", cancer),
        LogisticRegression("wine", wine, batch_size=24),
        *least_squares(4, 64, (Euclidean(),), square=False),
    )
    perceptrons = tuple(
        NetworkClassification(
            source,
            load,
            f"perceptron {'-'.join(map(str, widths))}",
            PerceptronOf(widths),
            (("0.weight", Stiefel()),) if orthogonal else (),
        )
        for orthogonal, source, load, widths in (
            (False, "digits, first half", digits, (64, 16, 10)),
            (True, "digits, first half", digits, (64, 24, 16, 10)),
            (False, "digits, first half", digits, (64, 48, 10)),
            (True, "digits, first half", digits, (64, 48, 10)),
            (False, "breast cancer", cancer, (30, 12, 2)),
            (True, "wine", wine, (13, 8, 8, 3)),
        )
    )
    definite = (
        *least_squares(3, 10, (SPD(),), square=True),
        MetricLearning("wine", wine, 6, pairs=500),
        MetricLearning("breast cancer", cancer, 12, pairs=500, batch_size=32),
    )
    several = (
        JointDiagonalisation(16, 4),
        JointDiagonalisation(24, 3, matrices=5),
        Synchronisation(12),
        Synchronisation(20, known=0.6),
        RobustSubspace(24, 3, samples=200),
        RobustSubspace(40, 6, samples=300, outliers=0.2, batch_size=32),
    )
    means = (
        PlantedKarcherMeans(4, 3),
        PlantedKarcherMeans(8, 5),
        PlantedKarcherMeans(3, 8, batch_size=128),
        PlantedKarcherMeans(12, 4, batch_size=256),
    )

    def stream(
        families: tuple[TaskFamily, ...],
        weight: float,
        tasks: int = 16,
        segment: int | None = near,
        first_order: bool = False,
    ) -> StreamSettings:
        return StreamSettings(families, tasks, weight, segment, compiled=False, first_order=first_order)

    return (
        stream(synthetic, 3.0, segment=far),
        stream(sampled, 1.5, segment=far),
        stream(clusters, 2.0, segment=far),
        stream(tables, 2.0, segment=far),
        stream(least_squares(12, 96, orthonormal, square=False), 1.5, segment=far),
        stream(least_squares(8, 24, (Rotations(), Orthogonal()), square=True), 1.5),
        stream(eigenvalues, 2.0),
        stream(regression, 1.5, segment=far),
        stream(perceptrons, 2.0, tasks=8),
        stream(definite, 1.0),
        stream(several, 1.5),
        stream(means, 1.0, tasks=8, first_order=True),
    )
