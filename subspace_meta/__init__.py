"""subspace-meta: a learned Riemannian optimizer for PyTorch.

One small network adapts the rows and the columns of every Riemannian gradient, whatever its size. The public names are
those listed here; see the README for a first example.
"""

from subspace_meta._version import __version__
from subspace_meta.checkpoint import CheckpointError, load_weights, save_weights
from subspace_meta.geometry import Geometry, MatrixView, Rule
from subspace_meta.manifolds import CholeskyQR, Euclidean, Grassmann, Manifold, PolarNewtonSchulz, Stiefel
from subspace_meta.optimizers import RASA, RSGD, Optimizer, RAdam, SubspaceOptimizer
from subspace_meta.optimizers.subspace import PRESETS
from subspace_meta.weights import pretrained

__all__ = [
    "PRESETS",
    "RASA",
    "RSGD",
    "CheckpointError",
    "CholeskyQR",
    "Euclidean",
    "Geometry",
    "Grassmann",
    "Manifold",
    "MatrixView",
    "Optimizer",
    "PolarNewtonSchulz",
    "RAdam",
    "Rule",
    "Stiefel",
    "SubspaceOptimizer",
    "__version__",
    "load_weights",
    "pretrained",
    "save_weights",
]
