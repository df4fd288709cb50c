"""The learned Riemannian optimizer: one small network adapts the rows and the columns of every Riemannian gradient.

Source: Yu, Wu, Gao, Fan, Jia, "Large-Scale Riemannian Meta-Optimization via Subspace Adaptation", arXiv 2501.15235.
One update: R = grad f(X); an adapter turns R into a scaled direction D; X+ = Retr_X(P_X(D)). The adapters are in
``subspace_meta.adapter``; this file joins them with the geometry.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from subspace_kernels import Layout
from torch import Tensor

from subspace_meta._tracing import has_values, is_compiling
from subspace_meta.adapter.base import BaseAdapter
from subspace_meta.adapter.network import Weights
from subspace_meta.adapter.paper import PaperAdapter
from subspace_meta.geometry import Geometry, Params
from subspace_meta.manifolds import SPD, Manifold, Product
from subspace_meta.optimizers import guard
from subspace_meta.optimizers.base import (
    check_order,
    check_rate,
    check_start,
    check_weight_dtype,
    check_weight_shapes,
    gather_gradients,
    retract_all,
)

Adapter = BaseAdapter | PaperAdapter

# Looked up by name instead of being a default argument: torch.compile can trace a global, not a default object.
PRESETS: dict[str, Adapter] = {
    "base": BaseAdapter(),
    "light": BaseAdapter(momentum_decay=0.0, spectral=False),
    "paper": PaperAdapter(),
}


def check_weights_kind(weights: Any) -> None:
    """Raise ``ValueError`` unless ``weights`` is a dict: a path, and what a file gives, are near at hand."""
    if not isinstance(weights, Mapping):
        got = f"{weights!r:.60}" if isinstance(weights, str | os.PathLike) else f"a {type(weights).__name__}"
        raise ValueError(
            f"weights is a dict of tensors, got {got}; of a file: weights, preset = sm.load_weights(path), give both"
        )


def check_weights(adapter: Adapter, weights: Mapping[str, Tensor]) -> None:
    """Raise ``ValueError`` unless ``weights`` are meta-parameters of this adapter, by names and shapes."""
    check_weights_kind(weights)
    settings = f" with hidden size {adapter.hidden}"
    check_weight_shapes(weights, adapter.weight_shapes(), f"preset {adapter.name!r}", settings)


def check_steps(steps: int | Tensor | None) -> None:
    """Raise ``ValueError`` unless the number of steps is ``None``, a positive integer, or a scalar tensor."""
    whole = isinstance(steps, int) and not isinstance(steps, bool) and steps > 0
    if steps is not None and not whole and not (isinstance(steps, Tensor) and steps.ndim == 0):
        raise ValueError(f"steps must be a positive integer, a scalar tensor or None, got {steps!r}")


class GuardedState(NamedTuple):
    """The state of a guarded optimizer: the adapter's and the guard's."""

    adapter: Any
    guard: guard.GuardState


@dataclass(frozen=True, eq=False)
class SubspaceOptimizer:
    """A learned optimizer with the common contract.

    Attributes:
        geometry: where the parameters live.
        weights: the meta-parameters, a dict of tensors; ``torch.func.grad`` with respect to them works when the
            optimizer is made inside the differentiated function.
        preset: what the weights belong to: ``"base"``, ``"paper"``, or an adapter with settings of its own.
        guarded: watch the loss that ``update`` is given: where it rises beyond the noise, learned steps give way to
            plain gradient steps; a step whose gradient or loss is not finite is not taken. See
            :mod:`subspace_meta.optimizers.guard`. Costs a few passes over the gradients.
        lr: multiplies the learned step, for schedules; a float or a scalar tensor. 1 is what was learned.
        steps: how many steps the whole run will have, an integer or a scalar tensor: the optimizer then plans its steps
            for the loss at the end. May be changed on the way, for a run that is made longer or shorter. After the last
            of them it goes on as in that one. ``None``: as the state says, which knows nothing at the start.
        averaging: what is to be used are averages of the iterates, :meth:`averaged`, not the iterates. The optimizer
            weights them by what it sees of the noise; the steps are the same. Costs a copy of the parameters and one
            more retraction a step.

    Raises:
        ValueError: the preset is unknown, the weights are not its meta-parameters, the rate or the number of steps is
            out of its range, or the preset has no use for that number or makes no averages.
    """

    geometry: Geometry
    weights: Weights
    preset: str | Adapter = "base"
    guarded: bool = False
    lr: float | Tensor = 1.0
    steps: int | Tensor | None = None
    averaging: bool = False

    def __post_init__(self) -> None:
        if not is_compiling():
            check_rate(self.lr)
            check_steps(self.steps)
            if isinstance(self.preset, str) and self.preset not in PRESETS:
                raise ValueError(f"preset {self.preset!r} is unknown; there are {', '.join(PRESETS)}")
            check_weights(self.adapter, self.weights)
            if self.steps is not None and not isinstance(self.adapter, BaseAdapter):
                raise ValueError(f"preset {self.adapter.name!r} plans for no number of steps; leave steps away")
            if self.averaging and not isinstance(self.adapter, BaseAdapter):
                raise ValueError(f"preset {self.adapter.name!r} makes no averages; sm.Averaging(optimizer) does")

    @property
    def adapter(self) -> Adapter:
        """The adapter of the preset."""
        return PRESETS[self.preset] if isinstance(self.preset, str) else self.preset

    @property
    def layout(self) -> Layout:
        """How the coordinates of all parameters are packed."""
        return Layout(tuple(group.shape for group in self.geometry.groups))

    def init(self, params: Mapping[str, Tensor]) -> Any:
        """Return the adapter's state at the start."""
        check_start(self.geometry, params)
        check_weight_dtype(self.weights, params)
        points = self.geometry.gather(params)
        if isinstance(self.adapter, BaseAdapter):
            state: Any = self.adapter.init(self.layout, points, self.averaging)
        else:
            state = self.adapter.init(self.layout, points)
        return GuardedState(state, guard.initial(next(iter(params.values())))) if self.guarded else state

    def averaged(self, state: Any) -> Params:
        """Return the average of the iterates as parameters, which are on their manifolds.

        Raises:
            ValueError: the state has none: it was made without ``averaging``.
        """
        average = getattr(state.adapter if isinstance(state, GuardedState) else state, "average", ())
        if not average:
            raise ValueError("there is no average in this state: make the optimizer with averaging=True, and init")
        return self.geometry.scatter(average)

    def update(
        self, grads: Mapping[str, Tensor], state: Any, params: Mapping[str, Tensor], value: Tensor | None = None
    ) -> tuple[Params, Any]:
        """Take one step; see :meth:`subspace_meta.optimizers.base.Optimizer.update`.

        Raises:
            ValueError: names or shapes do not fit the geometry; or the optimizer is guarded, and ``value`` is missing.
        """
        moved, state = self._step(grads, state, params, value, in_place=False)
        return self.geometry.scatter(moved), state

    @torch.no_grad()
    def update_(
        self, grads: Mapping[str, Tensor], state: Any, params: Mapping[str, Tensor], value: Tensor | None = None
    ) -> Any:
        """Take the same step in an eager loop, written over ``params``; return the new state.

        The old state is of no use afterwards: its buffers are the new one's where kernels run. Gradients are left as
        they are. Nothing is differentiated through it.

        Raises:
            ValueError: as of :meth:`update`; or a parameter has no memory of its own to be written (under a transform
                or in a trace).
        """
        check_order(grads, params)
        if not has_values(*params.values(), *grads.values()):
            raise ValueError("update_ writes into the parameters; under a transform or in a trace use update")
        moved, state = self._step(grads, state, params, value, in_place=True)
        for name, tensor in self.geometry.scatter(moved).items():
            params[name].copy_(tensor)
        return state

    def _step(
        self,
        grads: Mapping[str, Tensor],
        state: Any,
        params: Mapping[str, Tensor],
        value: Tensor | None,
        in_place: bool,
    ) -> tuple[list[Tensor], Any]:
        check_order(grads, params)
        watched = None
        if self.guarded:
            if value is None:
                raise ValueError("guarded=True watches the loss: give it, update(grads, state, params, value=loss)")
            finite = guard.finite_runs(value, grads)
            grads = guard.without_spoiled(grads, finite)
            watched, state = guard.watch(state.guard, value, finite), state.adapter
        if self.steps is not None and isinstance(self.adapter, BaseAdapter):
            state = self.adapter.with_budget(state, self.steps)
        groups = self.geometry.groups
        points, gradients = gather_gradients(self.geometry, params, grads)
        seen_gradients = [g.manifold.coordinates(x, r) for g, x, r in zip(groups, points, gradients, strict=True)]
        buffers = self.adapter.buffers(state)
        if buffers:
            seen = [g.manifold.coordinates(x, m) for g, x, m in zip(groups, points, buffers, strict=True)]
            state = self.adapter.with_buffers(state, seen)
        out = None
        if in_place and watched is None:  # the guard needs the gradients afterwards
            out = _own_buffers(seen_gradients, (*grads.values(), *params.values()))
        directions, factors, state = self.adapter(self.weights, state, self.layout, seen_gradients, in_place, out)
        if isinstance(self.lr, Tensor) or self.lr != 1.0:
            factors = [self.lr * factor for factor in factors]
        if watched is not None:
            dims = [len(group.members[0].matrix_shape) - watched.trust.ndim for group in groups]
            directions = [
                guard.blend(watched, r, u, factor, n)
                for r, u, factor, n in zip(seen_gradients, directions, factors, dims, strict=True)
            ]
            factors = [1.0] * len(directions)
        # Projection and coordinates are linear: the factor comes last, where the tangent is in the cache.
        tangents = [
            factor * g.manifold.project(x, g.manifold.from_coordinates(x, u))
            for g, x, u, factor in zip(groups, points, directions, factors, strict=True)
        ]
        moved = retract_all(self.geometry, points, tangents)
        if watched is not None:  # a step of length 0 is no step but for rounding
            moved = [guard.taken(watched, x, y, n) for x, y, n in zip(points, moved, dims, strict=True)]
        buffers = self.adapter.buffers(state)
        if buffers:
            carried = [
                g.manifold.transport(x, y, g.manifold.from_coordinates(x, m))
                for g, x, y, m in zip(groups, points, moved, buffers, strict=True)
            ]
            state = self.adapter.with_buffers(state, carried)
        if isinstance(self.adapter, BaseAdapter) and state.average:
            state = state._replace(average=self._averages(self.adapter.kept_share(state), state.average, moved))
        return moved, state if watched is None else GuardedState(state, watched)

    def _averages(self, kept: Tensor, averages: Sequence[Tensor], moved: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the averages that have taken in the new iterates; ``kept`` of the old ones stays, ``(B,)``."""
        shares = [share[..., None, None] for share in self.layout.per_group(kept)]
        groups = zip(self.geometry.groups, moved, averages, shares, strict=True)
        # From the iterate, not from the average: then a long step is no matter where there is no noise.
        return tuple(retract_all(self.geometry, moved, [s * _toward(g.manifold, x, old) for g, x, old, s in groups]))


def _toward(manifold: Manifold, x: Tensor, y: Tensor) -> Tensor:
    """Return a tangent at ``x`` that leads near ``y`` and not beyond."""
    if isinstance(manifold, SPD):  # there a retraction along the difference goes too far, each time again
        return manifold.log(x, y)
    if isinstance(manifold, Product):
        blocks = (torch.split(tensor, list(manifold.sizes), dim=manifold.axis) for tensor in (x, y))
        return torch.cat([_toward(*each) for each in zip(manifold.factors, *blocks, strict=True)], dim=manifold.axis)
    return manifold.project(x, y - x)


def _own_buffers(tensors: Sequence[Tensor], others: Iterable[Tensor]) -> list[Tensor]:
    """Return the tensors themselves where they may be written over, new ones where they share memory with others."""
    foreign = {tensor.untyped_storage().data_ptr() for tensor in others}
    return [torch.empty_like(t) if t.untyped_storage().data_ptr() in foreign else t for t in tensors]
