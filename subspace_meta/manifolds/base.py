"""The contract that every manifold keeps, and the two linear-algebra words that all of them use.

A manifold is a frozen, hashable value object: it holds settings (its retraction, say) and no tensors. Its methods are
pure functions of tensors whose last two dimensions are the matrix, ``(..., d, p)``; leading dimensions are a batch.
They work under ``torch.func.grad``, ``vmap`` and ``torch.compile(fullgraph=True)``, and never look at values: no data
dependent branch, no exception about numbers. Shapes are checked once, by :meth:`Manifold.check_shape`.
"""

from __future__ import annotations

import abc

import torch
from torch import Tensor


class Manifold(abc.ABC):
    """A matrix manifold embedded in R^{d x p} (the contract; see the module's text).

    Subclasses are frozen dataclasses and final. ``x`` is a point, ``u`` and ``v`` are tangent vectors at ``x``, all of
    shape ``(..., d, p)``.
    """

    @property
    def name(self) -> str:
        """The field's name of the manifold, as printed in tables."""
        return type(self).__name__

    @abc.abstractmethod
    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raise ``ValueError`` naming ``shape`` and what would be right, if points cannot have that shape."""

    @abc.abstractmethod
    def dimension(self, shape: tuple[int, ...]) -> int:
        """Return the dimension of the manifold of points of shape ``(..., d, p)``, summed over the batch."""

    @abc.abstractmethod
    def project(self, x: Tensor, v: Tensor) -> Tensor:
        """Project an ambient ``v`` on the tangent space at ``x``, orthogonally in the manifold's metric."""

    @abc.abstractmethod
    def riemannian_gradient(self, x: Tensor, euclidean_gradient: Tensor) -> Tensor:
        """Turn the Euclidean gradient at ``x`` into the Riemannian one: <grad, v>_x = tr(G^T v) for tangent v."""

    @abc.abstractmethod
    def inner(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Return the metric <u, v>_x, of shape ``(...)``."""

    @abc.abstractmethod
    def retract(self, x: Tensor, v: Tensor) -> Tensor:
        """Move from ``x`` along the tangent ``v`` and come back to the manifold."""

    @abc.abstractmethod
    def transport(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Carry the tangent ``v`` at ``x`` to the tangent space at ``y``. Linear in ``v``."""

    @abc.abstractmethod
    def nearest(self, x: Tensor) -> Tensor:
        """Return the nearest point (Frobenius norm) to an ambient ``x``. Used at set-up; its derivative is not."""

    @abc.abstractmethod
    def random_point(
        self,
        shape: tuple[int, ...],
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw a random point of shape ``(..., d, p)``; uniform where the manifold is compact."""

    @abc.abstractmethod
    def violation(self, x: Tensor) -> Tensor:
        """Return the largest absolute constraint error of ``x``, of shape ``(...)``; 0 on the manifold."""

    def random_tangent(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw a tangent vector at ``x``: the projection of a standard normal matrix."""
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        return self.project(x, noise)

    def coordinates(self, x: Tensor, v: Tensor) -> Tensor:
        """Return ``v`` in coordinates in which the metric at ``x`` is Euclidean; there statistics are taken.

        The identity for every embedded metric.
        """
        return v

    def from_coordinates(self, x: Tensor, v: Tensor) -> Tensor:
        """Invert :meth:`coordinates`. The result need not be tangent: project it."""
        return v


def symmetric_part(a: Tensor) -> Tensor:
    """Return (A + A^T) / 2 of a ``(..., p, p)`` tensor."""
    return 0.5 * (a + a.mT)


def euclidean_inner(u: Tensor, v: Tensor) -> Tensor:
    """Return tr(U^T V) of ``(..., d, p)`` tensors, of shape ``(...)``."""
    return (u * v).sum(dim=(-2, -1))


def gram_error(x: Tensor) -> Tensor:
    """Return the largest absolute entry of X^T X - I, of shape ``(...)``."""
    identity = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    return (x.mT @ x - identity).abs().amax(dim=(-2, -1))
