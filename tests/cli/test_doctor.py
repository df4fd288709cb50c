"""``subspace-meta doctor``: what it says where things are there, where they are missing, and where nothing works."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from subspace_kernels import native

from subspace_meta import cli
from subspace_meta.cli import doctor
from subspace_meta.tasks import evaluation_suite

Doctor = Callable[..., tuple[int, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Doctor:
    def call(*options: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["subspace-meta", "doctor", *options])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert isinstance(stopped.value.code, int)
        return stopped.value.code, capsys.readouterr().out

    return call


def found_by(call: Doctor) -> tuple[int, bool, dict[str, dict[str, str]]]:
    code, printed = call("--json")
    described = json.loads(printed)
    assert {"python", "torch", "machine"} <= set(described["environment"])
    return code, described["works"], {finding.pop("what"): finding for finding in described["findings"]}


def test_what_is_there(call: Doctor) -> None:
    code, works, findings = found_by(call)
    assert (code, works) == (0, True)
    assert findings["torch"]["found"] == torch.__version__
    assert findings["a step of 'base'"]["status"] == findings["a step of 'light'"]["status"] == "ok"
    assert findings["scikit-learn"]["status"] == "ok"
    assert findings["threads"]["found"].startswith(f"{torch.get_num_threads()} of torch")
    assert all(finding["advice"] for finding in findings.values() if finding["status"] == "missing")
    code, table = call()
    assert code == 0
    for what in findings:
        assert what in table
    assert table.splitlines()[-1].startswith("The library works here")


def test_what_is_missing(call: Doctor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SUBSPACE_META_DATA", str(tmp_path))
    monkeypatch.setitem(doctor.OPTIONAL, "no-such-package", ("train", "nothing"))
    (tmp_path / "kylberg_spd.npz").touch()
    native.library.cache_clear()
    try:
        code, works, findings = found_by(call)
        monkeypatch.delenv("SUBSPACE_META_DATA")
        assert "two tasks" in found_by(call)[2]["data folder"]["found"]
    finally:
        native.library.cache_clear()
    assert (code, works) == (0, True)
    assert "install g++ or clang++" in findings["torch.compile on the CPU"]["advice"]
    assert findings["native kernels"]["status"] == "missing"
    assert "no-such-compiler" in findings["native kernels"]["advice"]
    assert findings["no-such-package"]["advice"] == "pip install 'subspace-meta[train]', for nothing"
    assert findings["data folder"]["advice"].startswith("put yaleb_32x32.npz there")


def test_the_tasks_that_need_files() -> None:
    files = [task.needs_file for task in evaluation_suite() if task.needs_file]
    assert sorted(files) == sorted(doctor.DATA_FILES)


def test_where_nothing_works(call: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(preset: str) -> None:
        raise OSError(f"no weights of {preset}")

    monkeypatch.setattr(doctor, "pretrained", broken)
    monkeypatch.setattr(doctor, "NEEDED", ("no-such-package",))
    code, works, findings = found_by(call)
    assert (code, works) == (1, False)
    assert findings["a step of 'base'"]["found"] == "OSError: no weights of base"
    assert findings["no-such-package"]["status"] == "broken"
    assert "It cannot work here" in call()[1]


def test_a_wrong_result_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.Geometry, "violation", lambda self, params: {"x": 1.0})
    assert {finding.status for finding in doctor._step()} == {"broken"}


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name = "a GPU"
        total_memory = 2**33

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    monkeypatch.setattr(doctor, "_version", lambda package: "3.9" if package == "triton" else "")
    with_triton = {finding.what: finding for finding in doctor._devices()}
    assert with_triton["device 0"].found == "a GPU, 8 GiB, CUDA: optimizer steps, float32 in Triton kernels"
    monkeypatch.setattr(doctor, "_version", lambda package: "")
    without = {finding.what: finding for finding in doctor._devices()}
    assert (without["device 0"].status, without["device 0"].advice) == ("missing", "pip install triton")


def test_a_word_on_threads_and_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 10_000)
    threads = next(finding for finding in doctor._processor() if finding.what == "threads")
    assert threads.advice.startswith("set OMP_NUM_THREADS=")
    for version, status, advice in (("2.0.1", "broken", "2.1 or newer"), ("2.9.0+cu130", "ok", "are tested with")):
        monkeypatch.setattr(torch, "__version__", version)
        finding = next(finding for finding in doctor._software() if finding.what == "torch")
        assert finding.status == status
        assert advice in finding.advice
