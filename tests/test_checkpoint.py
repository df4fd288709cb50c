"""Weights files: what is written is read, everything else is refused in one line, and nothing is half-written."""

import json
import os
import re

import pytest
import torch
from making import lively_weights
from safetensors.torch import save_file

import subspace_meta as sm
from subspace_meta.adapter.base import BaseAdapter
from subspace_meta.adapter.paper import PaperAdapter
from subspace_meta.checkpoint import load_tensors, save_tensors, write_atomically


def saved(path, preset="base", **changes):
    weights = {**lively_weights(preset, dtype=torch.float32), **changes}
    sm.save_weights(path, weights, sm.PRESETS[preset], {"why": "a test"})
    return weights


@pytest.mark.parametrize(
    "adapter", [BaseAdapter(), BaseAdapter(hidden=5, slow_decay=0.999), PaperAdapter(step_size=0.5)]
)
def test_round_trip(tmp_path, adapter):
    weights = adapter.init_weights(torch.Generator().manual_seed(0))
    for path in (tmp_path / "w.safetensors", str(tmp_path / "deep" / "folder" / "w.safetensors")):
        sm.save_weights(path, weights, adapter, {"steps": 3})
        loaded, kind = sm.load_weights(path)
        assert kind == adapter
        assert loaded.keys() == weights.keys()
        assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    content = load_tensors(tmp_path / "w.safetensors", "weights")[1]
    assert content["notes"] == {"steps": 3}


def test_the_shipped_weights():
    weights = sm.pretrained()
    assert all(torch.isfinite(value).all() for value in weights.values())
    weights["lstm.bias"].zero_()
    assert not torch.equal(sm.pretrained()["lstm.bias"], weights["lstm.bias"]), "each call gives new tensors"
    with pytest.raises(ValueError, match="no weights ship for preset 'huge'; there are some for base"):
        sm.pretrained("huge")


def test_views_and_gradients_can_be_saved(tmp_path):
    base = torch.arange(12.0).reshape(3, 4).requires_grad_()
    tensors = {"a": base.T, "b": base.T[1:], "c": base}  # shared storage, not contiguous
    save_tensors(tmp_path / "t", "anything", tensors, {})
    loaded, _ = load_tensors(tmp_path / "t", "anything")
    assert all(torch.equal(loaded[name], tensors[name].detach()) for name in tensors)


def refuse(path, message, preset=None):
    with pytest.raises(sm.CheckpointError, match=message) as caught:
        sm.load_weights(path, preset)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_no_such_file(tmp_path):
    refuse(tmp_path / "w.safetensors", "no such file")
    refuse(tmp_path, "no such file")


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -1])
def test_a_truncated_file(tmp_path, kept):
    path = tmp_path / "w.safetensors"
    saved(path)
    path.write_bytes(path.read_bytes()[:kept])
    refuse(path, "not a readable safetensors file, or truncated")


def test_not_a_safetensors_file(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_text("meta-parameters: 3.14\n" * 100)
    refuse(path, "not a readable safetensors file")
    torch.save({"a": torch.ones(3)}, path)
    refuse(path, "not a readable safetensors file")


def test_a_foreign_safetensors_file(tmp_path):
    path = tmp_path / "w.safetensors"
    for metadata in (None, {"format": "pt"}):
        save_file({"a": torch.ones(3)}, path, metadata)
        refuse(path, "holds 'something else', not 'weights' written by subspace-meta")
    save_tensors(path, "training checkpoint", {"a": torch.ones(3)}, {})
    refuse(path, "holds 'training checkpoint', not 'weights'")


def test_another_preset(tmp_path):
    path = tmp_path / "w.safetensors"
    saved(path, "paper")
    refuse(path, "holds weights of preset 'paper', not of 'base'", "base")
    assert sm.load_weights(path, "paper")[1] == PaperAdapter()
    save_tensors(path, "weights", {"a": torch.ones(3)}, {"preset": "huge", "settings": {}})
    refuse(path, "preset 'huge' is unknown; there are base, light, paper")


def test_weights_that_do_not_fit_their_preset(tmp_path):
    path = tmp_path / "w.safetensors"
    saved(path, **{"lstm.bias": torch.zeros(8, 1)})
    refuse(path, r"weight 'lstm.bias' has shape \(8, 1\); .* needs \(80, 1\)")
    saved(path, surplus=torch.zeros(1))
    refuse(path, r"missing \[\], unknown \['surplus'\]")
    weights = lively_weights("base", dtype=torch.float32)
    save_tensors(path, "weights", weights, {"preset": "base", "settings": {"depth": 3}})
    refuse(path, "depth")
    save_tensors(path, "weights", weights, {"preset": "base"})
    refuse(path, "settings")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tmp_path, value):
    path = tmp_path / "w.safetensors"
    bad = lively_weights("base", dtype=torch.float32)["head.bias"].clone()
    bad[1] = value
    saved(path, **{"head.bias": bad})
    refuse(path, r"weights \['head.bias'\] are not finite")


class FullDisk(OSError):
    pass


@pytest.mark.parametrize("operation", ["fsync", "replace"])
def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, operation):
    path = tmp_path / "w.safetensors"
    saved(path)
    before = path.read_bytes()

    def fail(*arguments):
        raise FullDisk("no space left on device")

    monkeypatch.setattr(os, operation, fail)
    with pytest.raises(FullDisk):
        saved(path, "paper")
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]
    assert path.read_bytes() == before
    path.unlink()
    with pytest.raises(FullDisk):
        saved(path)
    assert list(tmp_path.iterdir()) == []


def test_the_new_content_appears_at_once(tmp_path, monkeypatch):
    """While it is written, the name still holds the old content; a temporary file lies in the same folder."""
    path = tmp_path / "f"
    write_atomically(path, b"old")
    seen = []
    replace = os.replace

    def watch(source, target):
        seen.append((path.read_bytes(), source.read_bytes(), source.parent))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watch)
    write_atomically(path, b"new")
    assert seen == [(b"old", b"new", tmp_path)]
    assert path.read_bytes() == b"new"


def test_the_metadata_is_readable_by_others(tmp_path):
    path = tmp_path / "w.safetensors"
    saved(path)
    size = int.from_bytes(path.read_bytes()[:8], "little")
    metadata = json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]
    assert metadata["format"] == "subspace-meta"
    assert re.fullmatch(r"\d+\.\d+.*", metadata["version"])
    assert json.loads(metadata["content"])["settings"]["hidden"] == 20
