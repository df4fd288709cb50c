"""Named runs: what is trained on, and the problems on which the result is judged, named beforehand.

Training and evaluation never share data: the partition is in ``subspace_meta.tasks.data``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from subspace_meta.evaluation.protocol import EvaluationTask
from subspace_meta.meta.distribution import training_streams
from subspace_meta.meta.trainer import StreamSettings, TrainSettings
from subspace_meta.tasks import OrthonormalClassification, SampledPCA, SyntheticPCA, TaskFamily, data


@dataclass(frozen=True)
class RunPreset:
    """A training run and its evaluation.

    Attributes:
        description: one line.
        train: settings of the training, without the seed.
        evaluation: the tasks on which the weights are judged.
        horizon, seeds: of the evaluation.
    """

    description: str
    train: TrainSettings
    evaluation: tuple[EvaluationTask, ...]
    horizon: int = 200
    seeds: int = 5


def _textures(p: int) -> tuple[TaskFamily, ...]:
    sources = (("brick", data.brick_patches), ("grass", data.grass_patches), ("gravel", data.gravel_patches))
    return tuple(SampledPCA(f"{name} patches", load, p, rotate=True) for name, load in sources)


def quick() -> RunPreset:
    """Four shape classes, two of them compiled; minutes on two cores.

    Judged on four problems: PCA of MNIST (784 x 10: another data set, 12 times larger than anything trained on), PCA of
    synthetic data at twice the largest trained size, orthonormal classification of the second half of the digits (the
    first half is trained on), and PCA of synthetic data at a trained size. Goal: at steps 20 and 50 below every tuned
    baseline on at least three of the four.
    """
    pca = (
        *(SyntheticPCA(64, 8),) * 2,  # twice as likely as one of the others
        SampledPCA("face patches", data.face_patches, 8, rotate=True),
        *_textures(8),
    )
    digits = OrthonormalClassification(
        "digits, first half", data.digits_first_half, 10, rotate=True, log10_logit_scale=(-0.5, 1.0)
    )
    streams = (
        StreamSettings(pca, tasks=16, weight=2.0),
        StreamSettings((digits,), tasks=16, weight=1.0),
        StreamSettings((SyntheticPCA(32, 4),), tasks=16, weight=0.7, compiled=False),
        StreamSettings((SyntheticPCA(16, 2),), tasks=16, weight=0.3, compiled=False),
    )
    large, trained = (SyntheticPCA(*size, log10_scale=(0.0, 0.0)) for size in ((128, 16), (64, 8)))
    held_out = OrthonormalClassification("digits, second half", data.digits_second_half, 10)
    return RunPreset(
        "meta-train in minutes on synthetic and real data, then compare with tuned baselines",
        TrainSettings(streams, outer_steps=700, horizon=(40, 400)),
        (
            EvaluationTask("PCA of MNIST 784x10", SampledPCA("MNIST", data.mnist, 10)),
            *(EvaluationTask("synthetic PCA 128x16 (twice the trained size)", large, i) for i in range(3)),
            EvaluationTask("orthonormal classification of digits 64x10", held_out),
            *(EvaluationTask("synthetic PCA 64x8 (a trained size)", trained, i) for i in range(3)),
        ),
    )


def smoke() -> RunPreset:
    """A few seconds, tiny and eager: to see that everything is in place, not to get good weights."""
    family = SyntheticPCA(12, 3, batch_size=16)
    return RunPreset(
        "seconds; shows that everything is in place, the weights are of no use",
        TrainSettings((StreamSettings((family,), tasks=4, compiled=False),), outer_steps=6, segment=5, horizon=(5, 10)),
        (EvaluationTask("synthetic PCA 12x3", SyntheticPCA(12, 3, batch_size=16, log10_scale=(0.0, 0.0))),),
        horizon=20,
        seeds=2,
    )


def release() -> RunPreset:
    """Weights like the shipped ones of ``base``: twelve streams of problems on seven manifolds; two hours on one core.

    Half of the inner loops are told their number of steps, some hand out averages. Judged on four problems here; the
    whole judgement is ``subspace-meta evaluate``.
    """
    train = TrainSettings(
        training_streams(),
        outer_steps=7000,
        segment=20,
        longest=160,
        horizon=(40, 1000),
        told=0.5,
        averaged=0.4,
        restart=4000,
        warmup=50,
    )
    return RunPreset("how weights like the shipped ones are made; hours", train, quick().evaluation)


def refine() -> RunPreset:
    """Derivatives through more steps, for meta-parameters that are good: ``train --preset refine --start base``.

    Inner loops of the six streams where noise limits progress are differentiated whole; the others, where a derivative
    through so many steps often explodes, in segments of 160 steps. A quarter of an hour on one core.
    """
    train = TrainSettings(
        training_streams(far=640, near=160),
        outer_steps=500,
        segment=20,
        horizon=(40, 640),
        told=0.3,
        averaged=0.4,
        lr=1e-3,
        warmup=20,
    )
    return RunPreset("more steps in sight, from weights that are good already (--start)", train, quick().evaluation)


# Functions, not values: building a preset loads its data.
RUN_PRESETS: dict[str, Callable[[], RunPreset]] = {"quick": quick, "refine": refine, "release": release, "smoke": smoke}
