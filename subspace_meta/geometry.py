"""Which parameter lives on which manifold, and as which matrix it is seen.

A :class:`Geometry` is a frozen, hashable description made once from names and shapes. It also decides which small
parameters of equal shape and manifold are stacked, so that an optimizer's step costs one batched operation for all of
them (256 separate 16 x 16 matrices cost what one stack costs); optimizers work on these *groups* and never see names.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.parameter import is_lazy

from subspace_meta.manifolds import Euclidean, Manifold, Sphere

Params = dict[str, Tensor]

# On CPU, stacking equal shapes pays 4-45 times below this many entries per matrix and nothing above: the copies into
# and out of the stack cost as much as the saved calls.
GROUPING_LIMIT = 32_768

TRANSPOSED = "rows"  # what the columns of a transposed matrix are


@dataclass(frozen=True)
class MatrixView:
    """How a parameter is seen as a matrix ``(..., d, p)``: an einops pattern and its inverse.

    ``pattern`` is ``"parameter axes -> matrix axes"``; ``sizes`` gives the axes that einops cannot infer. An empty
    pattern is the identity. ``vectors`` says what the columns of the matrix are, for people.
    """

    pattern: str = ""
    sizes: tuple[tuple[str, int], ...] = ()
    vectors: str = "columns"

    @classmethod
    def heads(cls, n_heads: int) -> MatrixView:
        """See a projection weight ``(n_heads * head_dim, model)`` as ``n_heads`` tall blocks ``(model, head_dim)``."""
        return cls("(h k) m -> h m k", (("h", n_heads),))

    def to_matrix(self, tensor: Tensor) -> Tensor:
        """See a parameter as a matrix."""
        return rearrange(tensor, self.pattern, **dict(self.sizes)) if self.pattern else tensor

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """Invert :meth:`to_matrix`."""
        if not self.pattern:
            return matrix
        left, right = self.pattern.split("->")
        return rearrange(matrix, f"{right} -> {left}", **dict(self.sizes))

    def stacked(self) -> MatrixView:
        """Return the view of a parameter with one more leading dimension."""
        if not self.pattern:
            return self
        left, right = self.pattern.split("->")
        return MatrixView(f"stacked0 {left}-> stacked0 {right}", self.sizes, self.vectors)


def matches(pattern: str, name: str) -> bool:
    """Return whether a rule's glob pattern matches a name; a name matches itself, brackets and all."""
    return name == pattern or fnmatch.fnmatchcase(name, pattern)


def check_named(tensors: object, what: str = "parameter") -> None:
    """Raise ``TypeError`` unless tensors are a dict: a state is near at hand in ``update(grads, state, params)``."""
    if not isinstance(tensors, Mapping):
        raise TypeError(
            f"{what}s are a dict, name -> tensor, got {type(tensors).__name__}; update takes (grads, state, params)"
        )


def default_view(shape: Sequence[int], manifold: Manifold) -> MatrixView:
    """Choose the matrix view of a parameter by its number of dimensions.

    0 and 1: one column. 2: the matrix itself. 3: a batch of matrices. 4 and 5: a convolution, ``out x (in * kernel)``.
    On a constrained manifold a wide matrix is transposed, so that it is tall. What the axes of a layer's weight mean
    is known to :func:`subspace_meta.rules_for`.
    """
    if len(shape) == 0:
        return MatrixView("-> 1 1")
    if len(shape) == 1:
        return MatrixView("d -> d 1")
    constrained = not isinstance(manifold, Euclidean)
    if len(shape) <= 3:
        wide = constrained and shape[-2] < shape[-1]
        leading = "b " * (len(shape) - 2)
        return MatrixView(f"{leading}p d -> {leading}d p", vectors=TRANSPOSED) if wide else MatrixView()
    if len(shape) > 5:
        raise ValueError(f"no matrix view is known for {len(shape)} dimensions; give Rule(..., view=MatrixView(...))")
    kernel = [f"k{axis}" for axis in range(len(shape) - 2)]
    sizes = (("i", shape[1]), *zip(kernel, shape[2:], strict=True))
    fan_in = f"(i {' '.join(kernel)})"
    left = f"o i {' '.join(kernel)}"
    if constrained and shape[0] < math.prod(shape[1:]):
        return MatrixView(f"{left} -> {fan_in} o", sizes, "filters")
    return MatrixView(f"{left} -> o {fan_in}", sizes, "taps")


@dataclass(frozen=True)
class Rule:
    """A manifold together with a view, where the view that the shape suggests is not the right one.

    Raises:
        ValueError: one is something else; sides in words are for :func:`~subspace_meta.rules_for`.
    """

    manifold: Manifold
    view: MatrixView | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.manifold, Manifold) or not isinstance(self.view, MatrixView | None):
            raise ValueError(
                f"a rule has a manifold and a MatrixView or None, got Rule({self.manifold!r}, {self.view!r})"
                + ("; sides in words are for rules_for(model, layers)" if isinstance(self.view, str) else "")
            )


@dataclass(frozen=True)
class ParameterGeometry:
    """One parameter: its name, shape, manifold, view, and the shape of its matrix."""

    name: str
    shape: tuple[int, ...]
    manifold: Manifold
    view: MatrixView
    matrix_shape: tuple[int, ...]

    @property
    def words(self) -> str:
        """What the matrix is made of: "8 orthonormal filters of 75"; empty where columns are nothing special."""
        *batch, d, p = self.matrix_shape
        times = f"{math.prod(batch)} times " if math.prod(batch) > 1 else ""
        kind = self.manifold.vectors
        if isinstance(self.manifold, Sphere):
            # A batch of points that are one vector each; a point that is a matrix has no vectors of its own.
            return f"{math.prod(batch)} unit {self.view.vectors} of {d}" if p == 1 else f"{times}{d} x {p} of unit norm"
        return f"{times}{p} {kind} {self.view.vectors} of {d}" if kind else ""


@dataclass(frozen=True)
class Group:
    """Parameters that one batched operation handles: equal manifold and matrix shape."""

    manifold: Manifold
    members: tuple[ParameterGeometry, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the group's tensor: ``(n, *matrix_shape)`` for n > 1 members, the matrix shape for one."""
        matrix_shape = self.members[0].matrix_shape
        return (len(self.members), *matrix_shape) if len(self.members) > 1 else matrix_shape


@dataclass(frozen=True)
class Geometry:
    """The geometry of a dict of parameters. Make it with :meth:`from_rules`."""

    parameters: tuple[ParameterGeometry, ...]
    groups: tuple[Group, ...]

    @classmethod
    def from_rules(cls, params: Mapping[str, Tensor], rules: Mapping[str, Manifold | Rule] | None = None) -> Geometry:
        """Assign a manifold to every parameter.

        Args:
            params: named parameters; only names and shapes are used.
            rules: glob pattern of names -> manifold (or :class:`Rule`). The first match counts, a name matches itself;
                without a match the parameter is Euclidean.

        Raises:
            ValueError: there are no parameters, a pattern matches none of them, or a shape cannot carry its manifold.
        """
        if not params:
            raise ValueError("there are no parameters; give a dict of named tensors, dict(model.named_parameters())")
        rules = dict(rules or {})
        for pattern, rule in rules.items():
            if not isinstance(rule, Manifold | Rule):
                raise ValueError(f"rule {pattern!r} is {rule!r}, which is no manifold; write for instance Stiefel()")
            if not any(matches(pattern, name) for name in params):
                hint = "; [...] in a pattern is a set of characters, glob.escape(name) is a name" * ("[" in pattern)
                raise ValueError(
                    f"rule {pattern!r} matches no parameter; the names are {', '.join(params) or 'none'}{hint}"
                )
        parameters = []
        for name, tensor in params.items():
            chosen = next((rule for pattern, rule in rules.items() if matches(pattern, name)), Euclidean())
            rule = chosen if isinstance(chosen, Rule) else Rule(chosen)
            if is_lazy(tensor):
                raise ValueError(f"parameter {name!r} of a lazy module has no shape yet: call the model once first")
            shape = tuple(tensor.shape)
            if 0 in shape:
                raise ValueError(f"parameter {name!r} of shape {shape} has no entries; leave it out")
            where = f"parameter {name!r} of shape {shape}"
            try:
                view = rule.view or default_view(shape, rule.manifold)
                matrix_shape = tuple(view.to_matrix(torch.empty(shape, device="meta")).shape)
            except Exception as error:  # einops raises its own class; the user needs the parameter's name with it
                raise ValueError(f"{where} on {rule.manifold.name}: {error}") from error
            try:
                rule.manifold.check_shape(matrix_shape)
            except ValueError as error:
                seen = f", seen as {' x '.join(map(str, matrix_shape))}," if matrix_shape != shape else ""
                raise ValueError(
                    f"{where}{seen} on {rule.manifold.name}: {error}; give it another manifold, leave it out, or see "
                    "it otherwise, Rule(manifold, MatrixView(...))"
                ) from error
            parameters.append(ParameterGeometry(name, shape, rule.manifold, view, matrix_shape))
        return cls(tuple(parameters), _group(parameters))

    def stacked(self, count: int) -> Geometry:
        """Return the geometry of ``count`` sets of these parameters, stacked along a new leading dimension.

        The groups stay as they are, each with one more batch dimension: optimizers then take the steps of all sets at
        once. Sums over matrices stay within one set only where an optimizer keeps one value for each matrix, as all do
        but those that choose one step for a whole run (``RDoG``, ``RAdaGD``, ``RAdGD``): they need ``vmap``.
        """
        stacked = {
            p.name: ParameterGeometry(p.name, (count, *p.shape), p.manifold, p.view.stacked(), (count, *p.matrix_shape))
            for p in self.parameters
        }
        groups = (Group(group.manifold, tuple(stacked[m.name] for m in group.members)) for group in self.groups)
        return Geometry(tuple(stacked.values()), tuple(groups))

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters' names, in order."""
        return tuple(parameter.name for parameter in self.parameters)

    def check(self, params: Mapping[str, Tensor], what: str = "parameter") -> None:
        """Raise ``ValueError`` unless ``params`` has exactly the names and shapes of this geometry, and real dtypes."""
        check_named(params, what)
        for parameter in self.parameters:
            tensor = params.get(parameter.name)
            if tensor is None or len(params) != len(self.parameters):
                missing = [name for name in self.names if name not in params]
                unknown = [name for name in params if name not in self.names]
                raise ValueError(
                    f"{what} names do not fit the geometry: missing {missing}, unknown {unknown}; "
                    f"expected {list(self.names)}"
                )
            if tensor.shape != parameter.shape:
                raise ValueError(
                    f"{what} {parameter.name!r} has shape {tuple(tensor.shape)}, the geometry says {parameter.shape}"
                )
            if not tensor.is_floating_point():
                raise ValueError(f"{what} {parameter.name!r} has dtype {tensor.dtype}; use a real one")

    def check_points(self, params: Mapping[str, Tensor]) -> None:
        """Raise ``ValueError`` unless ``params`` fits this geometry in float32 or float64.

        Shorter types hold no point of a manifold: in bfloat16 X^T X is the identity to 1e-2 only. Gradients may be
        short; points keep a float32 master.
        """
        self.check(params)
        for parameter in self.parameters:
            dtype = params[parameter.name].dtype
            if dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"parameter {parameter.name!r} has dtype {dtype}, too short for a point of a manifold; keep a "
                    "float32 master and give gradients in the short type"
                )

    def check_feasible(self, params: Mapping[str, Tensor], tolerance: float = 1e-3) -> None:
        """Raise ``ValueError`` naming the first parameter that is off its manifold, or not finite."""
        for name, violation in self.violation(params).items():
            if not violation <= tolerance:
                parameter = next(p for p in self.parameters if p.name == name)
                seen = ""
                if parameter.view.vectors == TRANSPOSED:
                    d, p = parameter.matrix_shape[-2:]
                    seen = f". It is seen transposed, as {d} x {p}, because it is wide: its rows are the vectors"
                    if _can_be(parameter.manifold, parameter.shape):
                        seen += ". If the columns are meant, the rule is Rule(manifold, MatrixView())"
                raise ValueError(
                    f"parameter {name!r} is not on {parameter.manifold.name}: constraint violation {violation:.2e} is "
                    f"above {tolerance:.0e}; start from geometry.project(params) or geometry.initialize(...){seen}"
                )

    def check_gradients(self, grads: Mapping[str, Tensor]) -> None:
        """Raise ``ValueError`` naming the first gradient that is missing, of another shape, not finite, or too large.

        ``update`` raises nothing about values, and a non-finite gradient spoils parameters and state for good; a loop
        that may meet one calls this first, or skips the step. It reads the values, so on a device it waits.
        """
        self.check(grads, "gradient")
        for name, grad in grads.items():
            if not torch.isfinite(grad).all():
                count = int((~torch.isfinite(grad)).sum())
                raise ValueError(
                    f"gradient of {name!r} has {count} non-finite entries of {grad.numel()}; skip this step"
                )
            if not torch.isfinite(torch.linalg.vector_norm(grad)):
                raise ValueError(
                    f"gradient of {name!r} has entries up to {float(grad.abs().max()):.0e}, whose squares overflow "
                    f"{grad.dtype}; skip this step, or scale the loss down"
                )

    def gather(self, params: Mapping[str, Tensor]) -> list[Tensor]:
        """Return one tensor ``(..., d, p)`` per group."""
        check_named(params)
        gathered = []
        for group in self.groups:
            matrices = [member.view.to_matrix(params[member.name]) for member in group.members]
            gathered.append(torch.stack(matrices) if len(matrices) > 1 else matrices[0])
        return gathered

    def scatter(self, tensors: Sequence[Tensor]) -> Params:
        """Invert :meth:`gather`."""
        params: Params = {}
        for group, tensor in zip(self.groups, tensors, strict=True):
            matrices = [tensor] if len(group.members) == 1 else tensor.unbind(0)
            for member, matrix in zip(group.members, matrices, strict=True):
                params[member.name] = member.view.from_matrix(matrix)
        if len(self.groups) == 1:
            return params
        return {parameter.name: params[parameter.name] for parameter in self.parameters}

    def project(self, params: Mapping[str, Tensor]) -> Params:
        """Return the nearest point of each manifold, detached: a start, not a step to be differentiated."""
        self.check_points(params)
        params = {name: tensor.detach() for name, tensor in params.items()}
        tensors = [group.manifold.nearest(x) for group, x in zip(self.groups, self.gather(params), strict=True)]
        return self.scatter(tensors)

    def initialize(
        self,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Params:
        """Draw a random feasible start. Euclidean parameters are normal with variance 1/p, the fan-in."""
        tensors = []
        for group in self.groups:
            x = group.manifold.random_point(group.shape, generator, dtype, device)
            tensors.append(x / group.shape[-1] ** 0.5 if isinstance(group.manifold, Euclidean) else x)
        return self.scatter(tensors)

    def violation(self, params: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the largest constraint error of each parameter, computed in float64."""
        return {
            parameter.name: float(
                parameter.manifold.violation(parameter.view.to_matrix(params[parameter.name].detach().double())).max()
            )
            for parameter in self.parameters
        }

    def summary(self) -> str:
        """Return a table: parameter, shape, manifold, matrix, dimension, and what the matrix is made of, in words."""
        header = ("parameter", "shape", "manifold", "matrix", "dimension", "that is")
        rows = [
            (
                p.name,
                " x ".join(map(str, p.shape)) or "scalar",
                p.manifold.name,
                " x ".join(map(str, p.matrix_shape)),
                f"{p.manifold.dimension(p.matrix_shape):,}",
                p.words,
            )
            for p in self.parameters
        ]
        total = sum(p.manifold.dimension(p.matrix_shape) for p in self.parameters)
        rows.append((f"{len(self.parameters)} parameters in {len(self.groups)} groups", "", "", "", f"{total:,}", ""))
        widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows)
        ]
        return "\n".join(line.rstrip() for line in lines)


def _can_be(manifold: Manifold, shape: tuple[int, ...]) -> bool:
    """Say whether points can have a shape."""
    try:
        manifold.check_shape(shape)
    except ValueError:
        return False
    return True


def _group(parameters: Sequence[ParameterGeometry]) -> tuple[Group, ...]:
    """Stack small parameters of equal manifold and matrix shape; leave large ones alone. Order of first appearance."""
    buckets: dict[object, list[ParameterGeometry]] = {}
    for parameter in parameters:
        small = math.prod(parameter.matrix_shape) < GROUPING_LIMIT
        key = (parameter.manifold, parameter.matrix_shape) if small else parameter.name
        buckets.setdefault(key, []).append(parameter)
    return tuple(Group(members[0].manifold, tuple(members)) for members in buckets.values())
