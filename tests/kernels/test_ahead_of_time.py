"""The kernels compiled for GPUs that are not here: registers, spills, vector loads; see ``ahead_of_time_job.py``."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Registers a thread at most: with these, two programs of 256 threads fit on a multiprocessor of sm_80 and sm_90 (65536
# registers), four waves a SIMD on gfx942 (512 registers).
BUDGET = {"sm_80": 128, "sm_90": 128, "gfx942": 128}
LSTM_BUDGET = {"sm_80": 96, "sm_90": 96, "gfx942": 96}


def compiled(target):
    pytest.importorskip("triton")
    job = Path(__file__).with_name("ahead_of_time_job.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(job), target]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return [json.loads(line) for line in finished.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_no_spills_few_registers_and_vector_loads(target):
    records = compiled(target)
    for record in records:
        print(record)
        assert record["spills"] == 0, record
        budget = LSTM_BUDGET if record["kernel"] == "lstm_cell" else BUDGET
        assert record["registers"] <= budget[target], record
        if record["kernel"] in ("cross_tiles", "rank_tiles"):
            assert (record["vector_loads"] > 0) == (record["aligned"] > 0), record
            if record["aligned"] and (record["kernel"] == "rank_tiles" or "moments" in record["variant"]):
                assert record["vector_stores"] > 0, record
    assert {record["kernel"] for record in records} == {"cross_tiles", "rank_tiles", "reduce_partials", "lstm_cell"}
