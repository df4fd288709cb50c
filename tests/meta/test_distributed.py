"""Several processes: the numbers of one process, a checkpoint of all parts, and a clear end when one of them dies."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from distributed_settings import SETTINGS, findings
from processes import ended, start

import subspace_meta as sm
from subspace_meta.meta.distributed import Processes
from subspace_meta.meta.trainer import Trainer

JOB = Path(__file__).with_name("distributed_job.py")
TRAIN = ("-m", "subspace_meta", "train", "--preset", "smoke", "--eager", "--quiet", "--json")


@pytest.fixture
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    folder = tmp_path_factory.mktemp("job")
    (first, out, error), (second, nothing, other) = ended(start(folder, str(JOB), "checkpoint.safetensors"))
    assert first == second == 0, error + other
    assert nothing == "", "one log: the other process says nothing"
    return json.loads(out), folder / "checkpoint.safetensors"


@pytest.mark.usefixtures("double")
def test_two_processes_find_what_one_finds(job: tuple[dict, Path]) -> None:
    trainer = Trainer(SETTINGS)
    expected, found = findings(trainer, list(trainer.run())), job[0]["trained"]
    assert trainer.spoiled_tasks > 0
    assert [record["family"] for record in found["log"]] == [record["family"] for record in expected["log"]]
    for record, other in zip(found["log"], expected["log"], strict=True):
        numbers = {key: value for key, value in other.items() if key != "family"}
        assert {key: record[key] for key in numbers} == pytest.approx(numbers, rel=1e-6, abs=1e-9)
    for name, value in expected["theta"].items():
        torch.testing.assert_close(torch.tensor(found["theta"][name]), torch.tensor(value), rtol=1e-6, atol=1e-6)


def test_the_meta_parameters_stay_equal_bit_for_bit(job: tuple[dict, Path]) -> None:
    assert job[0]["trained"]["spread"] == 0.0


def test_a_checkpoint_has_the_parts_of_all(job: tuple[dict, Path]) -> None:
    assert job[0]["trained"]["resumed_equal"]


@pytest.mark.usefixtures("double")
def test_another_number_of_processes_cannot_go_on(job: tuple[dict, Path]) -> None:
    with pytest.raises(sm.CheckpointError, match=r"written by 2 processes.*not with 1"):
        Trainer(SETTINGS).load(job[1])


def test_a_spoiled_task_is_replaced_by_one_of_the_same_process(job: tuple[dict, Path]) -> None:
    found = job[0]["copies"]
    assert found["same"] == [[i == j or {i, j} == {2, 3} for j in range(4)] for i in range(4)]
    assert found["spread"] == 0.0, "all processes know"


def test_a_replicated_model_stays_replicated(job: tuple[dict, Path]) -> None:
    found = job[0]["replicated"]
    assert found["moved"] > 1e-2
    assert found["spread"] == 0.0


def test_tasks_are_split_evenly_and_none_is_lost() -> None:
    for tasks in (2, 3, 7, 16):
        for count in range(1, tasks + 1):
            parts = [range(tasks)[Processes(rank, count).part(tasks)] for rank in range(count)]
            assert [task for part in parts for task in part] == list(range(tasks))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_process_that_has_left_has_no_threads_of_the_job(job: tuple[dict, Path]) -> None:
    # They may abort the interpreter as it ends; torch keeps the group when its compiler is imported after it is made.
    assert job[0]["threads_left"] == []


def test_more_processes_than_tasks_are_refused() -> None:
    with pytest.raises(ValueError, match="3 tasks cannot be split over 5 processes"):
        Trainer(SETTINGS, Processes(0, 5))


def test_a_process_that_dies_ends_the_job_and_the_run_goes_on_exactly(tmp_path: Path) -> None:
    arguments = (*TRAIN, "--outer-steps", "40", "--checkpoint-seconds", "0", "--name")
    whole = ended(start(tmp_path, *arguments, "whole"))
    assert [code for code, _, _ in whole] == [0, 0], whole

    processes = start(tmp_path, *arguments, "killed")
    run = tmp_path / "runs" / "killed"
    deadline = time.monotonic() + 120
    while not (run / "checkpoint.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGKILL)
    (code, _, error), _ = ended(processes)
    assert code == 2
    assert "process 0 of 2 cannot go on: another one has ended" in error
    assert "--resume" in error
    assert "Traceback" not in error
    assert not (run / "weights.safetensors").exists()

    (alone,) = ended(start(tmp_path, *arguments, "killed", "--resume", count=1))
    assert alone[0] == 2
    assert "was written by 2 processes" in alone[2]

    resumed = ended(start(tmp_path, *arguments, "killed", "--resume"))
    assert [code for code, _, _ in resumed] == [0, 0], resumed
    left, right = (sm.load_weights(tmp_path / "runs" / name / "weights.safetensors")[0] for name in ("whole", "killed"))
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 40


def test_a_run_of_several_that_exists_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "notes").touch()
    for code, _, error in ended(start(tmp_path, *TRAIN, "--name", "mine")):
        assert code == 2
        assert "exists; choose another --name" in error
