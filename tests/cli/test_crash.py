"""Whatever happens to the process or to its files: a run goes on to the same weights, or says why it cannot."""

import errno
import json
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

import subspace_meta as sm
from subspace_meta import checkpoint, cli

# The log without what a clock says.
CLOCKS = ("seconds",)
TRAIN = ("train", "--preset", "smoke", "--eager", "--quiet", "--json", "--checkpoint-seconds", "0")


def start(folder, *arguments):
    command = [sys.executable, "-m", "subspace_meta.cli", *TRAIN, *arguments]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(folder, *arguments):
    process = start(folder, *arguments)
    out, error = process.communicate(timeout=600)
    assert process.returncode == 0, error
    return json.loads(out)


def outcome(folder, name):
    run = folder / "runs" / name
    lines = (run / "metrics.jsonl").read_text().splitlines()
    log = [{k: v for k, v in json.loads(line).items() if k not in CLOCKS} for line in lines]
    return sm.load_weights(run / "weights.safetensors")[0], log


def same(left, right):
    assert left[0].keys() == right[0].keys()
    assert all(torch.equal(left[0][key], right[0][key]) for key in left[0])
    assert left[1] == right[1]


def killed_again_and_again(folder, outer_steps, kills, whole_run_seconds):
    """Run a training that is killed so often, at random moments, and gone on with; return how often it was running."""
    generator, running = random.Random(0), 0
    arguments = ("--name", "killed", "--outer-steps", str(outer_steps))
    run = folder / "runs" / "killed"
    for _ in range(kills):
        process = start(folder, *arguments, *(("--resume",) if (run / "config.json").exists() else ()))
        before = (run / "checkpoint.safetensors").stat().st_mtime_ns if (run / "checkpoint.safetensors").exists() else 0
        deadline = time.monotonic() + 120
        # The interpreter starts; then training has begun, and any moment may be the last.
        while time.monotonic() < deadline and process.poll() is None:
            found = run / "checkpoint.safetensors"
            if found.exists() and found.stat().st_mtime_ns != before:
                break
            time.sleep(0.005)
        time.sleep(generator.random() * whole_run_seconds)
        running += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finish(folder, *arguments, "--resume")
    return running


@pytest.mark.slow
def test_twenty_kills_change_nothing(tmp_path):
    began = time.monotonic()
    finish(tmp_path, "--name", "whole", "--outer-steps", "400")
    assert time.monotonic() - began > 1.0
    running = killed_again_and_again(tmp_path, 400, 20, 0.3)
    assert running >= 15, "most kills have to hit a training that runs"
    same(outcome(tmp_path, "killed"), outcome(tmp_path, "whole"))


def test_two_kills_change_nothing(tmp_path):
    finish(tmp_path, "--name", "whole", "--outer-steps", "60")
    killed_again_and_again(tmp_path, 60, 2, 0.2)
    same(outcome(tmp_path, "killed"), outcome(tmp_path, "whole"))


def command(monkeypatch, folder, *arguments):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["subspace-meta", *TRAIN, *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code


def test_a_damaged_checkpoint_is_refused_and_the_one_before_taken_on_request(tmp_path, monkeypatch, capsys):
    assert command(monkeypatch, tmp_path, "--name", "one", "--outer-steps", "8") == 0
    expected = outcome(tmp_path, "one")
    path = tmp_path / "runs/one/checkpoint.safetensors"
    content = bytearray(path.read_bytes())
    content[-9] ^= 1  # one bit of one number
    path.write_bytes(content)
    capsys.readouterr()
    assert command(monkeypatch, tmp_path, "--name", "one", "--resume") == 2
    message = capsys.readouterr().err
    assert "checksum" in message
    assert "--previous" in message
    assert path.read_bytes() == bytes(content), "nothing was changed"
    assert command(monkeypatch, tmp_path, "--name", "one", "--resume", "--previous") == 0
    same(outcome(tmp_path, "one"), expected)


def test_a_checkpoint_of_another_run_does_not_point_to_the_one_before(tmp_path, monkeypatch, capsys):
    for name, seed in (("one", "0"), ("two", "1")):
        assert command(monkeypatch, tmp_path, "--name", name, "--seed", seed, "--outer-steps", "8") == 0
    one, two = tmp_path / "runs/one", tmp_path / "runs/two"
    assert (one / "checkpoint.previous.safetensors").exists()
    (one / "checkpoint.safetensors").write_bytes((two / "checkpoint.safetensors").read_bytes())
    capsys.readouterr()
    assert command(monkeypatch, tmp_path, "--name", "one", "--resume") == 2
    message = capsys.readouterr().err
    assert "other settings" in message
    assert "--previous" not in message


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch, capsys):
    assert command(monkeypatch, tmp_path, "--name", "one", "--outer-steps", "4") == 0
    kept = (tmp_path / "runs/one/checkpoint.safetensors").read_bytes()

    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    capsys.readouterr()
    assert command(monkeypatch, tmp_path, "--name", "one", "--resume") == 2
    assert "No space left on device" in capsys.readouterr().err
    assert (tmp_path / "runs/one/checkpoint.safetensors").read_bytes() == kept
    assert not list((tmp_path / "runs/one").glob(".*.part"))
