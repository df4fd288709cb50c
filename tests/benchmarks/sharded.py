"""What each rank of a sharded model remembers and takes for a step: the matrices of ResNet-50, split by fully_shard.

``torchrun --nproc-per-node 4 tests/benchmarks/sharded.py [--optimizer RAdam]`` prints a line for each rank; with
``--nproc-per-node 1`` that of one process. Gradients are random: no forward pass is part of it. Minutes on two cores.
"""

from __future__ import annotations

import argparse
import importlib
import time

import torch
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import subspace_meta as sm
from subspace_meta.benchmarks.memory import MODELS

STEPS = 3


class Matrices(torch.nn.Module):
    """Layers that are never called."""

    def __init__(self, shapes: tuple[tuple[int, int], ...]) -> None:
        super().__init__()
        self.layers = torch.nn.ParameterList(torch.eye(*shape) for shape in shapes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--optimizer", choices=("base", "RAdam"), default="base")
    chosen = parser.parse_args().optimizer
    importlib.import_module("torch.distributed.nn")  # before the group is made, see docs/torch_optim.md
    distributed.init_process_group("gloo")
    rank, count = distributed.get_rank(), distributed.get_world_size()
    model = Matrices(MODELS["resnet50"].matrices)
    fully_shard(model, mesh=DeviceMesh("cpu", torch.arange(count)))
    rules = {"*": sm.Stiefel()}
    if chosen == "base":
        optimizer = sm.optim.SubspaceMeta(model, rules)
    else:
        optimizer = sm.optim.Riemannian(model, rules, sm.RAdam, 1e-2)
    seconds = []
    for _ in range(STEPS):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        distributed.barrier()
        began = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - began)
    here = [t for part in optimizer.state.values() for t in part.values() if not t.is_meta]
    size = sum(t.numel() * t.element_size() for t in here)
    print(f"rank {rank} of {count}: state {size / 1e6:.1f} MB, {min(seconds):.1f} s a step", flush=True)
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
