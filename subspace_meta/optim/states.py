"""The functional state of many matrices, seen as the state of each parameter, and back.

A functional optimizer keeps one state for all its parameters, packed so that a step is few operations. torch's tools
(checkpoints of every kind, sharding, inspection) expect ``state[parameter]``, a dict of tensors of that parameter. The
contract of states (``Optimizer.init``) says enough to cut one into the other without knowing the optimizer:

* a tuple holds one tensor a group; if the group has several members, its first dimension runs over them;
* a tensor without dimensions belongs to all parameters, and each gets a copy;
* the last dimension of any other tensor runs over the coordinates (rows of all matrices, then columns) or over the
  matrices of the packed layout;
* a named tuple inside is a part whose fields have the names ``part.field``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from subspace_kernels import Layout
from torch import Tensor

from subspace_meta.geometry import Geometry, ParameterGeometry

Shape = tuple[int, ...]
Parts = dict[str, dict[str, Tensor]]  # by parameter, then by field


@dataclass(frozen=True)
class _Place:
    """Where a parameter lies in the packed state."""

    parameter: ParameterGeometry
    group: int
    member: int | None  # None: the only one of its group
    spans: dict[str, slice]  # of its rows, its columns and its matrices


def _places(geometry: Geometry) -> tuple[list[_Place], Layout]:
    layout = Layout(tuple(group.shape for group in geometry.groups))
    starts = {"rows": 0, "columns": layout.rows, "matrices": 0}
    places = []
    for number, group in enumerate(geometry.groups):
        for index, member in enumerate(group.members):
            *batch, d, p = member.matrix_shape
            count = math.prod(batch)
            spans = {}
            for kind, size in (("rows", count * d), ("columns", count * p), ("matrices", count)):
                spans[kind] = slice(starts[kind], starts[kind] + size)
                starts[kind] += size
            places.append(_Place(member, number, index if len(group.members) > 1 else None, spans))
    return places, layout


def _leaves(state: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the fields of a state, ``part.field`` and its tensor or tuple of tensors."""
    for field, value in state._asdict().items():
        if hasattr(value, "_asdict"):
            yield from _leaves(value, f"{prefix}{field}.")
        else:
            yield prefix + field, value


def _pieces(name: str, value: Tensor | tuple[Tensor, ...], place: _Place, layout: Layout) -> dict[str, Tensor]:
    """Return what of a field belongs to a parameter: views of its memory."""
    if isinstance(value, tuple):
        if not value:
            return {}
        tensor = value[place.group] if place.member is None else value[place.group][place.member]
        parameter = place.parameter
        return {name: parameter.view.from_matrix(tensor) if tensor.shape == parameter.matrix_shape else tensor}
    if value.ndim == 0:
        return {name: value}
    if value.shape[-1] == layout.rows + layout.columns:
        return {f"{name}.{kind}": value[..., place.spans[kind]] for kind in ("rows", "columns")}
    if value.shape[-1] == layout.matrices:
        return {name: value[..., place.spans["matrices"]]}
    raise ValueError(
        f"field {name!r} of the state, of shape {tuple(value.shape)}, is neither over coordinates nor over matrices"
    )


def split(state: Any, geometry: Geometry) -> Parts:
    """Return the state of each parameter: views, but copies of what all share."""
    places, layout = _places(geometry)
    parts: Parts = {}
    for place in places:
        part: dict[str, Tensor] = {}
        for name, value in _leaves(state):
            part.update(_pieces(name, value, place, layout))
        parts[place.parameter.name] = {n: t.clone() if t.ndim == 0 else t for n, t in part.items()}
    return parts


def join(parts: Mapping[str, Mapping[str, Tensor]], like: Any, geometry: Geometry) -> Any:
    """Invert :func:`split`: a new state of the structure, devices and dtypes of ``like``.

    Raises:
        ValueError: names or shapes are not those of ``like``, or parameters disagree about what they share.
    """
    expected = split(like, geometry)
    shapes = {parameter.name: parameter.shape for parameter in geometry.parameters}
    for name, part in expected.items():
        given = {key: tuple(tensor.shape) for key, tensor in parts[name].items()}
        wanted = {key: tuple(tensor.shape) for key, tensor in part.items()}
        if given != wanted:
            raise ValueError(f"the state of {name!r} {_difference(given, wanted, shapes[name])}")
    places, layout = _places(geometry)

    def fill(name: str, value: Any) -> Any:
        if isinstance(value, tuple):
            members = [[place for place in places if place.group == number] for number in range(len(value))]
            return tuple(_stacked(name, *pair) for pair in zip(value, members, strict=True))
        if value.ndim == 0:
            copies = [parts[place.parameter.name][name] for place in places]
            if any(not torch.equal(copies[0].cpu(), other.cpu()) for other in copies):
                raise ValueError(f"parameters that were stepped together disagree about {name!r}")
            return copies[0].to(value).clone()
        keys = _pieces(name, value, places[0], layout)
        return torch.cat([parts[place.parameter.name][key].to(value) for key in keys for place in places], dim=-1)

    def _stacked(name: str, value: Tensor, members: list[_Place]) -> Tensor:
        tensors = []
        for place in members:
            tensor, parameter = parts[place.parameter.name][name].to(value), place.parameter
            shape = value.shape if place.member is None else value.shape[1:]
            tensors.append(parameter.view.to_matrix(tensor) if shape == parameter.matrix_shape else tensor)
        # A clone keeps the strides: rounding depends on them.
        return torch.stack(tensors) if len(tensors) > 1 else tensors[0].clone()

    return _rebuilt(like, fill)


def _difference(given: dict[str, Shape], wanted: dict[str, Shape], shape: Shape) -> str:
    """Return in words how the saved shapes of a parameter's state differ from those that it needs."""
    if given.keys() != wanted.keys():
        lacking, strange = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
        said = [f"it has no {', '.join(map(repr, lacking))}"] * bool(lacking)
        said += [f"it has {', '.join(map(repr, strange))}, which this one does not keep"] * bool(strange)
        return f"is of another optimizer or of other settings: {', and '.join(said)}"
    differing = [key for key in wanted if given[key] != wanted[key]]
    for key in differing:
        if wanted[key] == shape:  # a buffer of the parameter's shape tells that of the saved one
            return f"was saved for shape {given[key]}, here it is {shape}"
    key = differing[0]
    return f"was saved for another shape or other settings: {key!r} has shape {given[key]}, here it is {wanted[key]}"


def _rebuilt(state: Any, fill: Callable[[str, Any], Any], prefix: str = "") -> Any:
    """Return a state of the same structure with other leaves."""
    fields = {
        field: _rebuilt(value, fill, f"{prefix}{field}.") if hasattr(value, "_asdict") else fill(prefix + field, value)
        for field, value in state._asdict().items()
    }
    return type(state)(**fields)


def with_tangents(state: Any, change: Callable[[int, Tensor], Tensor]) -> Any:
    """Return the state with ``change(group, buffer)`` of every tangent buffer: the fields called ``momentum``."""

    def fill(name: str, value: Any) -> Any:
        if name.split(".")[-1] != "momentum":
            return value
        return tuple(change(number, tensor) for number, tensor in enumerate(value))

    return _rebuilt(state, fill)
