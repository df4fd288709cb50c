"""What users read first must run: the README's example and the files in examples/."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

import subspace_meta as sm

ROOT = Path(__file__).parents[1]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_of_the_readme() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S)
    torch.manual_seed(0)
    names: dict = {}
    exec(code, names)
    assert names["geometry"].violation(names["params"])["basis"] < 1e-5
    # Variances 1/k: the six leading directions are the first six coordinates.
    captured = names["params"]["basis"][:6].square().sum()
    assert captured > 0.9 * 6


def test_the_example_of_the_meta_gradients() -> None:
    text = (ROOT / "docs" / "meta_gradients.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    names: dict = {"__name__": "example"}
    exec(code, names)
    assert names["gradient"]["log_lr"].isfinite()


def test_functional() -> None:
    assert load("functional").main(60) > 0.95


def test_meta_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    losses = load("meta_train").main(outer_steps=25, compiled=False)
    assert len(losses) == 25
    assert "outer step 25" in capsys.readouterr().out
    weights, adapter = sm.load_weights(tmp_path / "autoencoder.safetensors")
    assert adapter.name == "base"
    assert weights.keys() == sm.pretrained().keys()
