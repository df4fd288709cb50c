"""The tasks that optimizers are compared on: named beforehand, on evaluation data and evaluation seeds only.

``subspace_meta.tasks.data`` holds the partition. Synthetic tasks are drawn by the evaluation, whose seeds training does
not use.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from subspace_meta.manifolds import Grassmann, Stiefel, StiefelCanonical
from subspace_meta.tasks import data
from subspace_meta.tasks.alignment import Synchronisation, UnbalancedProcrustes, Wahba
from subspace_meta.tasks.base import TaskFamily
from subspace_meta.tasks.classification import LogisticRegression, OrthonormalClassification
from subspace_meta.tasks.clustering import SphericalKMeans
from subspace_meta.tasks.covariances import IncompleteCovariance, KarcherMeans, MetricLearning
from subspace_meta.tasks.discriminant import TraceRatio
from subspace_meta.tasks.eigenvalues import LeadingSubspace, OrderedEigenvectors, RayleighQuotient
from subspace_meta.tasks.graphs import MaxCut
from subspace_meta.tasks.low_rank import LowRankFactorisation, MatrixCompletion
from subspace_meta.tasks.networks import AddingProblem, ConvolutionalNetwork, NetworkClassification, Perceptron
from subspace_meta.tasks.pca import SampledPCA, SyntheticPCA
from subspace_meta.tasks.robust_subspace import RobustSubspace
from subspace_meta.tasks.source_separation import IndependentComponents, JointDiagonalisation
from subspace_meta.tasks.sparse import DictionaryLearning, SparsePCA

Axis = Literal["training distribution", "unseen size", "unseen task", "unseen manifold", "real data", "10x horizon"]
Reference = Literal["closed form", "computed", "best known", "lower bound"]


@dataclass(frozen=True)
class SuiteTask:
    """A named task of the evaluation.

    Attributes:
        row: name of the row in tables.
        family: what is drawn; the row's size is in it.
        manifolds: names of the manifolds of its parameters, sorted.
        axis: how it differs from what the weights are trained on (``subspace_meta.meta.distribution``): a larger size
            of a problem, a data set never trained on, another problem, another manifold, ten times as many steps,
            or not at all.
        metric: what the problem's ``metric`` measures.
        reference: "closed form": attained by a known point; "computed": the global minimum, by a method that finds it;
            "best known": local descent from a planted solution, or the best of many runs; "lower bound": 0, which the
            objective cannot go below, the minimum being unknown.
        needs_file: the file that it reads in the folder that ``SUBSPACE_META_DATA`` names, if any.
        horizon: number of steps, at least 20, the first step at which losses are compared.
        instance: what is added to the seeds of the evaluation, of the draw and of the starts.
    """

    row: str
    family: TaskFamily
    manifolds: tuple[str, ...]
    axis: Axis
    metric: str
    reference: Reference
    needs_file: str = ""
    horizon: int = 400
    instance: int = 0

    def __post_init__(self) -> None:
        if self.horizon < 20:
            raise ValueError(f"{self.row}: the horizon must be at least 20 steps, got {self.horizon}")

    @property
    def available(self) -> bool:
        """Whether its data are there."""
        folder = os.environ.get(data.DATA_VARIABLE)
        return not self.needs_file or (bool(folder) and Path(str(folder), self.needs_file).is_file())


def evaluation_suite() -> tuple[SuiteTask, ...]:
    """Return all tasks, those without their data included (see :attr:`SuiteTask.available`). Loads nothing."""
    return (*_on_grassmann(), *_on_stiefel(), *_on_positive_definite(), *_on_others(), *_as_trained())


def _as_trained() -> tuple[SuiteTask, ...]:
    """Return tasks of the training distribution, on evaluation seeds, and two of them for ten times as long."""
    where, digits = ("Stiefel",), OrthonormalClassification(*DIGITS, 10)
    pca = SyntheticPCA(64, 8, log10_scale=(0.0, 0.0))
    long: Axis = "10x horizon"
    return (
        SuiteTask("synthetic PCA 64x8", pca, where, "training distribution", EXCESS, "closed form"),
        SuiteTask("synthetic PCA 64x8, 4000 steps", pca, where, long, EXCESS, "closed form", horizon=4000),
        SuiteTask(
            "orthonormal classification of digits 64x10, 4000 steps",
            digits,
            where,
            long,
            ACCURACY,
            "lower bound",
            horizon=4000,
        ),
    )


DIGITS = ("digits", data.digits_second_half)
EXCESS = "excess over the total variance"
ACCURACY = "test accuracy"
ANGLE = "1 - |cosine| with the true directions, mean"


def _digits() -> Tensor:
    """Return the digits without their labels; a named function, so that families are equal."""
    return data.digits_second_half()[0]


def _on_grassmann() -> tuple[SuiteTask, ...]:
    manifold = Grassmann()
    where = ("Grassmann",)
    mnist = {p: SampledPCA("MNIST", data.mnist, p, manifold=manifold) for p in (10, 128)}
    digits = SampledPCA("digits", _digits, 8, manifold=manifold)
    return (
        SuiteTask("PCA of MNIST 784x10", mnist[10], where, "real data", EXCESS, "closed form"),
        SuiteTask("PCA of MNIST 784x128", mnist[128], where, "real data", EXCESS, "closed form"),
        SuiteTask("PCA of digits 64x8", digits, where, "real data", EXCESS, "closed form"),
        SuiteTask(
            "robust subspace recovery 64x5",
            RobustSubspace(64, 5),
            where,
            "unseen size",
            "sine of the angles to the true subspace, root mean square",
            "best known",
        ),
        SuiteTask(
            "matrix completion 100x5",
            MatrixCompletion(100, 5),
            where,
            "unseen task",
            "relative error on unknown entries",
            "best known",
        ),
        SuiteTask(
            "trace-ratio discriminant of digits 64x5",
            TraceRatio(*DIGITS, 5),
            where,
            "unseen task",
            ACCURACY,
            "computed",
        ),
    )


def _on_stiefel() -> tuple[SuiteTask, ...]:
    where = ("Stiefel",)
    mnist = OrthonormalClassification("MNIST", data.mnist_labelled, 10)
    digits = OrthonormalClassification(*DIGITS, 10)
    faces = OrthonormalClassification(
        "YaleB", data.yaleb, 38, log10_logit_scale=(0.0, 0.0), load_test=data.yaleb_test, epochs=True
    )
    perceptron = NetworkClassification(
        *DIGITS,
        "orthogonal perceptron 64-32-32-10",
        Perceptron,
        (("first.weight", Stiefel()), ("second.weight", Stiefel())),
    )
    convolutional = NetworkClassification(
        *DIGITS,
        "orthogonal convolutional network 8-16",
        ConvolutionalNetwork,
        (("first.weight", Stiefel()), ("second.weight", Stiefel())),
    )
    return (
        SuiteTask("orthonormal classification of MNIST 784x10", mnist, where, "real data", ACCURACY, "lower bound"),
        SuiteTask("orthonormal classification of digits 64x10", digits, where, "real data", ACCURACY, "lower bound"),
        SuiteTask(
            "orthonormal classification of YaleB 1024x38",
            faces,
            where,
            "real data",
            ACCURACY,
            "lower bound",
            "yaleb_32x32.npz",
        ),
        SuiteTask(
            "synthetic PCA 256x32",
            SyntheticPCA(256, 32, log10_scale=(0.0, 0.0)),
            where,
            "unseen size",
            EXCESS,
            "closed form",
        ),
        SuiteTask("leading subspace 200x20", LeadingSubspace(200, 20), where, "unseen size", EXCESS, "closed form"),
        SuiteTask(
            "joint diagonalisation 32x8", JointDiagonalisation(32, 8), where, "unseen size", ANGLE, "closed form"
        ),
        SuiteTask(
            "independent components 32x8", IndependentComponents(32, 8), where, "unseen task", ANGLE, "best known"
        ),
        SuiteTask(
            "unbalanced Procrustes 40x10",
            UnbalancedProcrustes(40, 10),
            where,
            "unseen task",
            "distance to the solution, relative",
            "closed form",
        ),
        SuiteTask(
            "sparse PCA 100x5", SparsePCA(100, 5), where, "unseen task", "share of entries that vanish", "best known"
        ),
        SuiteTask(
            "orthogonal perceptron on digits",
            perceptron,
            ("Euclidean", "Stiefel"),
            "real data",
            ACCURACY,
            "lower bound",
        ),
        SuiteTask(
            "orthogonal convolutional network on digits",
            convolutional,
            ("Euclidean", "Stiefel"),
            "unseen task",
            ACCURACY,
            "lower bound",
        ),
        SuiteTask(
            "ordered eigenvectors 100x8",
            OrderedEigenvectors(100, 8, StiefelCanonical()),
            ("StiefelCanonical",),
            "unseen manifold",
            "squared sine of the angles to the eigenvectors, mean",
            "closed form",
        ),
    )


def _on_positive_definite() -> tuple[SuiteTask, ...]:
    where = ("SPD",)
    kylberg = KarcherMeans("Kylberg", data.kylberg, 20, 5, batch_size=512, epochs=True)
    digits = KarcherMeans("MNIST", data.mnist_covariances, 10, 5)
    distance = "distance to the best means, root mean square"
    return (
        SuiteTask(
            "Karcher means of Kylberg 20x5x5",
            kylberg,
            where,
            "real data",
            distance,
            "computed",
            "kylberg_spd.npz",
        ),
        SuiteTask("Karcher means of MNIST 10x5x5", digits, where, "real data", distance, "computed"),
        SuiteTask(
            "metric learning on digits 10x10",
            MetricLearning(*DIGITS, 10),
            where,
            "real data",
            ACCURACY,
            "closed form",
        ),
        SuiteTask(
            "covariance with missing data 10x10",
            IncompleteCovariance(10),
            where,
            "unseen task",
            "divergence from the true distribution",
            "best known",
        ),
    )


def _on_others() -> tuple[SuiteTask, ...]:
    return (
        SuiteTask(
            "synchronisation of 30 rotations SO(3)",
            Synchronisation(30),
            ("Rotations",),
            "unseen size",
            "error of the relative rotations, root mean square",
            "computed",
        ),
        SuiteTask(
            "Wahba's problem SO(3)",
            Wahba(),
            ("Rotations",),
            "unseen task",
            "distance to the solution, relative",
            "closed form",
        ),
        SuiteTask(
            "adding problem, orthogonal recurrence 32x32",
            AddingProblem(),
            ("Euclidean", "Orthogonal"),
            "unseen task",
            "root mean square error",
            "lower bound",
        ),
        SuiteTask(
            "Rayleigh quotient 200",
            RayleighQuotient(200),
            ("Sphere",),
            "unseen size",
            "squared sine of the angle to the eigenvector",
            "closed form",
        ),
        SuiteTask(
            "spherical k-means of digits 10 x S(64)",
            SphericalKMeans(*DIGITS, 10),
            ("Sphere",),
            "unseen task",
            "purity",
            "best known",
        ),
        SuiteTask(
            "max-cut relaxation 15x100",
            MaxCut(100, 15),
            ("Oblique",),
            "unseen manifold",
            "share of edges cut after rounding",
            "computed",
        ),
        SuiteTask(
            "dictionary learning of digits 64x32, 32x128",
            DictionaryLearning(*DIGITS, 32, 128),
            ("Euclidean", "Oblique"),
            "unseen manifold",
            "relative reconstruction error",
            "lower bound",
        ),
        SuiteTask(
            "logistic regression of digits 64",
            LogisticRegression(*DIGITS),
            ("Euclidean",),
            "real data",
            ACCURACY,
            "computed",
        ),
        SuiteTask(
            "perceptron on digits",
            NetworkClassification(*DIGITS, "perceptron 64-32-32-10", Perceptron),
            ("Euclidean",),
            "real data",
            ACCURACY,
            "lower bound",
        ),
        SuiteTask(
            "low-rank factorisation 80x5, 5x5, 50x5",
            LowRankFactorisation(80, 50, 5),
            ("SPD", "Stiefel"),
            "unseen task",
            "distance to the best approximation, relative",
            "closed form",
        ),
    )
