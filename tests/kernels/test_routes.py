"""Where the Triton kernels run: see ``routes_job.py``."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_kernels_run_where_they_should():
    pytest.importorskip("triton")
    job = Path(__file__).with_name("routes_job.py")
    environment = dict(os.environ, TRITON_INTERPRET="1", SUBSPACE_KERNELS_INTERPRET="1", OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, str(job)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count(": right") == 7
