"""Parameters that are stepped together: their functional optimizer, its state, and what they were after the last step.

A cohort is made of the parameters of one group, device and dtype whose gradients first came together. What has to be
looked at around a step happens here, eagerly: points that somebody moved since, gradients whose scale is out of the
range of their type, results that are not finite.
"""

from __future__ import annotations

import dataclasses
import glob
import math
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from subspace_meta.geometry import Geometry, Rule
from subspace_meta.optim import states
from subspace_meta.optim.messages import callers_level, shortened
from subspace_meta.optim.options import changed
from subspace_meta.optimizers.subspace import SubspaceOptimizer

FEASIBLE = 1e-5  # a larger violation at construction is mended, with a warning
LATER = 1e-3  # in the middle of a run; a smaller one the retractions take away by themselves
# Powers of two between which the entries of a first gradient may lie as they are: their squares are far from the ends
# of float32. The learned optimizer, which sees ratios only, gets any other multiplied by a power of two.
COMFORTABLE = (2.0**-20, 2.0**20)
# What is kept for each parameter beside the optimizer's own state.
COHORT, UNIT = "cohort", "unit"


class ProjectionWarning(UserWarning):
    """Parameters were moved to the nearest point of their manifolds."""


@dataclass
class Cohort:
    """The functional optimizer and state of parameters that are stepped together.

    Attributes:
        optimizer: a frozen value object.
        state: what it keeps.
        units: factor of each parameter's gradient, a power of two; 0: not chosen yet, no gradient was different from 0.
        norms: of the parameters after the last step; others mean that somebody moved them. None: nothing was stepped.
        free: options, and whether they were on, that were found to need no other state.
        number: which one it is in its group.
        kind: device and dtype of the parameters for which the state was made. None: it has no tensors of these.
    """

    optimizer: Any
    state: Any
    units: dict[str, float] = field(default_factory=dict)
    norms: Tensor | None = None
    free: set[tuple[str, bool]] = field(default_factory=set)
    number: int = 0
    kind: tuple[torch.device, torch.dtype] | None = None

    @property
    def geometry(self) -> Geometry:
        """The geometry of its parameters."""
        geometry: Geometry = self.optimizer.geometry
        return geometry

    @property
    def sees_ratios(self) -> bool:
        """Whether gradients have units: the guarded optimizer's safe steps are plain gradient steps, without."""
        return isinstance(self.optimizer, SubspaceOptimizer) and not self.optimizer.guarded

    @property
    def tolerance(self) -> float:
        """The constraint violation that its points may have: methods without a retraction say how far they go."""
        return max(LATER, float(getattr(self.optimizer, "epsilon", 0.0)))

    def take_options(self, group: Mapping[str, Any], params: Mapping[str, Tensor]) -> None:
        """Bring the optimizer to the options of its parameter group.

        Raises:
            ValueError: an option is out of its range, or would need a state of another structure.
        """
        different = changed(self.optimizer, group)
        if not different:
            return
        optimizer = dataclasses.replace(self.optimizer, **different)
        for key, value in different.items():
            if key != "lr" and (key, bool(value)) not in self.free:
                points = _on_manifolds(self.geometry, params)
                starts = [one.init(points) for one in (self.optimizer, dataclasses.replace(optimizer, **{key: value}))]
                if not _alike(*starts):
                    raise ValueError(
                        f"{key}={value!r} needs a state that was not kept so far: it is chosen at construction, or for "
                        "a new parameter group"
                    )
                self.free.add((key, bool(value)))
        self.optimizer = optimizer

    def check_kind(self, params: Mapping[str, Tensor]) -> None:
        """Raise ``ValueError`` unless parameters are still where, and of the dtype, that their state was made for."""
        if self.kind is None:
            return
        device, dtype = self.kind
        for name, p in params.items():
            if p.dtype != dtype or p.device != device:
                now, then = (p.dtype, dtype) if p.dtype != dtype else (p.device, device)
                raise ValueError(
                    f"parameter {name!r} is {now} now, and its state {then}: the model was converted after a step. "
                    "Make the optimizer after that, or bring the state along: "
                    "optimizer.load_state_dict(optimizer.state_dict())"
                )

    def scaled(self, grads: Mapping[str, Tensor | None], params: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
        """Return the gradients, multiplied by their units where the optimizer sees ratios only.

        A power of two changes no digit; without it squares of entries beyond 1e19 would overflow in float32, and
        those below 1e-19 vanish.
        """
        if not self.sees_ratios:
            return dict(grads)
        if open_ := [name for name, grad in grads.items() if grad is not None and not self.units.get(name)]:
            self.units.update(_units(self.geometry, {name: grads[name] for name in open_}, params))
        return {
            name: grad if grad is None or (unit := self.units[name] or 1.0) == 1.0 else grad.to(params[name]) * unit
            for name, grad in grads.items()
        }

    def saved(self) -> states.Parts:
        """Return the state of each parameter, with the cohort's number; the fields are the same at any time."""
        parts = states.split(self.state, self.geometry)
        for name, part in parts.items():
            part[COHORT] = torch.tensor(self.number)
            if self.sees_ratios:
                part[UNIT] = torch.tensor(self.units.get(name, 0.0), dtype=torch.float64)
        return parts


def loaded(
    optimizer: Any, params: Mapping[str, Tensor], parts: Mapping[str, Mapping[str, Tensor]], number: int
) -> Cohort:
    """Return cohort ``number`` with the saved state of its parameters.

    Raises:
        ValueError: it does not fit; see :func:`subspace_meta.optim.states.join`.
    """
    units = {name: float(part[UNIT]) for name, part in parts.items() if UNIT in part}
    own = {name: {k: v for k, v in part.items() if k not in (COHORT, UNIT)} for name, part in parts.items()}
    geometry = optimizer.geometry
    state = states.join(own, optimizer.init(_on_manifolds(geometry, params)), geometry)
    return Cohort(optimizer, state, units, number=number, kind=_kind(state, params))


def started(optimizer: Any, params: Mapping[str, Tensor], number: int) -> Cohort:
    """Return cohort ``number``, whose parameters have their first gradient."""
    state = optimizer.init(params)
    return Cohort(optimizer, state, number=number, kind=_kind(state, params))


def _kind(state: Any, params: Mapping[str, Tensor]) -> tuple[torch.device, torch.dtype] | None:
    """Return what :meth:`Cohort.check_kind` compares."""
    like = next(iter(params.values()))
    leaves = pytree.tree_flatten(state)[0]
    return (like.device, like.dtype) if any(isinstance(x, Tensor) and x.is_floating_point() for x in leaves) else None


def _alike(one: Any, other: Any) -> bool:
    """Return whether two states are equal."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_alike, one, other))
    return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)


def _on_manifolds(geometry: Geometry, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameters, those that are off their manifolds at the nearest point: for a state's structure."""
    points = {name: params[name] for name in geometry.names}
    off = [name for name, violation in geometry.violation(points).items() if not violation <= LATER]
    return {**points, **subset(geometry, points, off).project({name: points[name] for name in off})} if off else points


def _units(geometry: Geometry, grads: Mapping[str, Any], params: Mapping[str, Tensor]) -> dict[str, float]:
    """Return for each gradient the power of two that brings its largest coordinate near 1; 1 where that is near."""
    units = {}
    for parameter in geometry.parameters:
        if parameter.name in grads:
            x, g = (parameter.view.to_matrix(tensor[parameter.name]) for tensor in (params, grads))
            # First the Euclidean gradient near 1: what follows must not leave the range either.
            unit = 1.0 / _power_of_two(float(g.abs().amax()))
            r = parameter.manifold.coordinates(x, parameter.manifold.riemannian_gradient(x, g.to(x) * unit))
            largest = float(r.abs().amax())
            low, high = COMFORTABLE
            comfortable = low <= largest / unit <= high
            # 0 stays open: there is nothing to go by.
            units[parameter.name] = 0.0 if largest == 0.0 else 1.0 if comfortable else unit / _power_of_two(largest)
    return units


def _power_of_two(x: float) -> float:
    """Return the power of two next above a positive number; 1 for others."""
    return 2.0 ** math.frexp(x)[1] if 0.0 < x < math.inf else 1.0


def subset(geometry: Geometry, params: Mapping[str, Tensor], names: Collection[str]) -> Geometry:
    """Return the geometry of some of the parameters, in the same order."""
    chosen = [p for p in geometry.parameters if p.name in names]
    rules = {glob.escape(p.name): Rule(p.manifold, p.view) for p in chosen}
    return Geometry.from_rules({p.name: params[p.name] for p in chosen}, rules)


# --- What the values of tensors say ---


def norms_of(tensors: Iterable[Tensor]) -> Tensor:
    """Return the Frobenius norms of tensors of one device and dtype: equal bits for equal values."""
    return torch.stack(torch._foreach_norm(list(tensors)))


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors that are not finite."""
    return [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether all entries are finite; a norm is, unless an entry is not or a square overflows."""
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.numel():
            alike.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return all(
        bool(torch.isfinite(norms_of(some)).all()) or all(bool(torch.isfinite(tensor).all()) for tensor in some)
        for some in alike.values()
    )


def moved_by_others(cohort: Cohort, params: Mapping[str, Tensor]) -> list[str]:
    """Return the parameters whose values are not those that the last step left."""
    if cohort.norms is None:
        return []
    now = norms_of(params.values())
    if torch.equal(now, cohort.norms):
        return []
    return [name for name, same in zip(params, (now == cohort.norms).tolist(), strict=True) if not same]


@torch.no_grad()
def keep_tangent(cohort: Cohort, params: Mapping[str, Tensor]) -> None:
    """Project the tangent buffers of a state at points that somebody else chose."""
    points = cohort.geometry.gather(params)
    groups = cohort.geometry.groups
    cohort.state = states.with_tangents(cohort.state, lambda i, m: groups[i].manifold.project(points[i], m))


@torch.no_grad()
def bring_to_manifolds(geometry: Geometry, params: Mapping[str, Tensor], project: bool, tolerance: float) -> None:
    """Move parameters that are off their manifolds by more to the nearest point, with a warning, or refuse them.

    Raises:
        ValueError: one is not finite, or off and ``project`` is false.
    """
    violations = geometry.violation(params)
    off = {name: value for name, value in violations.items() if not value <= tolerance}
    if not off:
        return
    start = {name: params[name] for name in off}
    if bad := not_finite(start):
        raise ValueError(f"the parameters {quoted(bad)} are not finite")
    if not project:
        geometry.check_feasible(params, tolerance)
    moving = subset(geometry, params, off)
    nearest = moving.project(start)
    moving.check_feasible(nearest)
    for name, value in nearest.items():
        params[name].copy_(value)
    worst = max(off, key=lambda name: off[name])
    shown = shortened(sorted(off), str)
    warnings.warn(
        f"moved to the nearest point of their manifolds: {shown} (largest violation {off[worst]:.1e}, {worst})",
        ProjectionWarning,
        stacklevel=callers_level(),
    )


def quoted(names: Iterable[str]) -> str:
    """Return quoted names, separated by commas."""
    return ", ".join(map(repr, names))
