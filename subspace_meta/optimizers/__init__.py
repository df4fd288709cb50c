"""Optimizers as pure functions: hand-made and learned, with one contract."""

from subspace_meta.optimizers.base import Optimizer
from subspace_meta.optimizers.radam import RAdam
from subspace_meta.optimizers.rasa import RASA
from subspace_meta.optimizers.rsgd import RSGD
from subspace_meta.optimizers.subspace import SubspaceOptimizer

__all__ = ["RASA", "RSGD", "Optimizer", "RAdam", "SubspaceOptimizer"]
