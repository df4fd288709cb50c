"""Optimization problems on manifolds, for meta-training and for evaluation."""

from subspace_meta.tasks.base import Problem, TaskFamily
from subspace_meta.tasks.classification import OrthonormalClassification, OrthonormalClassifier
from subspace_meta.tasks.pca import SampledPCA, SyntheticPCA

__all__ = ["OrthonormalClassification", "OrthonormalClassifier", "Problem", "SampledPCA", "SyntheticPCA", "TaskFamily"]
