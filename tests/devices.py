"""Two ways to see, without a GPU, a tensor that is made on the wrong device.

``NamedDevices`` raises where the library makes a tensor without saying where. ``META`` is a device beside the CPU whose
tensors have no values; ``OneDevice`` raises where one meets a tensor of the CPU that is not a single number, as CUDA
does (and also at indices, which CUDA would wait for). Functions that look at values cannot run there.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode

import subspace_meta

ROOMS = tuple(
    str(Path(subspace_meta.__file__).parent / room)
    for room in ("adapter", "geometry.py", "manifolds", "meta", "optimizers", "tasks")
)
META = torch.device("meta")


class UnnamedDeviceError(AssertionError):
    """A tensor was made on torch's default device."""


class NamedDevices(TorchFunctionMode):
    """Raises where code of ``ROOMS`` makes a tensor without naming a device."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in _device_constructors() and kwargs.get("device") is None:
            code, line = sys._getframe(1).f_code, sys._getframe(1).f_lineno
            if code.co_filename.startswith(ROOMS):
                raise UnnamedDeviceError(f"{code.co_filename}:{line}: {function.__name__} names no device")
        return function(*args, **kwargs)


class MixedDevicesError(AssertionError):
    """An operation met tensors of several devices."""


class OneDevice(TorchDispatchMode):
    """Raises where an operation meets tensors of several devices."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if len(devices := {str(tensor.device) for tensor in tensors if tensor.dim()}) > 1:
            raise MixedDevicesError(f"{function} met tensors of {', '.join(sorted(devices))}")
        return function(*args, **(kwargs or {}))


class MetaGenerator(torch.Generator):
    """A generator that says it is one of ``META``; torch has none."""

    @property
    def device(self) -> torch.device:
        return META
