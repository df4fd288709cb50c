"""POGO, the proximal one-step geometric orthoptimizer: a tangent step and one Newton-Schulz step back.

Source: Javaloy and Vergari, "An embarrassingly simple way to optimize orthogonal matrices at scale", 2026 (arXiv
2602.14656); facts of the step from its published implementation. With S = skew(G X^T) X, the landing algorithm's
tangent part,

    A = X - lr S,    X <- A + lambda A (I - A^T A),    lambda = 1/2,

and A^T A = X^T X + lr^2 S^T S exactly, so an orthonormal X is left by a fourth power of the step's length only. The
paper's other choice of lambda, a root of a quartic polynomial, is not here. G comes from a Euclidean optimizer, the
``base``, with gradients G_t of the loss:

    sgd            M <- momentum M + G_t,    G = M
    vector_adam    M <- b_1 M + (1 - b_1) G_t,    v <- b_2 v + (1 - b_2) |G_t|_F^2,
                   G = M / (1 - b_1^t) / (sqrt(v / (1 - b_2^t)) + eps)
    muon           M as of sgd,    G = q(q(q(M / (|M|_F + 1e-7)))),
                   q(Y) = Y (3.4445 I - 4.7750 Y^T Y + 2.0315 (Y^T Y)^2)

VectorAdam (Ling et al., "VectorAdam for rotation equivariant geometry optimization", 2022, arXiv 2205.13599) has one
second moment for each matrix, not one for each entry: so it follows orthogonal factors. ``muon`` brings the larger
singular values to about 0.7 to 1.2, and in three iterations small ones not so far. Its published code makes each matrix
of a batch one row of what it orthogonalises, so that a single matrix is scaled and no more; here it is the matrix that
is orthogonalised. (The published momentum counts the first gradient 1 + ``momentum`` times; here it is once.)

*Ours* is the bound ``epsilon``. With e = |A^T A - I|_2 < 1 the new error is at most (3 e^2 + e^3) / 4 < e^2, so a step
shortened to |lr S|_2^2 <= sqrt(epsilon) - |X^T X - I|_2 keeps |X^T X - I|_2 <= epsilon. Where no step is that long, and
that is the paper's assumption, this changes nothing. Cost: 14dp^2 flops, 2 of them for the bound; only products.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from subspace_meta.adapter.features import TINY
from subspace_meta.geometry import Geometry, Params
from subspace_meta.manifolds.base import euclidean_inner, gram, identity_like, spectral_bound, without_huge
from subspace_meta.manifolds.retractions import newton_schulz_step
from subspace_meta.optimizers.base import check_decay, check_manifolds, check_rate, check_start, gather_euclidean
from subspace_meta.optimizers.landing import relative_gradient

# Jordan et al., "Muon", 2024: the largest slope at 0 for which singular values stay in about 0.5 to 1.5.
QUINTIC = (3.4445, -4.7750, 2.0315)


def quintic_sign(y: Tensor, steps: int) -> Tensor:
    """Return Muon's rough polar factor of a ``(..., d, p)`` tensor."""
    a, b, c = QUINTIC
    # TINY keeps the root's derivative finite at 0.
    y = y / ((euclidean_inner(y, y)[..., None, None] + TINY).sqrt() + 1e-7)
    for _ in range(steps):
        k = gram(y)
        y = y @ (a * identity_like(y) + b * k + c * (k @ k))
    return y


class POGOState(NamedTuple):
    """Step count; per group a buffer of Euclidean gradients (none without momentum), and energies of VectorAdam."""

    step: Tensor
    momentum: tuple[Tensor, ...]
    energy: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class POGO:
    """POGO with lambda = 1/2, on Stiefel (either metric), orthogonal matrices and rotations.

    Iterates are close to the manifold, not on it: |X^T X - I|_2 <= ``epsilon``, which bounds ``geometry.violation``
    too, and is far less for short steps. ``geometry.project`` ends a run.

    Attributes:
        geometry: where the parameters live.
        lr: learning rate; a float or a scalar tensor.
        momentum: heavy-ball coefficient of the Euclidean gradients, in [0, 1); 0 keeps no buffer. Not of VectorAdam.
        epsilon: bound on the distance from the manifold, in (0, 1); longer steps are shortened.
        base: the Euclidean optimizer, ``"sgd"``, ``"vector_adam"`` or ``"muon"``.
        betas: decays of VectorAdam's first and second moment.
        eps: added to the root of VectorAdam's second moment.
        muon_steps: iterations of ``"muon"``.

    Raises:
        ValueError: a setting is out of its range, or a parameter lives elsewhere (Euclidean ones included).
    """

    geometry: Geometry
    lr: float | Tensor
    momentum: float = 0.0
    epsilon: float = 0.01
    base: Literal["sgd", "vector_adam", "muon"] = "sgd"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    muon_steps: int = 3

    def __post_init__(self) -> None:
        check_rate(self.lr)
        check_decay("momentum", self.momentum)
        check_manifolds(self.geometry, "POGO")
        if not 0.0 < self.epsilon < 1.0:
            raise ValueError(f"epsilon must be in (0, 1), got {self.epsilon}")
        if self.base not in ("sgd", "vector_adam", "muon"):
            raise ValueError(f"base must be 'sgd', 'vector_adam' or 'muon', got {self.base!r}")
        if self.base == "vector_adam" and self.momentum:
            raise ValueError(f"the momentum of base 'vector_adam' is betas[0]; got momentum={self.momentum} as well")
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas must be in [0, 1), got {self.betas}")
        if self.muon_steps < 1:
            raise ValueError(f"muon_steps must be at least 1, got {self.muon_steps}")

    def distance(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return |X^T X - I|_2 of each parameter, of shape ``(...)``: what ``epsilon`` bounds."""
        matrices = {p.name: p.view.to_matrix(params[p.name]) for p in self.geometry.parameters}
        return {name: torch.linalg.matrix_norm(gram(x) - identity_like(x), ord=2) for name, x in matrices.items()}

    def init(self, params: Mapping[str, Tensor]) -> POGOState:
        """Return zero moments; the start must be feasible to 1e-3."""
        check_start(self.geometry, params)
        points = self.geometry.gather(params)
        adaptive = self.base == "vector_adam"
        return POGOState(
            points[0].new_zeros(()),
            tuple(map(torch.zeros_like, points)) if adaptive or self.momentum else (),
            tuple(x.new_zeros(x.shape[:-2]) for x in points) if adaptive else (),
        )

    def update(
        self, grads: Mapping[str, Tensor], state: POGOState, params: Mapping[str, Tensor], value: Tensor | None = None
    ) -> tuple[Params, POGOState]:
        """Take one step; see :meth:`subspace_meta.optimizers.base.Optimizer.update`."""
        points, directions = self.geometry.gather(params), gather_euclidean(self.geometry, grads)
        state = state._replace(step=state.step + 1)
        if self.base == "vector_adam":
            directions, state = self._vector_adam(directions, state)
        elif self.momentum:
            directions = [self.momentum * m + g for m, g in zip(state.momentum, directions, strict=True)]
            state = state._replace(momentum=tuple(directions))
        if self.base == "muon":
            directions = [quintic_sign(g.to(x.dtype), self.muon_steps) for x, g in zip(points, directions, strict=True)]
        moved = [self._move(x, g) for x, g in zip(points, directions, strict=True)]
        return self.geometry.scatter(moved), state

    def _vector_adam(self, gradients: Sequence[Tensor], state: POGOState) -> tuple[list[Tensor], POGOState]:
        beta1, beta2 = self.betas
        correction1, correction2 = 1 - beta1**state.step, 1 - beta2**state.step
        directions, momenta, energies = [], [], []
        for g, m, v in zip(gradients, state.momentum, state.energy, strict=True):
            g = g.to(m.dtype)
            m = torch.lerp(m, g, 1 - beta1)
            v = beta2 * v + (1 - beta2) * euclidean_inner(g, g)
            # TINY keeps the root's derivative finite at a gradient of zero.
            denominator = correction1 * ((v / correction2 + TINY).sqrt() + self.eps)
            directions.append(m / denominator[..., None, None].to(m.dtype))
            momenta.append(m)
            energies.append(v)
        return directions, POGOState(state.step, tuple(momenta), tuple(energies))

    def _move(self, x: Tensor, direction: Tensor) -> Tensor:
        gram_matrix = gram(x)
        step = -self.lr * relative_gradient(x, direction, gram_matrix)
        room = math.sqrt(self.epsilon) - spectral_bound(gram_matrix - identity_like(x))
        room = room.clamp(min=torch.finfo(x.dtype).eps)
        step, inner = without_huge(step, gram)
        shorter = (room / torch.maximum(spectral_bound(inner), room)).sqrt()
        return newton_schulz_step(x + shorter * step)
