"""How time is measured: seconds of one CPU thread or of a device, contestants in turn, the least of several rounds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch


def interleaved(
    contestants: Mapping[str, Callable[[], object]], rounds: int, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """Return the least seconds of each contestant, after one uncounted round.

    On the CPU they are CPU seconds of one thread; on a CUDA device wall-clock seconds until it has finished. Taking
    turns lets a slow spell of the machine hit all of them alike.
    """
    device = torch.device(device)

    def now() -> float:
        if device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize(device)
        return time.perf_counter()

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    best = dict.fromkeys(contestants, float("inf"))
    try:
        for turn in range(rounds + 1):
            for name, function in contestants.items():
                began = now()
                function()
                taken = now() - began
                if turn:
                    best[name] = min(best[name], taken)
    finally:
        torch.set_num_threads(before)
    return best
