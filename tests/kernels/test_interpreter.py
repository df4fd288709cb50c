"""The kernels in Triton's interpreter: see ``interpreter_job.py``."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    job = Path(__file__).with_name("interpreter_job.py")
    environment = dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    finished = subprocess.run([sys.executable, str(job)], env=environment, capture_output=True, text=True)
    print(finished.stdout)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "launches" in finished.stdout
