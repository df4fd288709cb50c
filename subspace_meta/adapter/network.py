"""The LSTM cell and the heads, coordinate by coordinate, with coordinates along the last dimension.

Tensors are ``(features, N)``, so that every gate is one contiguous slab and the N coordinates are the fast axis.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from subspace_kernels.reference import lstm
from torch import Tensor

Weights = dict[str, Tensor]


def device_of(generator: torch.Generator | None) -> torch.device | None:
    """Return the device of what a generator draws; without one ``None``, which is torch's default device."""
    return None if generator is None else generator.device


def lstm_cell(
    weights: Mapping[str, Tensor], name: str, x: Tensor, hidden: Tensor, cell: Tensor
) -> tuple[Tensor, Tensor]:
    """Advance one LSTM layer by one step (Hochreiter and Schmidhuber 1997, with forget gate).

    Args:
        weights: holds ``name.weight`` (4H, F + H), for features and hidden units side by side, and ``name.bias``
            (4H, 1); gates in the order input, forget, candidate, output.
        name: the layer.
        x: ``(F, N)`` features.
        hidden, cell: ``(H, N)``.

    Returns:
        The new ``hidden`` and ``cell``.
    """
    return lstm(weights[f"{name}.weight"], weights[f"{name}.bias"], x, hidden, cell)


def lstm_shapes(name: str, features: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the weights of one layer."""
    return {
        f"{name}.weight": (4 * hidden, features + hidden),
        f"{name}.bias": (4 * hidden, 1),
    }


def init_lstm(name: str, features: int, hidden: int, generator: torch.Generator | None) -> Weights:
    """Draw the weights of one layer: uniform in +-1/sqrt(H); the forget gate starts open (bias 1)."""
    bound, device = 1.0 / math.sqrt(hidden), device_of(generator)

    def uniform(*shape: int) -> Tensor:
        return (2.0 * torch.rand(shape, generator=generator, device=device) - 1.0) * bound

    bias = torch.zeros(4 * hidden, 1, device=device)
    bias[hidden : 2 * hidden] = 1.0
    return {
        f"{name}.weight": torch.cat([uniform(4 * hidden, features), uniform(4 * hidden, hidden)], dim=1),
        f"{name}.bias": bias,
    }


def linear(weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    """Return W x + b for ``name.weight`` (O, H), ``name.bias`` (O, 1) and ``x`` (H, N)."""
    return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]
