"""How time is measured: CPU seconds of one thread, contestants in turn, the minimum of several rounds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch


def interleaved(contestants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the least CPU seconds of each contestant, one thread, after one uncounted round.

    Taking turns lets a slow spell of the machine hit all of them alike.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    best = dict.fromkeys(contestants, float("inf"))
    try:
        for turn in range(rounds + 1):
            for name, function in contestants.items():
                began = time.process_time()
                function()
                taken = time.process_time() - began
                if turn:
                    best[name] = min(best[name], taken)
    finally:
        torch.set_num_threads(before)
    return best
