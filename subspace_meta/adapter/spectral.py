"""The orthonormal factor of a direction, by Newton-Schulz iterations on its Gram matrix.

A direction D = U S V^T moves most along the few singular vectors with large S. Its orthonormal (polar) factor U V^T
moves along all of them alike, which is the steepest direction where the spectral norm measures lengths (Carlson,
Cevher, Carin, "Stochastic spectral descent", AISTATS 2015; Jordan et al., "Muon", 2024). Each iteration has quintic
coefficients of its own, those with the least error on the interval that the one before leaves (Amsel, Persson, Musco,
Gower, "The Polar Express", arXiv 2505.16932): three bring every singular value from |D|_F/100 to |D|_F to 1 within
0.27, not to it exactly, which suffices here; Muon's five, all alike, within 0.32 from |D|_F/500. Smaller ones grow by
a factor of at most 78.

Everything is a product with matrices of the shorter side, so D itself is read twice: 4 d p^2 + 22 p^3 flops for d >= p.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from subspace_meta.adapter.features import TINY

COEFFICIENTS = ((8.0934, -23.6204, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526))

NOTHING = 1e-12  # mean squared column length below which a matrix of norm 1 has none


def spectral_factor(gram: Tensor, eye: Tensor) -> Tensor:
    """Return W with D W near the orthonormal factor of D, for D of Frobenius norm 1.

    Args:
        gram: D^T D, ``(..., n, n)``.
        eye: the identity, ``(n, n)``.
    """
    factor = eye
    for iteration, (a, b, c) in enumerate(COEFFICIENTS):
        # X <- X q(X^T X); every matrix here is a polynomial of the first one, so all of them commute.
        polynomial = a * eye + gram @ (b * eye + c * gram)
        factor = factor @ polynomial if iteration else polynomial
        if iteration + 1 < len(COEFFICIENTS):
            gram = polynomial @ gram @ polynomial
    return factor


def spectral_direction(
    direction: Tensor, squares: Tensor, size: tuple[int, int], share: Tensor
) -> tuple[Tensor, Tensor]:
    """Mix a direction with its orthonormal factor, both first scaled to columns of root mean square length 1.

    Args:
        direction: D, ``(..., d, p)``.
        squares: the mean squared length of its columns, ``(...)``; a larger number makes D count for less.
        size: the true ``(d, p)`` if D is padded with zeros.
        share: of the orthonormal factor, ``(...)``, in 0..1.

    Returns:
        The mixed direction, ``(..., d, p)``, and the mean squared length of its columns, ``(...)``. Like D itself it
        follows permutations of rows and columns, and it is the same on every copy if they are duplicated. Where D
        vanishes it vanishes.
    """
    p, tall = size[1], direction.shape[-2] >= direction.shape[-1]
    # Everything below is of norm about 1, so that nothing overflows where D vanishes.
    scale = 1.0 / (squares * p + TINY).sqrt()[..., None, None]
    gram = (direction.mT @ direction if tall else direction @ direction.mT) * scale * scale
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    share = share[..., None, None]
    factor = spectral_factor(gram, eye)

    def column_squares(polynomial: Tensor) -> Tensor:
        """Return the mean squared column length of the scaled D times a polynomial of its Gram matrix.

        The two commute. Not ``polynomial * (gram @ polynomial)``: torch 2.13 compiles the derivative of that wrongly
        (it overwrites a buffer that is still read).
        """
        return (gram * (polynomial @ polynomial)).sum(dim=(-2, -1)) / p

    factor = factor / (column_squares(factor)[..., None, None] + NOTHING).sqrt()
    mixed = math.sqrt(p) * eye
    mixed = mixed + share * (factor - mixed)
    return (direction @ (scale * mixed) if tall else (scale * mixed) @ direction), column_squares(mixed)
