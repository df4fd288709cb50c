"""What errors and warnings share: short lists of names, and whose line of code a warning is about."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

_INSIDE = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent))


def shortened(names: Sequence[str], shown: Callable[[str], str] = repr) -> str:
    """Return the first names, separated by commas, and how many more there are."""
    return ", ".join(map(shown, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def callers_level() -> int:
    """Return the stack level of the first caller outside of this package and of torch, for warnings."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    return level
