"""R^{d x p} itself, so that unconstrained parameters go through the same optimizer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from subspace_meta.manifolds.base import Manifold, embedded_inner


@dataclass(frozen=True)
class Euclidean(Manifold):
    """The flat space of matrices. Everything is in closed form and the transport is the identity."""

    @property
    def retraction_order(self) -> float:
        """Infinite: X + V is the exponential."""
        return math.inf

    @property
    def isometric_transport(self) -> bool:
        """True."""
        return True

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Accept every shape with at least two dimensions."""
        if len(shape) < 2:
            raise ValueError(f"Euclidean needs matrices of shape (..., d, p), got {tuple(shape)}")

    def dimension(self, shape: tuple[int, ...]) -> int:
        """Return the number of entries."""
        return math.prod(shape)

    def project(self, x: Tensor, v: Tensor) -> Tensor:
        """Return ``v``."""
        return v.to(x.dtype)

    def riemannian_gradient(self, x: Tensor, euclidean_gradient: Tensor) -> Tensor:
        """Return the gradient itself."""
        return euclidean_gradient.to(x.dtype)

    def inner(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Return tr(U^T V)."""
        return embedded_inner(x, u, v)

    def retract(self, x: Tensor, v: Tensor) -> Tensor:
        """Return X + V."""
        return x + v

    def transport(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Return ``v``, as often as there are points: all tangent spaces are one."""
        carried: Tensor = torch.broadcast_tensors(v.to(x.dtype), y)[0]  # type: ignore[no-untyped-call]
        return carried

    def exp(self, x: Tensor, v: Tensor) -> Tensor:
        """Return X + V."""
        return x + v

    def log(self, x: Tensor, y: Tensor) -> Tensor:
        """Return Y - X."""
        return y - x

    def squared_distance(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the squared Frobenius norm of Y - X."""
        apart = y - x
        return embedded_inner(x, apart, apart)

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the Frobenius norm of Y - X; no square overflows."""
        return self.norm(x, y - x)

    def nearest(self, x: Tensor) -> Tensor:
        """Return ``x``."""
        self.check_shape(x.shape)
        return x

    def random_point(
        self,
        shape: tuple[int, ...],
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw independent standard normal entries."""
        self.check_shape(shape)
        return torch.randn(shape, generator=generator, dtype=dtype, device=device)

    def violation(self, x: Tensor) -> Tensor:
        """Return 0: nothing is constrained."""
        return torch.zeros(x.shape[:-2], dtype=x.dtype, device=x.device)
