"""A product of manifolds inside one matrix: blocks of rows (or of columns), each on its own manifold.

:class:`~subspace_meta.Geometry` already is the product over *named* parameters, and the faster and clearer choice when
the factors are tensors of their own. Use :class:`Product` when one tensor holds several factors and must be treated as
one matrix: the stacked factors [U; V] of a low-rank model U V^T, whose columns belong together and share one column
scale, or an orthonormal block with a Euclidean one in the same weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from subspace_meta.manifolds.base import Manifold, root


@dataclass(frozen=True)
class Product(Manifold):
    """Matrices whose blocks of rows (``axis`` = -2) or of columns (``axis`` = -1) lie on ``factors``.

    ``sizes`` says how many rows (columns) each block has. The metric is the sum of the factors' metrics; everything
    else acts block by block, so transport is isometric if that of every factor is.

    Example:
        >>> from subspace_meta.manifolds import Euclidean, Product, Stiefel
        >>> Product((Stiefel(), Euclidean()), sizes=(8, 3)).dimension((11, 2))
        19

    Raises:
        ValueError: no factor, not one size for every factor, a size below 1, or another axis.
    """

    factors: tuple[Manifold, ...]
    sizes: tuple[int, ...]
    axis: int = -2

    def __post_init__(self) -> None:
        object.__setattr__(self, "factors", tuple(self.factors))
        object.__setattr__(self, "sizes", tuple(self.sizes))
        if not self.factors or len(self.factors) != len(self.sizes):
            raise ValueError(f"Product needs one size for each factor, got {len(self.sizes)} for {len(self.factors)}")
        if min(self.sizes) < 1:
            raise ValueError(f"Product needs positive sizes, got {self.sizes}")
        if self.axis not in (-2, -1):
            raise ValueError(f"Product's axis is -2 (blocks of rows) or -1 (blocks of columns), got {self.axis}")

    @property
    def name(self) -> str:
        """The factors' names with their sizes."""
        parts = (f"{factor.name}[{size}]" for factor, size in zip(self.factors, self.sizes, strict=True))
        return f"Product({', '.join(parts)})"

    @property
    def retraction_order(self) -> float:
        """The least of the factors' orders."""
        return min(factor.retraction_order for factor in self.factors)

    @property
    def isometric_transport(self) -> bool:
        """Whether every factor's transport is isometric."""
        return all(factor.isometric_transport for factor in self.factors)

    @property
    def has_distance(self) -> bool:
        """Whether every factor has a distance."""
        return all(factor.has_distance for factor in self.factors)

    def _shapes(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Return the shapes of the blocks."""
        axis = len(shape) + self.axis
        return [(*shape[:axis], size, *shape[axis + 1 :]) for size in self.sizes]

    def _split(self, tensors: Sequence[Tensor]) -> list[tuple[Manifold, tuple[Tensor, ...]]]:
        """Pair every factor with its blocks of all ``tensors``."""
        blocks = zip(*(torch.split(tensor, list(self.sizes), dim=self.axis) for tensor in tensors), strict=True)
        return list(zip(self.factors, blocks, strict=True))

    def _join(self, blocks: Sequence[Tensor]) -> Tensor:
        """Put blocks together."""
        return torch.cat(tuple(blocks), dim=self.axis)

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raise ``ValueError`` unless the blocks fill the axis and every factor accepts its block."""
        if len(shape) < 2 or shape[self.axis] != sum(self.sizes):
            side = "rows" if self.axis == -2 else "columns"
            raise ValueError(f"{self.name} needs {sum(self.sizes)} {side}, got shape {tuple(shape)}")
        for factor, block in zip(self.factors, self._shapes(shape), strict=True):
            factor.check_shape(block)

    def dimension(self, shape: tuple[int, ...]) -> int:
        """Return the sum of the factors' dimensions."""
        return sum(factor.dimension(block) for factor, block in zip(self.factors, self._shapes(shape), strict=True))

    def project(self, x: Tensor, v: Tensor) -> Tensor:
        """Project block by block."""
        return self._join([factor.project(*block) for factor, block in self._split((x, v))])

    def riemannian_gradient(self, x: Tensor, euclidean_gradient: Tensor) -> Tensor:
        """Turn the gradient block by block."""
        blocks = self._split((x, euclidean_gradient))
        return self._join([factor.riemannian_gradient(*block) for factor, block in blocks])

    def inner(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Return the sum of the factors' inner products."""
        return torch.stack([factor.inner(*block) for factor, block in self._split((x, u, v))]).sum(dim=0)

    def retract(self, x: Tensor, v: Tensor) -> Tensor:
        """Retract block by block; each factor bounds its own step."""
        return self._join([factor.retract(*block) for factor, block in self._split((x, v))])

    def transport(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Transport block by block."""
        return self._join([factor.transport(*block) for factor, block in self._split((x, y, v))])

    def exp(self, x: Tensor, v: Tensor) -> Tensor:
        """Follow every factor's geodesic."""
        return self._join([factor.exp(*block) for factor, block in self._split((x, v))])

    def log(self, x: Tensor, y: Tensor) -> Tensor:
        """Take every factor's logarithm."""
        return self._join([factor.log(*block) for factor, block in self._split((x, y))])

    def squared_distance(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the sum of the factors' squared distances."""
        return torch.stack([factor.squared_distance(*block) for factor, block in self._split((x, y))]).sum(dim=0)

    def norm(self, x: Tensor, v: Tensor) -> Tensor:
        """Return the root of the sum of the factors' squared norms."""
        norms = torch.stack([factor.norm(*block) for factor, block in self._split((x, v))])
        largest = norms.detach().amax(dim=0)
        largest = torch.where(largest > 0, largest, 1.0)
        return root((norms / largest).square().sum(dim=0)) * largest

    def nearest(self, x: Tensor) -> Tensor:
        """Take the nearest point block by block."""
        self.check_shape(x.shape)
        return self._join([factor.nearest(*block) for factor, block in self._split((x,))])

    def random_point(
        self,
        shape: tuple[int, ...],
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw block by block."""
        self.check_shape(shape)
        shapes = zip(self.factors, self._shapes(shape), strict=True)
        return self._join([factor.random_point(block, generator, dtype, device) for factor, block in shapes])

    def violation(self, x: Tensor) -> Tensor:
        """Return the largest of the factors' violations."""
        return torch.stack([factor.violation(*block) for factor, block in self._split((x,))]).amax(dim=0)

    def random_tangent(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw block by block."""
        return self._join([factor.random_tangent(block, generator) for factor, (block,) in self._split((x,))])

    def coordinates(self, x: Tensor, v: Tensor) -> Tensor:
        """Change coordinates block by block."""
        return self._join([factor.coordinates(*block) for factor, block in self._split((x, v))])

    def from_coordinates(self, x: Tensor, v: Tensor) -> Tensor:
        """Change coordinates back block by block."""
        return self._join([factor.from_coordinates(*block) for factor, block in self._split((x, v))])
