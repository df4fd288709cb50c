"""What test_distributed.py and its job train on: even and uneven splits, and a task that is now and then spoiled."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from subspace_meta.meta.trainer import StreamSettings, Trainer, TrainSettings
from subspace_meta.tasks import SyntheticPCA


@dataclass(frozen=True)
class SometimesSpoiled(SyntheticPCA):
    """A family one task of which now and then has a NaN in its batches."""

    place: int = 0

    def sample(self, data: dict[str, Tensor], generator: torch.Generator, steps: int) -> dict[str, Tensor]:
        batch = super().sample(data, generator, steps)
        if float(torch.rand((), generator=generator)) < 0.5:
            batch["z"][0, self.place] = math.nan
        return batch


SETTINGS = TrainSettings(
    (
        StreamSettings((SyntheticPCA(8, 2, batch_size=8),), tasks=3, compiled=False),
        StreamSettings((SometimesSpoiled(6, 2, batch_size=8),), tasks=4, compiled=False),
    ),
    outer_steps=12,
    segment=4,
    longest=16,  # several intervals: the bound on what passes their borders is about all tasks
    horizon=(16, 32),
)
# In the part of the second process.
LAST_SPOILED = replace(
    SETTINGS, streams=(StreamSettings((SometimesSpoiled(6, 2, batch_size=8, place=3),), tasks=4, compiled=False),)
)


def findings(trainer: Trainer, records: list[dict]) -> dict:
    """Return the meta-parameters and the log without what a clock says."""
    log = [{key: value for key, value in record.items() if key != "seconds"} for record in records]
    return {"theta": {name: value.tolist() for name, value in trainer.theta.items()}, "log": log}
