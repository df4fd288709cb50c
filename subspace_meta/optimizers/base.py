"""The contract of an optimizer, and the two steps that all of them share.

An optimizer is a frozen value object: settings and a :class:`~subspace_meta.geometry.Geometry`. Its state is a pytree
of tensors. ``update`` is pure: it changes none of its inputs, raises nothing about values, and works under
``torch.func.grad``, ``vmap`` and ``torch.compile(fullgraph=True)``; non-finite numbers propagate through it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from subspace_meta._tracing import has_values, is_compiling
from subspace_meta.geometry import Geometry, Params, check_named
from subspace_meta.manifolds import Manifold, Orthogonal, Rotations, Stiefel, StiefelCanonical

# Manifolds whose points are all the matrices (or one component of them) with orthonormal columns.
ORTHONORMAL: tuple[type[Manifold], ...] = (Stiefel, StiefelCanonical, Orthogonal, Rotations)


class Optimizer(Protocol):
    """What every optimizer offers, hand-made or learned."""

    @property
    def geometry(self) -> Geometry:
        """The geometry of the parameters."""
        ...

    def init(self, params: Mapping[str, Tensor]) -> Any:
        """Return the state at the start: a named tuple, so laid out that it can be cut into parameters.

        A field is a tuple of one tensor a group, whose first dimension runs over the members if there are several; or
        a tensor without dimensions, which belongs to all; or one whose last dimension runs over the coordinates (rows
        of all matrices, then columns) or over the matrices; or a named tuple of such fields. A tangent at the current
        point is called ``momentum``.

        Raises:
            ValueError: names, shapes or dtypes do not fit the geometry, or the start is not on its manifolds.
        """
        ...

    def update(
        self, grads: Mapping[str, Tensor], state: Any, params: Mapping[str, Tensor], value: Tensor | None = None
    ) -> tuple[Params, Any]:
        """Take one step.

        Args:
            grads: Euclidean gradients, as ``torch.func.grad`` returns them.
            state: the state that ``init`` or the last ``update`` returned.
            params: the parameters at which the gradients were taken.
            value: the loss there; optional, for safeguards.

        Returns:
            The new parameters and the new state.
        """
        ...


def check_rate(lr: float | Tensor) -> None:
    """Raise ``ValueError`` unless a learning rate given as a number is finite and not negative."""
    if not isinstance(lr, Tensor) and not 0.0 <= lr < math.inf:
        raise ValueError(f"the learning rate must be finite and not negative, got {lr}")


def check_decay(name: str, decay: float) -> None:
    """Raise ``ValueError`` unless ``decay``, the setting called ``name``, is in [0, 1)."""
    if not 0.0 <= decay < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {decay}")


def check_manifolds(geometry: Geometry, method: str, allowed: tuple[type[Manifold], ...] = ORTHONORMAL) -> None:
    """Raise ``ValueError`` naming the first parameter that lives where ``method`` is not defined."""
    for parameter in geometry.parameters:
        if not isinstance(parameter.manifold, allowed):
            raise ValueError(
                f"{method} is defined on {', '.join(kind.__name__ for kind in allowed)}; parameter "
                f"{parameter.name!r} is on {parameter.manifold.name}: give it to another optimizer"
            )


def check_weight_shapes(
    weights: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], owner: str, settings: str = ""
) -> None:
    """Raise ``ValueError`` unless ``weights`` are the meta-parameters ``expected`` by ``owner``."""
    if weights.keys() != expected.keys():
        raise ValueError(
            f"the weights are not those of {owner}: missing {sorted(expected.keys() - weights.keys())}, "
            f"unknown {sorted(weights.keys() - expected.keys())}"
        )
    for name, shape in expected.items():
        given = tuple(weights[name].shape)
        if given != shape:
            raise ValueError(f"weight {name!r} has shape {given}; {owner}{settings} needs {shape}")


def check_weight_dtype(weights: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> None:
    """Raise ``ValueError`` naming the first parameter whose dtype is not that of the weights."""
    dtype = next(iter(weights.values())).dtype
    for name, value in params.items():
        if value.dtype != dtype:
            raise ValueError(
                f"parameter {name!r} has dtype {value.dtype}, the weights have {dtype}; bring them to one, for "
                "instance {name: value.to(dtype) for name, value in weights.items()}"
            )


def check_order(grads: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> None:
    """Raise ``TypeError`` unless both are dicts: for methods that look at the state before them."""
    check_named(grads, "gradient")
    check_named(params)


def check_start(geometry: Geometry, params: Mapping[str, Tensor]) -> None:
    """Raise ``ValueError`` unless ``params`` fits the geometry and lies on its manifolds.

    Values are looked at only outside of ``vmap`` and tracing, where they exist.
    """
    geometry.check_points(params)
    if has_values(*params.values()):
        geometry.check_feasible(params)


def gather_gradients(
    geometry: Geometry, params: Mapping[str, Tensor], grads: Mapping[str, Tensor]
) -> tuple[list[Tensor], Iterator[Tensor]]:
    """Return, per group, the points and the Riemannian gradients there, in the points' dtype.

    The gradients are made one at a time, when they are asked for: an optimizer that finishes one group before the next
    holds one Riemannian gradient, not all of them, and finds it in the cache.

    Raises:
        ValueError: names or shapes of ``grads`` do not fit the geometry.
    """
    points = geometry.gather(params)
    gathered = gather_euclidean(geometry, grads)
    gradients = (
        group.manifold.riemannian_gradient(x, g) for group, x, g in zip(geometry.groups, points, gathered, strict=True)
    )
    return points, gradients


def gather_euclidean(geometry: Geometry, grads: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the Euclidean gradients per group, in their own dtype.

    Each one is looked at by itself only where the whole does not fit: a look at each of several hundred small
    parameters would be a tenth of their step.

    Raises:
        ValueError: names or shapes of ``grads`` do not fit the geometry.
    """
    if is_compiling():
        geometry.check(grads, "gradient")
        return geometry.gather(grads)
    try:
        gathered = geometry.gather(grads)
    except Exception:  # each of torch's and einops' errors means that something does not fit
        geometry.check(grads, "gradient")
        raise
    fits = all(
        g.shape == group.shape and g.is_floating_point() for group, g in zip(geometry.groups, gathered, strict=True)
    )
    if not fits or len(grads) != len(geometry.parameters):
        geometry.check(grads, "gradient")
    return gathered


def retract_all(geometry: Geometry, points: Sequence[Tensor], tangents: Iterable[Tensor]) -> list[Tensor]:
    """Retract every group's tangent."""
    return [g.manifold.retract(x, v) for g, x, v in zip(geometry.groups, points, tangents, strict=True)]
