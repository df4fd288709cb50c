"""One of four processes; test_sharded.py starts them, and compares what they find with one process.

The four are one mesh, two pairs that do the same, or two replicas of two parts. Each saves its findings.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from making import lively_weights, normal
from torch import Tensor, distributed
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import functional

import subspace_meta as sm

RULES = {"[0357].weight": sm.Stiefel(), "9.weight": sm.Oblique()}
ALONE = {"3.weight": sm.Stiefel()}  # three of four ranks own nothing
INPUTS, LABELS = normal(8, 2, 5, 5, seed=1), torch.arange(8) % 4
NAMES = ("base", "guarded", "RAdam", "RSGD", "alone")
# Small enough for the learned optimizer to choose a unit, which has to be saved, too.
SCALES = {"base": 2.0**-40, "RAdam": 1.0}


def network(seed: int = 0) -> torch.nn.Module:
    """Rows that four ranks cannot share: 5, 6 or 3 of them, so that parts are uneven and some empty."""
    torch.manual_seed(seed)
    layers = [torch.nn.Conv2d(2, 5, 3), torch.nn.Tanh(), torch.nn.Flatten()]
    for sizes in ((45, 6), (6, 6), (6, 6), (6, 3), (3, 4)):
        layers += [torch.nn.Linear(*sizes), torch.nn.Tanh()]
    return torch.nn.Sequential(*layers[:-1]).double()


def shell(name: str, model: torch.nn.Module, **settings: Any) -> sm.optim.Riemannian:
    if name in ("base", "guarded"):
        guarded = name == "guarded"
        averaging = name == "base"
        weights = lively_weights()
        weights["noise.bias"] = weights["noise.bias"] + 1.0
        made = partial(sm.optim.SubspaceMeta, rules=RULES, weights=weights, guarded=guarded, averaging=averaging)
    else:
        kind, options = (sm.RSGD, {"momentum": 0.9}) if name == "RSGD" else (sm.RAdam, {})
        rules = ALONE if name == "alone" else RULES
        made = partial(sm.optim.Riemannian, rules=rules, optimizer=kind, lr=0.05, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sm.optim.ProjectionWarning)
        return made(model, **settings)


def sharded(mesh: Any, seed: int = 0) -> torch.nn.Module:
    from torch.distributed.fsdp import fully_shard

    model = network(seed)
    if mesh is not None:
        fully_shard(model[3], mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def backward(model: torch.nn.Module, mesh: Any, scale: float = 1.0) -> Tensor:
    """Each rank of the mesh has an equal part of the batch."""
    count = 1 if mesh is None else mesh.size()
    index = 0 if mesh is None else mesh.mesh.flatten().tolist().index(distributed.get_rank())
    part = slice(8 * index // count, 8 * (index + 1) // count)
    loss = scale * functional.cross_entropy(model(INPUTS[part]), LABELS[part])
    loss.backward()
    return loss


def train(optimizer: Any, model: torch.nn.Module, mesh: Any, steps: range, scale: float = 1.0) -> None:
    """Two matrices have their first gradients later, one has none in a step; with a rate of 0 one has a zero one.

    A loss that begins small grows: what the optimizer chose at first is not what it would choose now.
    """
    for step in steps:
        optimizer.zero_grad()
        loss = backward(model, mesh, scale ** (1 - step / 10))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.2)
        if step < 1:
            model[5].weight.grad = None
        if step < 2 or step == 4:
            model[7].weight.grad = None
        rates = [group["lr"] for group in optimizer.param_groups]
        if step == 3:
            optimizer.param_groups[0]["lr"] = 0.0
            model[0].weight.grad = None
            model[3].weight.grad *= 0
        optimizer.step(loss=loss)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def full(tensor: Tensor) -> Tensor:
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().clone()


def values(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: full(p) for name, p in model.named_parameters()}


def averages(model: torch.nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """Return what a model holds while averages are in it; nothing if there are none."""
    if not optimizer.param_groups[0].get("averaging"):
        return {}
    with optimizer.averaged():
        return values(model)


def scalars(optimizer: Any) -> dict[str, float]:
    """Return what states have one value of: counts of steps, the guard's view of the loss."""
    saved = optimizer.state_dict()["state"]
    return {f"{i} {key}": float(t) for i, part in saved.items() for key, t in part.items() if t.ndim == 0}


def trained(name: str, mesh: Any, steps: int = 5) -> dict[str, Any]:
    model = sharded(mesh)
    optimizer = shell(name, model)
    start = values(model)
    train(optimizer, model, mesh, range(2))
    optimizer.state = dict(optimizer.state)
    train(optimizer, model, mesh, range(2, steps))
    # Of AdamW's parts the sizes are torch's affair.
    matrices = {p for group in optimizer.param_groups[: len(optimizer._groups)] for p in group["params"]}
    held = {name: optimizer.state[p] for name, p in model.named_parameters() if p in matrices}
    here = {name: sum(t.numel() for t in part.values() if t.ndim and not t.is_meta) for name, part in held.items()}
    return {
        "start": start,
        "averages": averages(model, optimizer),
        "end": values(model),
        "state": here,
        "scalars": scalars(optimizer),
        "violation": optimizer.check(),
    }


def mixed(mesh: Any) -> dict[str, Tensor]:
    """One of two equal matrices stays out of sharding: every rank steps it, and one of them both."""
    from torch.distributed.fsdp import fully_shard

    model = network()
    whole = model[5].weight
    if mesh is not None:
        fully_shard(model, mesh=mesh, ignored_params={whole})
    optimizer = shell("RAdam", model)
    for _ in range(10):
        optimizer.zero_grad()
        backward(model, mesh)
        if mesh is not None:
            distributed.all_reduce(whole.grad)
            whole.grad /= mesh.size()
        optimizer.step()
    return values(model)


def states(model: torch.nn.Module, optimizer: Any, options: StateDictOptions) -> dict[str, Any]:
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }


def save(folder: Path, model: torch.nn.Module, optimizer: Any, flat: bool, group: Any = None) -> None:
    saved = states(model, optimizer, StateDictOptions(flatten_optimizer_state_dict=flat))
    checkpoint.save(saved, checkpoint_id=folder, process_group=group, no_dist=group is None)


def load(folder: Path, model: torch.nn.Module, optimizer: Any, flat: bool, group: Any = None) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    found = states(model, optimizer, options)
    checkpoint.load(found, checkpoint_id=folder, process_group=group, no_dist=group is None)
    model.load_state_dict(found["model"])
    set_optimizer_state_dict(model, optimizer, found["optimizer"], options=options)


def resumed(name: str, folder: Path, mesh: Any, steps: range, group: Any) -> tuple[Any, torch.nn.Module]:
    model = sharded(mesh, seed=3)
    optimizer = shell(name, model)
    load(folder, model, optimizer, name == "RAdam", group)
    train(optimizer, model, mesh, steps, SCALES[name])
    return optimizer, model


def checkpoints(folder: Path, pair: Any, all_four: Any) -> dict[str, Any]:
    """Two ranks save, four go on and save, two and one go on; what one process has saved, four go on with."""
    found = {}
    mine = f"pair{all_four.get_local_rank() // 2}"
    for name, scale in SCALES.items():
        flat = name == "RAdam"
        model = sharded(pair)
        optimizer = shell(name, model)
        train(optimizer, model, pair, range(3), scale)
        save(folder / f"{name}-{mine}", model, optimizer, flat, pair.get_group())
        distributed.barrier()
        optimizer, model = resumed(name, folder / f"{name}-pair0", all_four, range(3, 5), all_four.get_group())
        found[name, "2 to 4"] = values(model)
        save(folder / f"{name}-four", model, optimizer, flat, all_four.get_group())
        whole = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
        found[name, "full"] = whole
        distributed.barrier()
        _, model = resumed(name, folder / f"{name}-four", pair, range(5, 7), pair.get_group())
        found[name, "4 to 2"] = values(model)
        _, model = resumed(name, folder / f"{name}-one", all_four, range(3, 5), all_four.get_group())
        found[name, "1 to 4"] = values(model)
    return found


def said(action: Any) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


class Refusing(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:
        if distributed.get_rank() == 1:
            raise KeyError("of the second")


def spoil(kind: str, model: torch.nn.Module) -> None:
    rank = distributed.get_rank()
    if kind == "nan" and rank == 2:
        model[3].weight.grad.to_local()[0, 0] = torch.nan
    if kind == "elsewhere" and rank == 2:
        model[3].bias.grad.to_local()[0] = torch.nan
    if kind == "overflow" and rank == 2:
        model[3].weight.grad.to_local()[:] = 1e200
    if kind == "missing" and rank == 2:
        model[3].weight.grad = None


def errors(mesh: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind in ("nan", "elsewhere", "overflow", "missing", "refused"):
        for policy in ("raise", "skip"):
            model = sharded(mesh)
            others = partial(Refusing, lr=0.1) if kind == "refused" else torch.optim.AdamW
            optimizer = shell("alone", model, non_finite=policy, others=others)
            backward(model, mesh)
            before = values(model)
            spoil(kind, model)
            text = said(optimizer.step)
            same = all(torch.equal(value, before[name]) for name, value in values(model).items())
            found[kind, policy] = {"said": text, "unchanged": same, "skipped": optimizer.skipped}
            if kind != "refused":  # and the next step is a step
                optimizer.zero_grad()
                backward(model, mesh)
                optimizer.step()
                moved = [name for name, value in values(model).items() if not torch.equal(value, before[name])]
                found[kind, policy]["moved"] = len(moved)
    found["off"] = said(lambda: shell("alone", sharded(mesh), project=False))
    found["all"] = said(lambda: sm.optim.Riemannian(sharded(mesh), RULES, sm.RDoG))
    return found


def placements(mesh: Any) -> dict[str, Any]:
    """Matrices placed over a mesh of two dimensions, data and tensor parallel."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    found: dict[str, Any] = {}
    start = sm.Geometry.from_rules({"w": torch.empty(6, 4)}, {"w": sm.Stiefel()}).initialize(dtype=torch.float64)["w"]
    distributed.broadcast(start, 0)
    for kind, places in {
        "replicated": [Replicate(), Replicate()],
        "rows": [Shard(0), Replicate()],
        "columns": [Replicate(), Shard(1)],
        "both": [Shard(0), Shard(1)],
    }.items():
        p = torch.nn.Parameter(distribute_tensor(start.clone(), mesh, places))
        try:
            optimizer = sm.optim.Riemannian([("w", p)], {"w": sm.Stiefel()}, sm.RAdam, 0.1)
        except ValueError as error:
            found[kind] = str(error)
            continue
        p.grad = distribute_tensor(normal(6, 4, seed=2), mesh, places)
        optimizer.step()
        found[kind] = full(p)
    q = torch.nn.Parameter(start.clone())
    optimizer = sm.optim.Riemannian([("w", q)], {"w": sm.Stiefel()}, sm.RAdam, 0.1)
    q.grad = normal(6, 4, seed=2)
    optimizer.step()
    return {**found, "plain": q.detach()}


def left_alone(mesh: Any) -> dict[str, Any]:
    """The last rank ends; what do the others hear, and after how long?"""
    model = sharded(mesh)
    optimizer = shell("RAdam", model)
    backward(model, mesh)
    distributed.barrier()
    if distributed.get_rank() == 3:
        os._exit(0)
    start = time.monotonic()
    return {"said": said(optimizer.step), "seconds": time.monotonic() - start}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    importlib.import_module("torch.distributed.nn")  # before the group is made, see docs/torch_optim.md
    distributed.init_process_group("gloo", timeout=timedelta(seconds=120))
    from torch.distributed.device_mesh import DeviceMesh

    all_four = DeviceMesh("cpu", torch.arange(4))
    square = DeviceMesh("cpu", torch.arange(4).reshape(2, 2), mesh_dim_names=("replicas", "parts"))
    pair = square["parts"]
    found: dict[str, Any] = {}
    for name in NAMES:
        found[name, "two"], found[name, "four"] = trained(name, pair), trained(name, all_four)
    found["base", "replicated"] = trained("base", square)
    found["mixed"] = mixed(all_four)
    found["checkpoints"] = checkpoints(folder, pair, all_four)
    found["errors"] = errors(all_four)
    found["placements"] = placements(square)
    rank = distributed.get_rank()
    if rank == 3:
        torch.save(found, folder / "found3.pt")
    found["left"] = left_alone(all_four)
    torch.save(found, folder / f"found{rank}.pt")
    os._exit(0)  # there is no group any more that could be left


if __name__ == "__main__":
    main(Path(sys.argv[1]))
