"""Files: meta-parameters and training checkpoints as safetensors with JSON metadata. No pickle, written atomically."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from subspace_meta._version import __version__
from subspace_meta.adapter.network import Weights
from subspace_meta.optimizers.subspace import PRESETS, Adapter, check_weights

FORMAT = "subspace-meta"


class CheckpointError(ValueError):
    """A file cannot be used; the message says which file, what is wrong and what would be right."""


class OtherRunError(CheckpointError):
    """A checkpoint is whole, but another run wrote it: with other settings, or by another number of processes."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say which file
        raise
    finally:
        temporary.unlink(missing_ok=True)


def keep_previous(path: Path, previous: Path) -> None:
    """Give the content of ``path`` a second name, in the place of an older one, before ``path`` is written again."""
    if not path.exists():
        return
    linked = previous.with_name(f".{previous.name}.{os.getpid()}.part")
    linked.unlink(missing_ok=True)
    try:
        os.link(path, linked)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, linked)
    os.replace(linked, previous)


def _digest(tensors: Mapping[str, Tensor], content: str) -> str:
    """Return SHA-256 over the description and all numbers."""
    digest = hashlib.sha256(content.encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"\n{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_tensors(path: Path, kind: str, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> None:
    """Write tensors and a JSON description of ``kind`` in one file."""
    contiguous = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    text = json.dumps(content)
    metadata = {"format": FORMAT, "kind": kind, "version": __version__, "content": text}
    metadata["sha256"] = _digest(contiguous, text)
    write_atomically(path, save(contiguous, metadata))


def load_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`save_tensors` wrote.

    Raises:
        CheckpointError: there is no such file, it is truncated, its checksum is wrong, or it holds something else.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file, or truncated ({error})") from error
    if metadata.get("format") != FORMAT or metadata.get("kind") != kind:
        raise CheckpointError(
            f"{path}: holds {metadata.get('kind', 'something else')!r}, not {kind!r} written by subspace-meta"
        )
    checksum = metadata.get("sha256")
    unsigned = checksum is None and kind == "weights"  # the first released ones
    if not unsigned and checksum != _digest(tensors, metadata["content"]):
        raise CheckpointError(f"{path}: damaged, its content does not have the checksum that was written with it")
    return tensors, json.loads(metadata["content"])


def save_weights(
    path: str | os.PathLike[str], weights: Mapping[str, Tensor], adapter: Adapter, notes: Mapping[str, Any]
) -> None:
    """Write meta-parameters with their preset, its settings, and free notes (how they were trained)."""
    settings = {"preset": adapter.name, "settings": dataclasses.asdict(adapter), "notes": dict(notes)}
    save_tensors(Path(path), "weights", weights, settings)


def load_weights(path: str | os.PathLike[str], preset: str | None = None) -> tuple[Weights, Adapter]:
    """Read meta-parameters.

    Args:
        path: the file.
        preset: the preset that is wanted; ``None`` accepts each.

    Returns:
        The weights and the adapter that they belong to, for ``SubspaceOptimizer(geometry, weights, adapter)``.

    Raises:
        CheckpointError: not a weights file, damaged, of another preset, or not fitting its preset.
    """
    path = Path(path)
    weights, content = load_tensors(path, "weights")
    name = content.get("preset")
    if name not in PRESETS:
        raise CheckpointError(f"{path}: preset {name!r} is unknown; there are {', '.join(PRESETS)}")
    if preset is not None and name != preset:
        raise CheckpointError(f"{path}: holds weights of preset {name!r}, not of {preset!r}")
    try:
        adapter = type(PRESETS[name])(**content["settings"])
        check_weights(adapter, weights)
    except (TypeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    bad = [key for key, value in weights.items() if not torch.isfinite(value).all()]
    if bad:
        raise CheckpointError(f"{path}: weights {bad} are not finite")
    return weights, adapter


def load_notes(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the notes that :func:`save_weights` wrote with meta-parameters.

    Raises:
        CheckpointError: not a weights file, or damaged.
    """
    _, content = load_tensors(Path(path), "weights")
    notes: dict[str, Any] = content.get("notes", {})
    return notes
