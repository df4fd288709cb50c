"""``subspace-meta bench meta``: meta-gradients through unrolled inner loops, side by side with other libraries.

Four questions: differentiated task-steps per second against JAX's ``jit(vmap(scan))`` of the same maths and against
TorchOpt's differentiable optimizer; seconds to compile, cold and warm, for several horizons; and memory and time of a
long horizon with and without recomputation. The peers are in ``tests/benchmarks`` of a source checkout and need the
``bench`` extra; where they are missing, the table says so.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from subspace_meta.adapter.network import Weights
from subspace_meta.evaluation.timing import interleaved
from subspace_meta.geometry import Geometry, Params
from subspace_meta.meta.trainer import PresetOptimizer, relative_log_loss
from subspace_meta.meta.unroll import InnerLoop, MetaGradient, pull_back, run
from subspace_meta.tasks import SyntheticPCA
from subspace_meta.tasks.base import Batch, Data, Problem
from subspace_meta.weights import pretrained

SHAPES = ((64, 32, 4), (16, 64, 8), (1, 256, 16))  # tasks, d, p
STEPS = 20
HORIZONS = (20, 200, 2000)
LONG = 1000
PEERS = Path(__file__).parents[2] / "tests" / "benchmarks"


class Setting(NamedTuple):
    """One meta-gradient to compute: an inner loop with all that it needs."""

    loop: InnerLoop
    theta: Weights
    params: Params
    batches: Batch
    data: Data
    initial: Tensor
    reference: Tensor

    def meta_gradient(self) -> MetaGradient:
        """Return the gradient of the mean relative log loss over all tasks and steps."""
        trace = run(self.loop, self.theta, self.loop.start(self.theta, self.params), self.batches, self.data)
        objectives = trace.objectives.requires_grad_()
        loss = relative_log_loss(objectives, self.initial, self.reference).mean()
        (cotangents,) = torch.autograd.grad(loss, objectives)
        return pull_back(self.loop, self.theta, trace, self.batches, self.data, cotangents)


def pca_setting(
    tasks: int,
    d: int,
    p: int,
    steps: int,
    block: int = 1,
    interval: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Setting:
    """Return the shipped optimizer on synthetic PCA, 64 samples a step; all residuals kept unless ``interval``."""
    generator = torch.Generator().manual_seed(0)
    family = SyntheticPCA(d, p)
    data = family.draw(generator, tasks)
    drawn = (
        pretrained(),
        family.problem.geometry.stacked(tasks).initialize(generator, torch.float64),
        family.sample(data, generator, steps),
        {name: data[name] for name in ("covariance", "reference")},
    )
    theta, params, batches, measured = ({k: v.to(dtype) for k, v in part.items()} for part in drawn)
    loop = InnerLoop(family.problem, PresetOptimizer("base"), block=block, interval=interval or steps)
    return Setting(loop, theta, params, batches, measured, loop.objective(params, measured), measured["reference"])


def _peer(name: str, package: str) -> Any:
    """Return the peer's module, or ``None`` where it or its package is missing."""
    path = PEERS / f"{name}.py"
    if importlib.util.find_spec(package) is None or not path.is_file():
        return None
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def relative_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Return |a - b| / |b| over all tensors."""
    difference = sum(float((a[name].double() - b[name].double()).square().sum()) for name in b)
    return (difference / sum(float(value.double().square().sum()) for value in b.values())) ** 0.5


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Bind this process to one core, where the system can: pools of threads would count seconds of their own."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def throughput(rounds: int, block: int) -> list[dict[str, Any]]:
    """Measure differentiated task-steps per second, one thread, for each of ``SHAPES``; JAX unrolls its scan 1 or 4."""
    twin = _peer("jax_twin", "jax")
    records = []
    for tasks, d, p in SHAPES:
        setting = pca_setting(tasks, d, p, STEPS, block)
        ours = setting.meta_gradient().theta
        contestants: dict[str, Callable[[], object]] = {"ours": setting.meta_gradient}
        differences = []
        for unroll in (1, 4) if twin else ():
            call = twin.caller(setting, unroll)
            differences.append(relative_difference(call(), ours))
            contestants[f"JAX, unroll {unroll}"] = call
        seconds = interleaved(contestants, rounds)
        rates = {name: tasks * STEPS / value for name, value in seconds.items()}
        peer = max((rate for name, rate in rates.items() if name != "ours"), default=None)
        records.append(
            {
                "what": f"{tasks} x ({d},{p}), {STEPS} steps: task-steps/s",
                "ours": rates["ours"],
                "peer": "JAX",
                "theirs": peer,
                "ratio": peer and rates["ours"] / peer,
                "relative_difference": max(differences, default=None),
                "all": rates,
            }
        )
    return records


def mlp_loss(params: Params, batch: Batch) -> Tensor:
    """Return the mean squared error of a two-layer perceptron."""
    hidden = torch.tanh(batch["x"] @ params["w1"].mT + params["b1"])
    return (hidden @ params["w2"].mT + params["b2"] - batch["y"]).square().mean()


@dataclass(frozen=True)
class Adam:
    """Adam (Kingma and Ba 2015) on Euclidean parameters, to compare engines: what TorchOpt differentiates."""

    geometry: Geometry
    lr: float = 1e-2

    def init(self, params: Mapping[str, Tensor]) -> tuple[Tensor, Params, Params]:
        """Return step count and moments."""
        zeros = {name: torch.zeros_like(value) for name, value in params.items()}
        return torch.zeros(()), zeros, {name: value.clone() for name, value in zeros.items()}

    def update(
        self,
        grads: Mapping[str, Tensor],
        state: tuple[Tensor, Params, Params],
        params: Mapping[str, Tensor],
        value: Tensor | None = None,
    ) -> tuple[Params, tuple[Tensor, Params, Params]]:
        """Take one step."""
        step = state[0] + 1
        first = {name: 0.9 * state[1][name] + 0.1 * g for name, g in grads.items()}
        second = {name: 0.999 * state[2][name] + 0.001 * g * g for name, g in grads.items()}
        moved = {
            name: x - self.lr * (first[name] / (1 - 0.9**step)) / ((second[name] / (1 - 0.999**step)).sqrt() + 1e-8)
            for name, x in params.items()
        }
        return moved, (step, first, second)


def make_adam(geometry: Geometry, theta: Weights) -> Adam:
    """Return Adam; it has no meta-parameters."""
    return Adam(geometry)


def mlp_setting(tasks: int = 64, steps: int = STEPS) -> tuple[InnerLoop, Params, Batch, Data]:
    """Return Adam on a perceptron 8-32-4, 32 samples a step; the last batch measures."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"w1": (32, 8), "b1": (32,), "w2": (4, 32), "b2": (4,)}
    params = {
        name: 0.3 * torch.randn(shape, generator=generator).expand(tasks, *shape).clone()
        for name, shape in shapes.items()
    }
    batches = {name: torch.randn(steps, tasks, 32, width, generator=generator) for name, width in (("x", 8), ("y", 4))}
    data = {name: value[-1] for name, value in batches.items()}
    geometry = Geometry.from_rules({name: value[0] for name, value in params.items()})
    loop = InnerLoop(Problem(geometry, mlp_loss, mlp_loss), make_adam, interval=steps)
    return loop, params, batches, data


def perceptron(rounds: int) -> dict[str, Any]:
    """Measure the derivative of the last loss to the starting point, through ``STEPS`` steps of Adam."""
    twin = _peer("torchopt_twin", "torchopt")
    loop, params, batches, data = mlp_setting()
    tasks = len(params["b1"])
    cotangents = torch.zeros(STEPS, tasks)
    cotangents[-1] = 1.0

    def ours() -> Params:
        trace = run(loop, {}, loop.start({}, params), batches, data)
        return pull_back(loop, {}, trace, batches, data, cotangents).carry.params

    contestants: dict[str, Callable[[], object]] = {"ours": ours}
    difference = None
    if twin:
        contestants["TorchOpt"] = call = twin.caller(params, batches, Adam.lr)
        difference = relative_difference(call(), ours())
    rates = {name: tasks * STEPS / value for name, value in interleaved(contestants, rounds).items()}
    theirs = rates.get("TorchOpt")
    return {
        "what": f"perceptron 8-32-4, {tasks} tasks, Adam: task-steps/s",
        "ours": rates["ours"],
        "peer": "TorchOpt",
        "theirs": theirs,
        "ratio": theirs and rates["ours"] / theirs,
        "relative_difference": difference,
        "all": rates,
    }


_CHILD = """
import sys, time, json, torch
from subspace_meta.benchmarks.meta import pca_setting
steps, block = map(int, sys.argv[1:])
setting = pca_setting(16, 64, 8, steps, block, interval=20 * block)
first = setting._replace(batches={name: value[:block] for name, value in setting.batches.items()})
began = time.perf_counter()
first.meta_gradient()
seconds = time.perf_counter() - began
setting.meta_gradient()
print(json.dumps([seconds, torch._dynamo.utils.counters["stats"]["unique_graphs"]]))
"""


def compilation(block: int) -> list[dict[str, Any]]:
    """Measure the wall seconds until the first compiled block has run forward and back, cold and warm, all cores.

    Each in its own process; cold with an empty cache, warm with the cache that the cold one left. All steps of the
    horizon follow, and the graphs that were compiled are counted: one.
    """
    records = []
    for steps in HORIZONS:
        with tempfile.TemporaryDirectory() as cache:
            environment = dict(os.environ, TORCHINDUCTOR_CACHE_DIR=cache)
            for state in ("cold", "warm"):
                command = [sys.executable, "-W", "ignore", "-c", _CHILD, str(steps), str(block)]
                output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
                seconds, graphs = json.loads(output.splitlines()[-1])
                what = f"16 x (64,8), {steps} steps: {state} compilation, s"
                records.append({"what": what, "ours": seconds, "graphs": graphs})
    return records


def live_bytes() -> int:
    """Return the bytes that this process holds from the C library's allocator, in use and not merely reserved."""

    counters = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"

    class Mallinfo2(ctypes.Structure):
        _fields_ = [(name, ctypes.c_size_t) for name in counters.split()]

    function = ctypes.CDLL(None).mallinfo2
    function.restype = Mallinfo2
    info = function()
    return int(info.uordblks + info.hblkhd)


def peak_live_bytes(function: Callable[[], object]) -> int:
    """Return how far the live bytes rise above where they were, sampled every millisecond."""
    gc.collect()
    before, peak, done = live_bytes(), 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, live_bytes() - before)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        function()
    finally:
        done.set()
        thread.join()
    return peak


def memory(block: int) -> dict[str, Any]:
    """Compare ``LONG`` steps with all residuals kept and with the default interval: bytes, seconds, gradient.

    Bytes and seconds in float32, the gradients in float64.
    """
    kept = pca_setting(16, 64, 8, LONG, block)
    recomputed = kept._replace(loop=replace(kept.loop, interval=None))
    kept.meta_gradient()
    peaks = {name: peak_live_bytes(s.meta_gradient) for name, s in (("recomputed", recomputed), ("kept", kept))}
    seconds = interleaved({"recomputed": recomputed.meta_gradient, "kept": kept.meta_gradient}, 3)
    double = pca_setting(2, 16, 3, LONG, block, dtype=torch.float64)
    double = double._replace(loop=replace(double.loop, compiled=False))
    again = double._replace(loop=replace(double.loop, interval=None))
    return {
        "what": f"16 x (64,8), {LONG} steps: peak live bytes",
        "ours": peaks["recomputed"],
        "peer": "all residuals kept",
        "theirs": peaks["kept"],
        "ratio": peaks["recomputed"] / peaks["kept"],
        "seconds_ratio": seconds["recomputed"] / seconds["kept"],
        "relative_difference": relative_difference(again.meta_gradient().theta, double.meta_gradient().theta),
    }


def bench_meta(rounds: int = 10, block: int = 1) -> list[dict[str, Any]]:
    """Run all comparisons; one record a line of the table.

    Raises:
        ValueError: ``block`` does not divide the horizons.
    """
    if any(steps % block for steps in (STEPS, LONG, *HORIZONS)):
        raise ValueError(f"a block of {block} steps does not divide {STEPS}, {LONG} and {HORIZONS}")
    began = time.perf_counter()
    records = compilation(block)
    with one_core():
        records += [*throughput(rounds, block), perceptron(rounds), memory(block)]
    records.append({"what": "this benchmark, s", "ours": time.perf_counter() - began})
    return records
