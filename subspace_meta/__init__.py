"""subspace-meta: a learned Riemannian optimizer for PyTorch.

One small network adapts the rows and the columns of every Riemannian gradient, whatever its size. The public names are
those listed here; see the README for a first example.
"""

from subspace_meta import optim as optim
from subspace_meta._version import __version__
from subspace_meta.checkpoint import CheckpointError, load_weights, save_weights
from subspace_meta.geometry import Geometry, MatrixView, Rule
from subspace_meta.manifolds import (
    SPD,
    Cayley,
    CholeskyQR,
    Euclidean,
    Geodesic,
    Grassmann,
    HouseholderQR,
    Manifold,
    ManifoldCheckError,
    ManifoldReport,
    Normalization,
    Oblique,
    Orthogonal,
    OrthonormalRetraction,
    PolarNewtonSchulz,
    Product,
    Rotations,
    SPDExponential,
    SPDSecondOrder,
    Sphere,
    SphereExponential,
    Stiefel,
    StiefelCanonical,
    check_manifold,
)
from subspace_meta.optimizers import (
    POGO,
    RASA,
    RSDM,
    RSGD,
    SPEL,
    CRMSProp,
    Landing,
    MatrixLSTM,
    Optimizer,
    RAdam,
    SubspaceOptimizer,
)
from subspace_meta.optimizers.subspace import PRESETS
from subspace_meta.weights import pretrained

__all__ = [
    "POGO",
    "PRESETS",
    "RASA",
    "RSDM",
    "RSGD",
    "SPD",
    "SPEL",
    "CRMSProp",
    "Cayley",
    "CheckpointError",
    "CholeskyQR",
    "Euclidean",
    "Geodesic",
    "Geometry",
    "Grassmann",
    "HouseholderQR",
    "Landing",
    "Manifold",
    "ManifoldCheckError",
    "ManifoldReport",
    "MatrixLSTM",
    "MatrixView",
    "Normalization",
    "Oblique",
    "Optimizer",
    "Orthogonal",
    "OrthonormalRetraction",
    "PolarNewtonSchulz",
    "Product",
    "RAdam",
    "Rotations",
    "Rule",
    "SPDExponential",
    "SPDSecondOrder",
    "Sphere",
    "SphereExponential",
    "Stiefel",
    "StiefelCanonical",
    "SubspaceOptimizer",
    "__version__",
    "check_manifold",
    "load_weights",
    "pretrained",
    "save_weights",
]
