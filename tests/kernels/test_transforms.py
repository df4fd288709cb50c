"""The public operations under every transform, eager and compiled, on values: against formulas written out per entry.

The same checks run on the Triton kernels in the interpreter's process; see ``interpreter_job.py``.
"""

import pytest
import torch
from transform_matrix import TRANSFORMS, check


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "fullgraph"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("operation", ["cross", "rank2", "statistics", "directions", "lstm_cell"])
def test_values_under_transforms(operation, transform, compiled):
    check(operation, transform, compiled, torch.float64)


@pytest.mark.parametrize("operation", ["cross", "rank2", "statistics", "directions", "lstm_cell"])
def test_values_without_derivative_in_float32(operation):
    """The native path, where there is one."""
    check(operation, "none", False, torch.float32)
