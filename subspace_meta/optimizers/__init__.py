"""Optimizers as pure functions: hand-made and learned, with one contract."""

from subspace_meta.optimizers.adaptive import RAdaGD, RAdGD
from subspace_meta.optimizers.averaging import Averaging
from subspace_meta.optimizers.base import Optimizer
from subspace_meta.optimizers.intrinsic_muon import IntrinsicMuon
from subspace_meta.optimizers.landing import Landing
from subspace_meta.optimizers.manifold_muon import ManifoldMuon
from subspace_meta.optimizers.matrix_lstm import MatrixLSTM
from subspace_meta.optimizers.pogo import POGO
from subspace_meta.optimizers.radam import RAdam
from subspace_meta.optimizers.rasa import RASA
from subspace_meta.optimizers.rdog import RDoG
from subspace_meta.optimizers.rmsprop import CRMSProp
from subspace_meta.optimizers.rsdm import RSDM
from subspace_meta.optimizers.rsgd import RSGD
from subspace_meta.optimizers.spel import SPEL
from subspace_meta.optimizers.subspace import SubspaceOptimizer

__all__ = [
    "POGO",
    "RASA",
    "RSDM",
    "RSGD",
    "SPEL",
    "Averaging",
    "CRMSProp",
    "IntrinsicMuon",
    "Landing",
    "ManifoldMuon",
    "MatrixLSTM",
    "Optimizer",
    "RAdGD",
    "RAdaGD",
    "RAdam",
    "RDoG",
    "SubspaceOptimizer",
]
