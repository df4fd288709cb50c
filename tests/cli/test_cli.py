"""The command line as a user types it, in a process of its own."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import subspace_meta as sm
from subspace_meta import cli
from subspace_meta.benchmarks import memory
from subspace_meta.evaluation import archive
from subspace_meta.meta import unroll
from subspace_meta.meta.trainer import StreamSettings, Trainer, TrainSettings
from subspace_meta.tasks import SyntheticPCA, held_out_suite
from subspace_meta.weights import RELEASES


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "subspace_meta.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("with space")
    return folder, run("train", "--preset", "smoke", "--name", "one", "--json", "--quiet", cwd=folder)


def test_training_writes_everything(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = finished
    assert done.returncode == 0, done.stderr
    written = {path.name for path in (folder / "runs" / "one").iterdir()}
    assert written - {"tensorboard"} == {  # that one is there if TensorBoard is installed
        "checkpoint.safetensors",
        "config.json",
        "curves.png",
        "metrics.jsonl",
        "report.md",
        "results.json",
        "training.png",
        "weights.safetensors",
    }
    table = json.loads(done.stdout)
    assert table["problems"][0]["problem"] == "synthetic PCA 12x3"
    assert set(table["problems"][0]["methods"]) == {"RSGD-momentum", "RAdam", "RASA-LR", "Subspace (untuned)"}
    assert table["largest_violation"] < 1e-5
    records = [json.loads(line) for line in (folder / "runs/one/metrics.jsonl").read_text().splitlines()]
    assert [record["outer_step"] for record in records] == list(range(6))
    weights, adapter = sm.load_weights(folder / "runs/one/weights.safetensors")
    assert adapter.name == "base"
    assert weights.keys() == sm.pretrained().keys()
    assert (folder / "runs/one/curves.png").read_bytes().startswith(b"\x89PNG")


def test_evaluation_against_the_archive(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = finished
    arguments = ("evaluate", "--weights", "runs/one/weights.safetensors", "--tasks", "wahba*", "--quiet")
    done = run(*arguments, "--json", "--out", "report", cwd=folder)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["optimizer"] == "weights"
    (task,) = found["tasks"]
    assert task["task"] == "Wahba's problem SO(3)"
    assert task["compared"] == [20, 50, 100, 200, 400]
    assert task["baselines"].keys() == archive.load(task["task"]).keys()
    assert {path.name for path in (folder / "report").iterdir()} == {"report.md", "report.html", "results.json"}
    assert json.loads((folder / "report/results.json").read_text())["tasks"][0]["log_excess"] == task["log_excess"]
    averages = json.loads(run(*arguments, "--averages", "--json", cwd=folder).stdout)
    assert averages["optimizer"] == "weights, averages"
    assert averages["tasks"][0]["log_excess"] != task["log_excess"]
    table = run(*arguments, cwd=folder)
    assert "no worse than the best tuned" in table.stdout
    assert "@400" in table.stdout
    gap = task["log_excess"][0] - task["best"][0]["log_excess"]
    assert f"{gap:+.2f}" in table.stdout  # the same seeds give the same losses
    assert "RDoWG" in table.stdout


def test_an_archive_of_ones_own_tasks(tmp_path: Path) -> None:
    shutil.copy(Path(__file__).parents[2] / "examples" / "own_task.py", tmp_path)
    common = ("--own", "own_task:TASKS")
    planned = run("archive", *common, "--folder", "mine", "--dry-run", "--baselines", "radam", cwd=tmp_path)
    assert planned.stdout.splitlines() == ["missing or stale: 1", "direction: RAdam"]
    early = run("evaluate", *common, "--archive", "mine", "--quiet", cwd=tmp_path)
    assert_one_line_error(early, "direction: RAdam is not tuned on it in mine")
    made = run("archive", *common, "--folder", "mine", "--baselines", "radam", "--quiet", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert (
        run("archive", *common, "--folder", "mine", "--baselines", "radam", cwd=tmp_path).stdout
        == "missing or stale: 0\n"
    )
    done = run(
        *("evaluate", *common, "--archive", "mine", "--optimizer", "own_task:my_optimizer", "--json", "--quiet"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert list(json.loads(done.stdout)["tasks"][0]["baselines"]) == ["RAdam"]
    other = "import dataclasses, own_task\nTWO = [*own_task.TASKS, dataclasses.replace(own_task.TASKS[0], row='other')]"
    (tmp_path / "two.py").write_text(other)
    partly = run("evaluate", "--own", "two:TWO", "--archive", "mine", "--quiet", "--out", "report", cwd=tmp_path)
    assert partly.returncode == 1, partly.stderr
    assert "left out, other: RAdam is not tuned" in partly.stderr
    assert "left out, other" in (tmp_path / "report" / "report.md").read_text()
    assert "direction" in partly.stdout


def test_the_test_set_has_to_be_named_and_its_use_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No optimizer is run on it here: a folder without tuned baselines ends the command before."""

    def here(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["subspace-meta", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        printed = capsys.readouterr()
        assert isinstance(stopped.value.code, int)
        return stopped.value.code, printed.out, " ".join(printed.err.split())

    monkeypatch.chdir(tmp_path)
    rows = {task.row for task in held_out_suite()}
    for suite in ("full", "quick"):
        assert not rows & {task.row for task in cli.common.chosen_tasks(suite, "*", "")}
    assert {task.row for task in cli.common.chosen_tasks("test", "*", "")} == rows
    options = ("--archive", "none", "--quiet")
    for weights in ((), ("--optimizer", "subspace_meta:RSGD")):
        code, _, errors = here("evaluate", "--suite", "test", *weights, *options, "--tasks", "phase*")
        assert code == 2
        assert "record this use, with its date" in errors
        assert "MODEL_CARD.md" in errors
        assert "RAdam is not tuned on it in none" in errors
    assert "MODEL_CARD" not in here("evaluate", *options, "--tasks", "wahba*")[2]
    common = ("--archive", "none", "--baselines", "radam", "--dry-run")
    planned = here("archive", "--suite", "test", *common)[1].splitlines()
    assert planned[0] == f"missing or stale: {len(rows)}"
    assert {line.removesuffix(": RAdam") for line in planned[1:]} == rows
    assert planned[1].startswith("blind deconvolution 64"), "small tasks first"
    assert not rows & {line.removesuffix(": RAdam") for line in here("archive", *common)[1].splitlines()}


def test_a_dry_run_prints_costs_and_writes_nothing(tmp_path: Path) -> None:
    done = run("train", "--preset", "smoke", "--dry-run", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (stream,) = json.loads(done.stdout)["streams"].values()
    assert (stream["tasks"], stream["steps"]) == (4, 5)
    assert stream["peak_bytes"] == stream["carry_bytes"] + 5 * stream["residual_bytes"] + stream["batch_bytes"]
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_does_not_fit_is_warned_about(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.train, "available_bytes", lambda device: 1000)
    monkeypatch.setattr(sys, "argv", ["subspace-meta", "train", "--preset", "smoke", "--dry-run"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0
    assert "needs 0.0 GB, 0.0 GB are free; take fewer tasks" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("quiet", [False, True])
def test_compiling_is_said_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quiet: bool
) -> None:
    monkeypatch.setattr(unroll, "compile_block", lambda block: block)
    unroll.block_of.cache_clear()
    streams = (StreamSettings((SyntheticPCA(8, 2, batch_size=4),), tasks=2),)
    trainer = Trainer(TrainSettings(streams, outer_steps=2, segment=2, horizon=(2, 2)))
    assert cli.train._train(trainer, [], tmp_path, quiet, 1e9, None)
    unroll.block_of.cache_clear()
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("compiling the inner loop of")]
    wanted = "compiling the inner loop of 'synthetic PCA 8x2'; about a minute, less where that was done before"
    assert said == ([] if quiet else [wanted])


def test_what_torch_says_of_itself_is_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    message = "`torch._prims_common.check` is deprecated and will be removed in the future"
    monkeypatch.setattr(cli, "app", lambda standalone_mode: warnings.warn(message, FutureWarning, stacklevel=1))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with pytest.raises(SystemExit):
            cli.main()
    assert not warned


def test_a_second_run_of_the_same_name_is_refused(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = finished
    before = (folder / "runs/one/config.json").read_bytes()
    done = run("train", "--preset", "smoke", "--name", "one", cwd=folder)
    assert_one_line_error(done, "runs/one exists")
    assert (folder / "runs/one/config.json").read_bytes() == before


def test_an_interrupted_run_resumes_to_the_same_weights(tmp_path: Path) -> None:
    options = ("train", "--preset", "smoke", "--outer-steps", "60", "--quiet", "--json")
    assert run(*options, "--name", "whole", cwd=tmp_path).returncode == 0
    command = [sys.executable, "-m", "subspace_meta.cli", *options, "--name", "cut"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    # The folder appears just before the first outer step.
    deadline = time.monotonic() + 120
    while not (tmp_path / "runs/cut/config.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "--resume" in errors
    assert (tmp_path / "runs/cut/checkpoint.safetensors").is_file()
    assert not (tmp_path / "runs/cut/weights.safetensors").exists()
    done = run("train", "--name", "cut", "--resume", "--quiet", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    whole, cut = (sm.load_weights(tmp_path / f"runs/{name}/weights.safetensors")[0] for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    logs = [
        [
            {key: value for key, value in json.loads(line).items() if key != "seconds"}
            for line in (tmp_path / f"runs/{name}/metrics.jsonl").read_text().splitlines()
        ]
        for name in ("whole", "cut")
    ]
    assert logs[0] == logs[1]


def test_training_begins_with_given_weights(tmp_path: Path) -> None:
    options = ("train", "--preset", "smoke", "--outer-steps", "1", "--quiet", "--json", "--start", "base")
    assert run(*options, "--name", "one", cwd=tmp_path).returncode == 0
    found, shipped = sm.load_weights(tmp_path / "runs/one/weights.safetensors")[0], sm.pretrained()
    # One step of Adam at the peak of the smoke run's rate, 3e-3, from its first tenth on.
    assert max(float((found[name] - shipped[name]).abs().max()) for name in shipped) < 4e-3
    assert any(not torch.equal(found[name], shipped[name]) for name in shipped)
    assert json.loads((tmp_path / "runs/one/config.json").read_text())["start"] == "base"
    refused = run("train", "--name", "one", "--resume", "--start", "light", cwd=tmp_path)
    assert_one_line_error(refused, "begun with start 'base', not 'light'")


def test_a_run_of_given_seconds_and_one_in_two_sittings(tmp_path: Path) -> None:
    options = ("train", "--preset", "smoke", "--quiet", "--json")

    def records(name: str) -> list[dict[str, float]]:
        return [json.loads(line) for line in (tmp_path / f"runs/{name}/metrics.jsonl").read_text().splitlines()]

    done = run(*options, "--name", "timed", "--seconds", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    spent = [record["seconds"] for record in records("timed")]
    assert sum(spent[:-1]) < 1.0 <= sum(spent)

    done = run(*options, "--name", "two", "--outer-steps", "200", "--stop-after", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "train --name two --resume goes on" in done.stderr
    assert 0 < len(records("two")) < 200
    assert not (tmp_path / "runs/two/weights.safetensors").exists()
    done = run("train", "--name", "two", "--resume", "--quiet", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(records("two")) == 200
    assert (tmp_path / "runs/two/weights.safetensors").is_file()


def assert_one_line_error(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    for part in parts:
        assert part in done.stderr


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (
            ("train", "--presett", "quick"),
            ("No such option: --presett", "--preset", "(see subspace-meta train --help)"),
        ),
        (("--presett",), ("No such option: --presett (see subspace-meta --help)",)),
        (
            ("bench",),
            ("Missing command. There are geometry, step, predecessor, meta (see subspace-meta bench --help)",),
        ),
        (("bench", "foo"), ("No such command 'foo'. There are geometry, step,", "(see subspace-meta bench --help)")),
        (("bench", "step", "--round", "2"), ("--round", "(see subspace-meta bench step --help)")),
        (("weights", "bases"), ("bases: no such file", "ship are base, light")),
        (("memory", "--model", "vgg"), ("unknown", "resnet50, transformer")),
        (("train", "--preset", "slow"), ("unknown preset 'slow'", "quick, refine, release, smoke")),
        (("train", "--optimizer", "adam"), ("unknown optimizer preset 'adam'", "base, light, paper")),
        (("train", "--start", "bases"), ("--start bases", "no such file", "base, light")),
        (("train", "--preset", "smoke", "--optimizer", "light", "--start", "good.safetensors"), ("of preset 'light'",)),
        (("train", "--preset", "smoke", "--start", "text.txt"), ("text.txt", "not a readable safetensors file")),
        (("train", "--outer-steps", "0"), ("--outer-steps", "greater than or equal to 1")),
        (("train", "--resume"), ("--resume needs --name",)),
        (("train", "--resume", "--name", "none"), ("runs/none", "without --resume")),
        (("trane",), ("No such command 'trane'", "train, evaluate, archive", "(see subspace-meta --help)")),
        (("evaluate", "--suite", "mnist"), ("no suite 'mnist'", "full, quick, test")),
        (("archive", "--suite", "mnist"), ("no suite 'mnist'", "full, quick, test")),
        (("evaluate", "--suite", "test", "--own", "json:dumps"), ("--own or --suite test, not both",)),
        (("evaluate", "--tasks", "nothing*"), ("no task matches 'nothing*'", "leading subspace 200x20")),
        (("evaluate", "--optimizer", "nowhere:make"), ("nowhere:make", "No module named 'nowhere'")),
        (("evaluate", "--optimizer", "json.dumps"), ("package.module:name", "json.dumps")),
        (("evaluate", "--optimizer", "json:dumps", "--weights", "good.safetensors"), ("not both",)),
        (
            ("evaluate", "--optimizer", "json:dumps", "--averages"),
            ("--averages are those of the learned", "sm.Averaging"),
        ),
        (("evaluate", "--own", "json:dumps"), ("must be a list or tuple of SuiteTask", "function dumps")),
        (("evaluate", "--suite", "quick", "--out", "text.txt"), ("--out is a folder; text.txt is a file",)),
        (("archive", "--baselines", "adam2"), ("no baseline matches 'adam2'", "RSGD, RSGD-momentum")),
        (("evaluate", "--weights", "missing.safetensors"), ("missing.safetensors", "no such file")),
        (("weights", "truncated.safetensors"), ("truncated.safetensors", "truncated")),
        (("weights", "foreign.safetensors"), ("foreign.safetensors", "not 'weights' written by subspace-meta")),
        (("weights", "text.txt"), ("text.txt", "not a readable safetensors file")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else None,
)
def test_bad_input_is_one_line_and_leaves_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    parts: tuple[str, ...],
) -> None:
    sm.save_weights(tmp_path / "good.safetensors", sm.pretrained(), sm.PRESETS["base"], {})
    (tmp_path / "truncated.safetensors").write_bytes((tmp_path / "good.safetensors").read_bytes()[:-100])
    save_file({"x": torch.zeros(3)}, tmp_path / "foreign.safetensors")
    (tmp_path / "text.txt").write_text("not weights\n")
    before = {path.name for path in tmp_path.iterdir()}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["subspace-meta", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    printed = capsys.readouterr()
    code = stopped.value.code
    assert isinstance(code, int)
    assert_one_line_error(subprocess.CompletedProcess(arguments, code, printed.out, printed.err), *parts)
    assert {path.name for path in tmp_path.iterdir()} == before


def test_json_has_no_numbers_that_json_does_not_have() -> None:
    content = {"a": [1.0, math.nan, (math.inf, 2)], "b": "nan", "c": None}
    assert cli.common.finite_or_null(content) == {"a": [1.0, None, [None, 2]], "b": "nan", "c": None}


def test_memory_of_resnet50(tmp_path: Path) -> None:
    done = run("memory", "--no-measure", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    records = {record["optimizer"]: record for record in found["records"]}
    # arXiv 2501.15235: the predecessor's networks for the 33 constrained layers, and the method's own.
    assert records["matrix LSTM, one network a matrix"]["meta_parameters"] == 20_037_352_979
    assert records["matrix LSTM, one network a matrix"]["matrices"] == 33
    assert records["Subspace paper"]["meta_parameters"] == 5242
    assert records["Subspace light"]["state_bytes"] <= 15_000_000
    assert records["RAdam"]["state_bytes"] == pytest.approx(4 * 23_454_912, rel=1e-3)
    light = records["Subspace light"]
    assert len(light["layers"]) == light["matrices"] == 53
    assert sum(layer["state_bytes"] for layer in light["layers"]) == pytest.approx(light["state_bytes"], rel=1e-3)
    # 25,557,032 parameters in all, as published for ResNet-50.
    assert found["other_parameters"] + 23_454_912 == 25_557_032


def test_measured_memory_holds_the_state() -> None:
    shapes = [(1024, 512)] * 4
    for name in ("RAdam", "Adam"):
        peak = memory.measured_peak(name, shapes)
        assert peak is None or peak >= memory.state_bytes("RAdam", shapes) * (2 if name == "Adam" else 1) * 0.9


@pytest.mark.parametrize("name", [*RELEASES, "own.safetensors"])
def test_weights_are_shown_with_their_notes_by_file_or_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    sm.save_weights("own.safetensors", sm.pretrained(), sm.PRESETS["base"], {"outer_steps": 7})

    def shown(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["subspace-meta", "weights", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 0
        return capsys.readouterr().out

    found = json.loads(shown(name, "--json"))
    assert found["preset"] == ("light" if name == "light" else "base")
    assert found["notes"]["outer_steps"]
    assert f"  outer_steps    {found['notes']['outer_steps']}\n" in shown(name)
    assert json.loads(shown("--json"))["file"].endswith(RELEASES["base"])


def test_version_and_help(tmp_path: Path) -> None:
    assert run("--version", cwd=tmp_path).stdout.strip() == sm.__version__
    for command in ((), ("train",), ("evaluate",), ("archive",), ("weights",), ("memory",), ("bench", "step")):
        done = run(*command, "--help", cwd=tmp_path)
        assert done.returncode == 0
        assert "Usage" in done.stdout
        assert " / --" not in done.stdout
