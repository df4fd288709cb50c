"""What the user hands in, as groups of named parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch.nn import Module, Parameter
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

COMPILED = "_orig_mod."  # in front of the names of a compiled module's parameters
WRAPPED = "module."  # in front of those of a replicated one


def plain(name: str, wrapped: bool = True) -> str:
    """Return the name that a parameter has in the model itself, not compiled and (if ``wrapped``) not replicated."""
    name = name.replace(COMPILED, "")
    return name.removeprefix(WRAPPED) if wrapped else name


def named(params: Any) -> list[tuple[str, Parameter]]:
    """Return names and parameters of a module or an iterable of pairs.

    A compiled or replicated module's parameters have the names that they have in the module itself.

    Raises:
        ValueError: there are no names, or a parameter of a lazy module has no shape yet.
    """
    if isinstance(params, Module):
        wrapped = isinstance(params, DataParallel | DistributedDataParallel)
        wrapped |= isinstance(getattr(params, "_orig_mod", None), DataParallel | DistributedDataParallel)
        found = [(plain(name, wrapped), p) for name, p in params.named_parameters()]
    else:
        found = []
        for entry in params.items() if isinstance(params, Mapping) else params:
            if not (isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str)):
                kind = type(entry).__name__
                raise ValueError(f"rules need names: give the module, or model.named_parameters(), not {kind} objects")
            found.append((plain(entry[0], wrapped=False), entry[1]))
    for name, p in found:
        if is_lazy(p):
            raise ValueError(f"parameter {name!r} of a lazy module has no shape yet: call the model once first")
    return found


def named_groups(params: Module | Iterable[Any]) -> list[dict[str, Any]]:
    """Return parameter groups whose ``"params"`` are lists of pairs."""
    entries = params if isinstance(params, Module | Mapping) else list(params)
    if not isinstance(entries, Module | Mapping) and entries and all(isinstance(e, dict) for e in entries):
        return [{**entry, "params": named(entry["params"])} for entry in entries]
    return [{"params": named(entries)}]
