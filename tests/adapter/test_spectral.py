"""The orthonormal factor by Newton-Schulz steps on the Gram matrix, against the singular value decomposition."""

import pytest
import torch
from making import normal

from subspace_meta.adapter.spectral import COEFFICIENTS, spectral_direction, spectral_factor


def mix(direction, share):
    squares = direction.square().sum(dim=(-2, -1)) / direction.shape[-1]
    shares = torch.full(direction.shape[:-2], share, dtype=direction.dtype)
    return spectral_direction(direction, squares, tuple(direction.shape[-2:]), shares)


@pytest.mark.parametrize("shape", [(7, 3), (3, 7), (5, 5), (2, 6, 2), (4, 1)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_against_singular_values(shape, scale):
    direction = scale * normal(*shape)
    left, values, right = torch.linalg.svd(direction, full_matrices=False)
    values = values / values.square().sum(dim=-1, keepdim=True).sqrt()
    for a, b, c in COEFFICIENTS:
        values = a * values + b * values**3 + c * values**5
    assert ((values > 0.72) & (values < 1.28)).all(), "near 1, as the coefficients promise"
    factor = left @ torch.diag_embed(values) @ right
    factor = factor * (shape[-1] / factor.square().sum(dim=(-2, -1), keepdim=True)).sqrt()
    plain = direction * (shape[-1] / direction.square().sum(dim=(-2, -1), keepdim=True)).sqrt()
    for share in (0.0, 0.3, 1.0):
        found, squares = mix(direction, share)
        wanted = plain + share * (factor - plain)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(squares, wanted.square().sum(dim=(-2, -1)) / shape[-1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_stays_nothing(dtype):
    found, squares = mix(torch.zeros(3, 4, 2, dtype=dtype), 0.5)
    assert (found == 0).all()
    assert (squares == 0).all()


def test_what_is_promised_of_singular_values():
    """From 1/100 to 1 they end within 0.27 of 1; smaller ones grow, by at most 78."""
    values = torch.logspace(-4, 0, 401, dtype=torch.float64)
    ends = values * spectral_factor(torch.diag(values.square()), torch.eye(401, dtype=torch.float64)).diagonal()
    large = values >= 0.01
    assert (ends[large] - 1).abs().max() < 0.2702
    assert (ends[~large] / values[~large]).max() < 78.4
    assert (ends > 0).all()
