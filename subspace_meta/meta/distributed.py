"""Meta-training by several processes: each has a part of the tasks, all have the same meta-parameters.

Every process draws all tasks and mini-batches from the same generator and keeps its part of the inner loops; what they
find is added up. So the numbers are those of one process, up to the rounding of sums, and the meta-parameters stay
equal bit for bit: the addends are exchanged, and each process adds them in the order of the ranks. On the CPU they are
exchanged by gloo, on CUDA devices, one a process, by NCCL.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

CPU = torch.device("cpu")
TIMEOUT = timedelta(minutes=30)  # a rank may compile while the others wait


class ProcessError(RuntimeError):
    """Another process of the job is gone, so this one cannot go on."""


def alone(value: Tensor) -> Tensor:
    """Return ``value``, the sum over one process."""
    return value


@dataclass(frozen=True)
class Processes:
    """The processes of a job, seen from one of them; by default it is alone.

    Attributes:
        rank: which one this is, from 0; rank 0 writes files and logs.
        count: how many there are.
        device: where this one's tensors lie while they are exchanged.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = CPU

    @staticmethod
    def join(device: torch.device | str = CPU) -> Processes:
        """Join the processes that ``torchrun`` has started; without it return a process that is alone.

        Args:
            device: this process's own; it decides whether gloo or NCCL connects them.

        Raises:
            ProcessError: the others cannot be reached.
        """
        device = torch.device(device)
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return Processes(device=device)
        if not distributed.is_initialized():
            # Its functions have the default group of that moment as default argument. Imported later, as torch's
            # compiler does, they would keep the group and gloo's threads for ever, and threads that are left at the
            # end of the interpreter may abort it.
            importlib.import_module("torch.distributed.nn")

            on_gpu = device.type == "cuda"
            if on_gpu:
                torch.cuda.set_device(device)  # NCCL gathers objects on the current device
            try:
                distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=TIMEOUT)
            except (RuntimeError, ValueError) as error:
                raise ProcessError(f"the processes of the job did not find each other: {error}") from error
        return Processes(distributed.get_rank(), distributed.get_world_size(), device)

    @staticmethod
    def leave() -> None:
        """End what :meth:`join` began, if it did; no thread of it is left."""
        if distributed.is_initialized():
            distributed.destroy_process_group()

    def part(self, tasks: int) -> slice:
        """Return which of so many tasks are this process's; sizes of parts differ by at most one.

        Raises:
            ValueError: there are fewer tasks than processes.
        """
        if tasks < self.count:
            raise ValueError(f"{tasks} tasks cannot be split over {self.count} processes; take fewer processes")
        return slice(tasks * self.rank // self.count, tasks * (self.rank + 1) // self.count)

    def total(self, value: Tensor) -> Tensor:
        """Return the sum of all processes' ``value``, the same bits for each; all of them have to call this.

        Raises:
            ProcessError: another process is gone.
        """
        if self.count == 1:
            return value
        mine = value.to(self.device).contiguous()
        found = [torch.empty_like(mine) for _ in range(self.count)]
        self._exchange(distributed.all_gather, found, mine)
        return torch.stack(found).sum(0).to(value.device)

    def any(self, flag: bool) -> bool:
        """Return whether one process at least says so; see :meth:`total`."""
        return bool(self.total(torch.tensor(int(flag), device=self.device)))

    def collect(self, value: Any) -> list[Any]:
        """Return what each process has, tensors included, for rank 0 (an empty list for the others)."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count if self.rank == 0 else []
        self._exchange(distributed.gather_object, value, found or None)
        return found

    def _exchange(self, operation: Any, *arguments: Any) -> None:
        try:
            operation(*arguments)
        except RuntimeError as error:
            raise ProcessError(
                f"process {self.rank} of {self.count} cannot go on: another one has ended or does not answer "
                f"({str(error).strip().splitlines()[0]}); what was saved last is complete, go on from it with --resume"
            ) from error
