"""The test set: tasks that nothing was chosen by, run when weights are released and at no other time.

The suite of :mod:`subspace_meta.tasks.suite` is looked at while optimizers are developed, so figures on it are those of
a development set. Here are other problems, on other data, drawn from other seeds. Each use is a dated line in the model
card (``subspace_meta/weights/MODEL_CARD.md``): a set that is used often is a development set as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from subspace_meta.tasks.constrained_pca import GroupSparsePCA, NonNegativePCA
from subspace_meta.tasks.correlations import CanonicalVariates, SlowFeatures, StereoLeastSquares, stereo_patches
from subspace_meta.tasks.deconvolution import BlindDeconvolution
from subspace_meta.tasks.layers import AssociativeRecall, ImageRepresentation, cameraman
from subspace_meta.tasks.matching import GraphMatching, SphericalEmbedding
from subspace_meta.tasks.motion import MovingBodies
from subspace_meta.tasks.poses import EssentialMatrices, PhaseSynchronisation, PoseAveraging, Registration
from subspace_meta.tasks.quantum import StateTomography
from subspace_meta.tasks.scatter import FrechetRegression, StudentScatter, cat_covariances
from subspace_meta.tasks.suite import SuiteTask
from subspace_meta.tasks.tensors import RankOneTerms, TuckerDecomposition

INSTANCE = 20_000_000  # added to the evaluation's seeds; the development suite has 0

# Its real data, as in subspace_meta.tasks.data; neither training nor the development suite loads these.
TEST: dict[str, tuple[Callable[[], object], ...]] = {
    "stereo pair": (stereo_patches,),
    "photograph of a cat": (cat_covariances,),
    "photograph of a cameraman": (cameraman,),
}

SINE = "sine of the angles to the best subspace, root mean square"
POSES = "error of the relative rotations, root mean square"


def held_out_suite() -> tuple[SuiteTask, ...]:
    """Return all tasks of the test set. Loads nothing."""
    tasks = (*_subspaces(), *_rigid_motions(), *_unit_vectors(), *_positive_definite(), *_layers())
    return tuple(replace(task, instance=INSTANCE) for task in tasks)


def _subspaces() -> tuple[SuiteTask, ...]:
    tucker, terms = TuckerDecomposition((24, 18, 12), 4), RankOneTerms((20, 16, 12), 4)
    return (
        SuiteTask("slow features 40x4", SlowFeatures(40, 4), ("Grassmann",), "unseen task", SINE, "computed"),
        SuiteTask(
            "group-sparse PCA 96x4",
            GroupSparsePCA(96, 4),
            ("Grassmann",),
            "unseen task",
            "share of groups that vanish",
            "best known",
        ),
        SuiteTask(
            "subspace clustering of 3 moving bodies 24x4",
            MovingBodies(3, 12),
            ("Grassmann",),
            "unseen task",
            "share of points in the wrong cluster",
            "best known",
        ),
        SuiteTask(
            "partial least squares of stereo patches 64x6, 64x6",
            StereoLeastSquares(6),
            ("Stiefel",),
            "real data",
            SINE,
            "computed",
        ),
        SuiteTask(
            "non-negative PCA 80x4",
            NonNegativePCA(80, 4),
            ("Stiefel",),
            "unseen task",
            "1 - cosine with the true components, mean",
            "best known",
        ),
        SuiteTask(
            "canonical variates of past and future 30x5, 30x5",
            CanonicalVariates(3, 10, 5),
            ("StiefelCanonical",),
            "unseen manifold",
            "squared sine of the angles to the variates, mean",
            "computed",
        ),
        SuiteTask(
            "Tucker decomposition 24x18x12, rank 4",
            tucker,
            (tucker.problem.geometry.parameters[0].manifold.name,),
            "unseen manifold",
            "sine of the angles to the true subspaces, root mean square",
            "best known",
        ),
        SuiteTask(
            "canonical decomposition 20x16x12, 4 terms",
            terms,
            ("Euclidean", terms.problem.geometry.parameters[0].manifold.name),
            "unseen manifold",
            "1 - |cosine| with the true terms, mean",
            "best known",
        ),
    )


def _rigid_motions() -> tuple[SuiteTask, ...]:
    return (
        SuiteTask(
            "graph matching 24x24",
            GraphMatching(24),
            ("Orthogonal",),
            "unseen task",
            "distance of the graphs, relative",
            "computed",
        ),
        SuiteTask(
            "averaging of 30 poses SE(3)",
            PoseAveraging(30),
            ("Euclidean", "Rotations"),
            "unseen task",
            POSES,
            "best known",
        ),
        SuiteTask(
            "registration of 8 views SE(3)",
            Registration(8),
            ("Euclidean", "Rotations"),
            "unseen task",
            POSES,
            "best known",
        ),
        SuiteTask(
            "essential matrices of 6 pairs of views",
            EssentialMatrices(6),
            ("Rotations", "Sphere"),
            "unseen task",
            "distance to the true matrices, mean",
            "best known",
        ),
    )


def _unit_vectors() -> tuple[SuiteTask, ...]:
    return (
        SuiteTask(
            "blind deconvolution 64",
            BlindDeconvolution(64),
            ("Sphere",),
            "unseen task",
            "1 - largest share of a spike's response",
            "best known",
        ),
        SuiteTask(
            "tomography of 4 qubits 32x2",
            StateTomography(4),
            ("Sphere",),
            "unseen task",
            "distance to the true state",
            "best known",
        ),
        SuiteTask(
            "graph embedding of 60 nodes on S(3)",
            SphericalEmbedding(60),
            ("Sphere",),
            "unseen task",
            "error of the cosines, root mean square",
            "best known",
        ),
        SuiteTask(
            "phase synchronisation 2x80",
            PhaseSynchronisation(80),
            ("Oblique",),
            "unseen manifold",
            "root of 1 - squared correlation with the truth",
            "computed",
        ),
    )


def _positive_definite() -> tuple[SuiteTask, ...]:
    return (
        SuiteTask(
            "scatter of heavy tails 12x12",
            StudentScatter(12),
            ("SPD",),
            "unseen task",
            "divergence from the true scatter",
            "computed",
        ),
        SuiteTask(
            "Frechet regression of region covariances 4x5x5",
            FrechetRegression(4),
            ("SPD",),
            "real data",
            "distance to the best matrices, root mean square",
            "computed",
        ),
    )


def _layers() -> tuple[SuiteTask, ...]:
    return (
        SuiteTask(
            "associative recall by attention, projections 20x10",
            AssociativeRecall(),
            ("Euclidean", "Stiefel"),
            "unseen task",
            "share of right answers",
            "lower bound",
        ),
        SuiteTask(
            "image as an orthogonal network of sines 24x24",
            ImageRepresentation(),
            ("Euclidean", "Orthogonal"),
            "real data",
            "root mean square error",
            "lower bound",
        ),
    )
