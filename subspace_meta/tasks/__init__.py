"""Optimization problems on manifolds, for meta-training and for evaluation."""

from subspace_meta.tasks.alignment import Synchronisation, UnbalancedProcrustes, Wahba
from subspace_meta.tasks.base import Problem, TaskFamily
from subspace_meta.tasks.classification import LogisticRegression, OrthonormalClassification, OrthonormalClassifier
from subspace_meta.tasks.clustering import SphericalKMeans
from subspace_meta.tasks.covariances import IncompleteCovariance, KarcherMeans, MetricLearning
from subspace_meta.tasks.discriminant import TraceRatio
from subspace_meta.tasks.eigenvalues import LeadingSubspace, OrderedEigenvectors, RayleighQuotient
from subspace_meta.tasks.graphs import MaxCut
from subspace_meta.tasks.held_out import held_out_suite
from subspace_meta.tasks.low_rank import LowRankFactorisation, MatrixCompletion
from subspace_meta.tasks.networks import AddingProblem, NetworkClassification
from subspace_meta.tasks.pca import SampledPCA, SyntheticPCA
from subspace_meta.tasks.robust_subspace import RobustSubspace
from subspace_meta.tasks.source_separation import IndependentComponents, JointDiagonalisation
from subspace_meta.tasks.sparse import DictionaryLearning, SparsePCA
from subspace_meta.tasks.suite import SuiteTask, evaluation_suite

__all__ = [
    "AddingProblem",
    "DictionaryLearning",
    "IncompleteCovariance",
    "IndependentComponents",
    "JointDiagonalisation",
    "KarcherMeans",
    "LeadingSubspace",
    "LogisticRegression",
    "LowRankFactorisation",
    "MatrixCompletion",
    "MaxCut",
    "MetricLearning",
    "NetworkClassification",
    "OrderedEigenvectors",
    "OrthonormalClassification",
    "OrthonormalClassifier",
    "Problem",
    "RayleighQuotient",
    "RobustSubspace",
    "SampledPCA",
    "SparsePCA",
    "SphericalKMeans",
    "SuiteTask",
    "Synchronisation",
    "SyntheticPCA",
    "TaskFamily",
    "TraceRatio",
    "UnbalancedProcrustes",
    "Wahba",
    "evaluation_suite",
    "held_out_suite",
]
