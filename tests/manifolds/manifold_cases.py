"""Every manifold with every retraction it takes, at a small shape: what the battery runs over."""

from __future__ import annotations

import torch

from subspace_meta.manifolds import (
    SPD,
    Cayley,
    CholeskyQR,
    Euclidean,
    Geodesic,
    Grassmann,
    HouseholderQR,
    Manifold,
    Normalization,
    Oblique,
    Orthogonal,
    PolarNewtonSchulz,
    Product,
    Rotations,
    SPDExponential,
    SPDSecondOrder,
    Sphere,
    SphereExponential,
    Stiefel,
    StiefelCanonical,
)

ORTHONORMAL = (
    CholeskyQR(),
    HouseholderQR(),
    PolarNewtonSchulz(),
    Cayley(),
    Geodesic("embedded"),
    Geodesic("canonical"),
)

CASES: list[tuple[Manifold, tuple[int, ...]]] = [
    (Euclidean(), (2, 6, 4)),
    *[(family(r), (2, 6, 4)) for family in (Stiefel, StiefelCanonical, Grassmann) for r in ORTHONORMAL],
    *[(family(r), (2, 5, 5)) for family in (Rotations, Orthogonal) for r in ORTHONORMAL],
    *[(family(r), (2, 6, 4)) for family in (Sphere, Oblique) for r in (Normalization(), SphereExponential())],
    *[(SPD(r), (2, 5, 5)) for r in (SPDSecondOrder(), SPDExponential())],
    (Product((Stiefel(), Sphere(), Euclidean()), (6, 4, 3)), (2, 13, 4)),
    (Product((Oblique(), SPD()), (4, 6), axis=-1), (2, 6, 10)),
]

# One retraction per manifold, and one manifold per retraction: for the slower checks.
FEW = [
    case
    for case in CASES
    if case[0] in (Euclidean(), Stiefel(), StiefelCanonical(), Grassmann(), Rotations(), Orthogonal(), Sphere(), SPD())
    or case[0] in (Oblique(SphereExponential()), Stiefel(HouseholderQR()), Stiefel(Geodesic()), SPD(SPDExponential()))
    or isinstance(case[0], Product)
]


def label(case: tuple[Manifold, tuple[int, ...]]) -> str:
    """Name a case in pytest's output."""
    manifold, _ = case
    retraction = getattr(manifold, "retraction", None)
    text = type(retraction).__name__ if retraction is not None else "-".join(manifold.name.split(", "))
    return f"{type(manifold).__name__}-{text}{getattr(retraction, 'metric', '')}"


def seeded(seed: int = 0) -> torch.Generator:
    """A generator with a seed."""
    return torch.Generator().manual_seed(seed)


def spectral(v: torch.Tensor) -> torch.Tensor:
    """Scale matrices to spectral norm 1."""
    return v / torch.linalg.matrix_norm(v, 2)[..., None, None]


def step_of_norm(manifold: Manifold, x: torch.Tensor, length: float, rank: int | None = None, seed: int = 1):
    """A tangent of spectral norm ``length`` (in whitened coordinates on SPD), of rank about ``rank`` if given."""
    generator = seeded(seed)
    if rank is None:
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    else:
        left = torch.randn((*x.shape[:-1], rank), generator=generator, dtype=x.dtype)
        right = torch.randn((*x.shape[:-2], rank, x.shape[-1]), generator=generator, dtype=x.dtype)
        noise = left @ right
    if isinstance(manifold, SPD):
        root = torch.linalg.cholesky(x)
        return root @ (length * spectral(noise + noise.mT)) @ root.mT
    return length * spectral(manifold.project(x, noise))
