"""One process of a job; test_distributed.py starts two. Its findings are printed as JSON by the first one."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import torch
from distributed_settings import LAST_SPOILED, SETTINGS, findings
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import subspace_meta as sm
from subspace_meta.meta.distributed import Processes
from subspace_meta.meta.trainer import Trainer


def spread(processes: Processes, values: list[torch.Tensor]) -> float:
    """Return the largest difference of what two processes have."""
    flat = torch.cat([value.detach().reshape(-1) for value in values])
    held = [torch.empty_like(flat) for _ in range(processes.count)]
    distributed.all_gather(held, flat)
    return float((held[0] - held[-1]).abs().max())


def train(processes: Processes, checkpoint: Path) -> dict:
    trainer = Trainer(SETTINGS, processes)
    records = []
    for figures in trainer.run():
        records.append(figures)
        if trainer.outer_step == 5:
            trainer.save(checkpoint)
            distributed.barrier()
    resumed = Trainer(SETTINGS, processes)
    resumed.load(checkpoint)
    for _ in resumed.run():
        pass
    return {
        **findings(trainer, records),
        "spread": spread(processes, list(trainer.theta.values())),
        "resumed_equal": all(torch.equal(trainer.theta[name], resumed.theta[name]) for name in trainer.theta),
    }


def copies(processes: Processes) -> dict:
    """Whose data stand at the place of a task of the second process that was spoiled?"""
    trainer = Trainer(LAST_SPOILED, processes)
    while not trainer.spoiled_tasks:
        trainer.step()
    data = trainer.streams[0].data
    assert data is not None
    same = [[torch.equal(data["covariance"][i], data["covariance"][j]) for j in range(4)] for i in range(4)]
    return {"same": same, "spread": spread(processes, [data["covariance"]])}


def train_a_replicated_model(processes: Processes) -> dict:
    """Each process sees other data; gradients are averaged, and every process takes the same steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sm.optim.ProjectionWarning)
        optimizer = sm.optim.SubspaceMeta(model, {"0.weight": sm.Stiefel()})
    replicated = DistributedDataParallel(model)
    start = [p.detach().clone() for p in model.parameters()]
    generator = torch.Generator().manual_seed(processes.rank)
    for _ in range(10):
        images = torch.randn(8, 1, 6, 6, generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(replicated(images), (images.mean((1, 2, 3)) > 0).long()).backward()
        optimizer.step()
    moved = max(float((p.detach() - q).abs().max()) for p, q in zip(model.parameters(), start, strict=True))
    return {"moved": moved, "spread": spread(processes, list(model.parameters())), "data": float(images.sum())}


def threads() -> list[str]:
    """Return the names of this process's threads (on Linux; elsewhere nothing is known)."""
    return [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]


def main() -> None:
    torch.set_num_threads(1)
    processes = Processes.join()
    found = {"rank": processes.rank, "replicated": train_a_replicated_model(processes)}
    torch.set_default_dtype(torch.float64)
    found["trained"] = train(processes, Path(sys.argv[1]))
    found["copies"] = copies(processes)
    processes.leave()
    found["threads_left"] = [thread for thread in threads() if "gloo" in thread or "store" in thread]
    if processes.rank == 0:
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
