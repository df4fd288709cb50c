"""The meta-parameters that ship with the package, one file per preset and release."""

from __future__ import annotations

from pathlib import Path

from subspace_meta.adapter.network import Weights
from subspace_meta.checkpoint import load_weights

FOLDER = Path(__file__).parent
RELEASES = {"base": "base-5.safetensors", "light": "light-2.safetensors"}


def located(name: str) -> Path:
    """Return the file of the weights that ship for a preset, if ``name`` is that of one; else ``name`` is a path."""
    return FOLDER / RELEASES[name] if name in RELEASES else Path(name)


def pretrained(preset: str = "base") -> Weights:
    """Return the shipped meta-parameters, a dict of tensors, for ``SubspaceOptimizer(geometry, weights)``.

    Each call returns new tensors, so changing them changes nothing else.

    Raises:
        ValueError: no weights ship for that preset.
    """
    if preset not in RELEASES:
        raise ValueError(f"no weights ship for preset {preset!r}; there are some for {', '.join(RELEASES)}")
    return load_weights(FOLDER / RELEASES[preset], preset)[0]
