"""Randomized Riemannian submanifold descent: every step turns a random r-dimensional subspace of R^d, by an r x r turn.

Source: Han, Poirion, Takeda, "Efficient optimization with orthogonality constraint: a randomized Riemannian submanifold
method", ICML 2025 (arXiv 2505.12378). With a random P of r orthonormal rows and the Euclidean gradient G,

    Y = qf(I - lr skew(P G X^T P^T)) in O(r),    X <- X + P^T (Y - I) P X.

*Permutation* sampling takes r rows of X (r = 2: a Givens rotation), *orthogonal* sampling a uniform subspace. Cost
beside the gradient: a retraction of r x r, and 4pr^2 flops; orthogonal sampling 6dpr more and QR of d x r.

X is only ever multiplied by orthogonal matrices, so nothing takes rounding errors away again: X^T X - I grows like the
root of the number of steps (float32, 20 x 3, r = 10: 3e-6 after 1,000 steps, 1.6e-5 after 10,000);
``geometry.project`` removes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from subspace_meta.geometry import Geometry, Params
from subspace_meta.manifolds import CholeskyQR, Grassmann
from subspace_meta.manifolds.base import identity_like, skew_part
from subspace_meta.manifolds.retractions import positive_qr
from subspace_meta.optimizers.base import ORTHONORMAL, check_manifolds, check_rate, check_start, gather_euclidean

# On O(r), as in the paper's experiments.
RETRACTION = CholeskyQR()
_BITS = 0xFFFFFFFF


def hashed(*values: Tensor | int) -> Tensor:
    """Return 32 pseudo-random bits, as int64, for each combination of the broadcast ``values``, at least one a tensor.

    A counter-based generator: a pure function, so that a step works under vmap and torch.compile and can be repeated.
    The mixing is Wellons' (hash-prospector, multipliers 21f0aaad and d35a2d97); the second multiplier is written minus
    2^32, so that no product leaves int64.
    """
    bits: Tensor | int = 0
    for value in values:
        bits = (bits + value) & _BITS
        bits = ((bits ^ (bits >> 16)) * 0x21F0AAAD) & _BITS
        bits = ((bits ^ (bits >> 15)) * (0xD35A2D97 - 2**32)) & _BITS
        bits = bits ^ (bits >> 15)
    assert isinstance(bits, Tensor)
    return bits


def random_rows(count: int, d: int, size: int, *key: Tensor | int) -> Tensor:
    """Return ``(count, size)`` distinct row numbers below ``d``, uniformly drawn for this key."""
    bits = hashed(*key, _numbers(count, d, key))
    return bits.argsort(dim=-1)[..., :size]


def random_frames(count: int, d: int, size: int, dtype: torch.dtype, *key: Tensor | int) -> Tensor:
    """Return ``(count, d, size)`` matrices with orthonormal columns, uniformly drawn for this key (Box and Muller)."""
    numbers = _numbers(count, d * size, key)
    first, second = ((hashed(*key, half, numbers).double() + 0.5) / 2**32 for half in (0, 1))
    normal = (-2.0 * first.log()).sqrt() * torch.cos(2.0 * math.pi * second)
    return positive_qr(normal.reshape(count, d, size)).to(dtype)


def _numbers(count: int, entries: int, key: tuple[Tensor | int, ...]) -> Tensor:
    device = next(value.device for value in key if isinstance(value, Tensor))
    return torch.arange(count * entries, device=device).reshape(count, entries)


class RSDMState(NamedTuple):
    """Seed and step count, int64 scalars: all that the random choices depend on."""

    seed: Tensor
    step: Tensor


@dataclass(frozen=True)
class RSDM:
    """Randomized submanifold descent, on Stiefel (either metric), orthogonal matrices, rotations and Grassmann.

    Every matrix has a choice of its own at every step. Tasks under ``vmap`` share the choices unless their states have
    different seeds: ``state._replace(seed=torch.arange(tasks))``.

    Attributes:
        geometry: where the parameters live.
        lr: learning rate; a float or a scalar tensor.
        size: r, from 2 to the number of rows.
        sampling: ``"permutation"`` or ``"orthogonal"``.
        seed: of the random choices.

    Raises:
        ValueError: a setting is out of its range, or a parameter lives elsewhere (Euclidean ones included).
    """

    geometry: Geometry
    lr: float | Tensor
    size: int
    sampling: Literal["permutation", "orthogonal"] = "permutation"
    seed: int = 0

    def __post_init__(self) -> None:
        check_rate(self.lr)
        check_manifolds(self.geometry, "RSDM", (*ORTHONORMAL, Grassmann))
        if self.sampling not in ("permutation", "orthogonal"):
            raise ValueError(f"sampling must be 'permutation' or 'orthogonal', got {self.sampling!r}")
        for parameter in self.geometry.parameters:
            rows = parameter.matrix_shape[-2]
            if not 2 <= self.size <= rows:
                raise ValueError(f"size must be from 2 to {rows}, the rows of {parameter.name!r}, got {self.size}")

    def init(self, params: Mapping[str, Tensor]) -> RSDMState:
        """Return the seed and step 0."""
        check_start(self.geometry, params)
        step = torch.zeros((), dtype=torch.int64, device=next(iter(params.values())).device)
        return RSDMState(torch.full_like(step, self.seed), step)

    def update(
        self, grads: Mapping[str, Tensor], state: RSDMState, params: Mapping[str, Tensor], value: Tensor | None = None
    ) -> tuple[Params, RSDMState]:
        """Take one step; see :meth:`subspace_meta.optimizers.base.Optimizer.update`."""
        points, gradients = self.geometry.gather(params), gather_euclidean(self.geometry, grads)
        moved = [
            self._move(x, g.to(x.dtype), state, group)
            for group, (x, g) in enumerate(zip(points, gradients, strict=True))
        ]
        return self.geometry.scatter(moved), state._replace(step=state.step + 1)

    def _move(self, x: Tensor, g: Tensor, state: RSDMState, group: int) -> Tensor:
        batch, (d, p) = x.shape[:-2], x.shape[-2:]
        key = (state.seed, state.step, group)
        if self.sampling == "orthogonal":
            frame = random_frames(batch.numel(), d, self.size, x.dtype, *key).reshape(*batch, d, self.size)
            rows = frame.mT @ x
            return x + frame @ (self._turned(rows, frame.mT @ g) - rows)
        chosen = random_rows(batch.numel(), d, self.size, *key).reshape(*batch, self.size)
        chosen = chosen[..., None].expand(*chosen.shape, p)
        rows = x.gather(-2, chosen)
        return x.scatter(-2, chosen, self._turned(rows, g.gather(-2, chosen)))

    def _turned(self, rows: Tensor, gradient: Tensor) -> Tensor:
        """Return Y times the ``(..., r, p)`` rows."""
        gradient = skew_part(gradient @ rows.mT)
        return RETRACTION(identity_like(gradient).expand_as(gradient), -self.lr * gradient) @ rows
