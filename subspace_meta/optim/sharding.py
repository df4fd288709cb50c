"""Parameters of which every rank has a part: each matrix is stepped whole, by the one rank that owns it.

A DTensor of ``fully_shard`` is split along one axis over the ranks of one mesh dimension, here a *lane*; over further
mesh dimensions it is replicated, and every replica does the same. A retraction needs the whole matrix. So, in a step,

1. the parts of values and gradients travel to the owners: :func:`collect`, one exchange for a lane and a dtype;
2. each owner steps what it owns by the code of one process;
3. all hear whether that went well everywhere, :func:`agreed`: an error of one rank, or a step that it leaves out, is
   one of all ranks, and nothing has been written yet;
4. the parts of the results travel back: :func:`spread`.

State is where the owner is. For checkpoints it is spread, too, into DTensors, which is what torch's tools expect of a
sharded optimizer. The order and the sizes of exchanges follow from what all ranks know: names, shapes, owners, and
which parameters have gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.nn import Parameter

from subspace_meta.geometry import ParameterGeometry
from subspace_meta.optimizers import RSDM, RAdaGD, RAdGD, RDoG

if TYPE_CHECKING:  # imported where it is needed: most models are on one process
    from torch.distributed.device_mesh import DeviceMesh

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")

# Their steps depend on all matrices of a run, or on a matrix's place among them; an owner sees its own only.
SEE_ALL = (RDoG, RAdaGD, RAdGD, RSDM)
# A step of a d x p matrix costs d p (p + this): products of d p^2 flops, and passes over its entries. It also keeps the
# owners' shares of the entries alike, which memory depends on.
PASSES = 256


@dataclass(frozen=True)
class Lane:
    """The ranks over which tensors are split: one dimension of a mesh, seen from this rank."""

    mesh: DeviceMesh
    dim: int

    @property
    def count(self) -> int:
        """How many ranks there are."""
        return self.mesh.size(self.dim)

    @property
    def rank(self) -> int:
        """Which of them this one is."""
        return self.mesh.get_local_rank(self.dim)

    @property
    def device(self) -> torch.device:
        """Where tensors lie while they travel."""
        return torch.device(self.mesh.device_type)

    def call(self, operation: Callable[..., Any], *arguments: Any) -> None:
        """Call a collective operation.

        Raises:
            RuntimeError: another rank is gone, or does not answer in time.
        """
        try:
            operation(*arguments, group=self.mesh.get_group(self.dim))
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.rank} of {self.count} cannot go on: another one has ended or does not answer "
                f"({str(error).strip().splitlines()[0]})"
            ) from error


@dataclass(frozen=True)
class Piece:
    """A tensor that is split over a lane along one axis, as ``torch.chunk`` splits, and whole on its owner.

    Attributes:
        shape: of the whole.
        axis: along which it is split.
        owner: a rank of the lane.
        lane, dtype: in what it travels.
    """

    shape: tuple[int, ...]
    axis: int
    owner: int
    lane: Lane
    dtype: torch.dtype

    @property
    def mine(self) -> bool:
        """Whether this rank is the owner."""
        return self.owner == self.lane.rank

    def span(self, rank: int) -> tuple[int, int]:
        """Return start and end of a rank's part; the last ranks' may be empty."""
        length = self.shape[self.axis]
        step = -(-length // self.lane.count)
        return min(rank * step, length), min((rank + 1) * step, length)

    def part(self, rank: int) -> tuple[int, ...]:
        """Return the shape of a rank's part."""
        start, end = self.span(rank)
        return (*self.shape[: self.axis], end - start, *self.shape[self.axis + 1 :])


# --- Who has what ---


def local(tensor: Tensor) -> Tensor:
    """Return what this rank has of a tensor, in its own memory; a plain one is that itself."""
    part: Any = tensor
    return part.to_local() if hasattr(tensor, "placements") else tensor


def gradient(p: Tensor) -> Tensor | None:
    """Return what this rank has of a parameter's gradient, placed as the parameter is."""
    grad: Any = p.grad
    if grad is None or not hasattr(grad, "placements"):
        return grad
    placements = p.placements  # type: ignore[attr-defined]
    return local(grad if grad.placements == placements else grad.redistribute(placements=placements))


def lanes_of(parameters: Sequence[Tensor]) -> tuple[Lane, ...]:
    """Return every dimension of the meshes of DTensors: who says something along all of them tells all ranks."""
    meshes = [p.device_mesh for p in parameters if hasattr(p, "device_mesh")]
    return tuple(dict.fromkeys(Lane(mesh, dim) for mesh in meshes for dim in range(mesh.ndim)))


def split(name: str, p: Tensor) -> tuple[Lane, int] | None:
    """Return over which lane a parameter is split, and along which axis; ``None``: every rank has all of it.

    Raises:
        ValueError: it is placed in another way; the message names parameter, placements, and what would be right.
    """
    if not hasattr(p, "placements"):
        return None
    try:
        from torch.distributed.tensor import DTensor, Shard
    except ImportError:
        raise ValueError(f"parameter {name!r} is sharded: that needs torch 2.5 or newer") from None

    if not isinstance(p, DTensor):
        raise ValueError(f"parameter {name!r} is sharded, but is no DTensor: shard the model by fully_shard (FSDP2)")
    found = [(dim, place) for dim, place in enumerate(p.placements) if not place.is_replicate()]
    if not found:
        return None
    (dim, place), *more = found
    if more or type(place) is not Shard:  # subclasses are split over two dimensions of the mesh
        raise ValueError(
            f"parameter {name!r} is sharded as {tuple(p.placements)} over a mesh of {tuple(p.device_mesh.shape)}; a "
            "matrix on a manifold may be split by Shard over one mesh dimension, as fully_shard does, and is Replicate "
            "over the others: leave its layer out of tensor parallelism"
        )
    return Lane(p.device_mesh, dim), place.dim


def cost(parameter: ParameterGeometry) -> int:
    """Return what a step of a parameter costs its owner, in a unit of its own."""
    return math.prod(parameter.matrix_shape) * (parameter.matrix_shape[-1] + PASSES)


def owners(costs: Mapping[K, int], count: int, loads: Sequence[int] = ()) -> dict[K, int]:
    """Return an owner for each key: the dearest first, each to the rank that has least to do so far.

    Args:
        costs: what each key costs.
        count: of ranks.
        loads: what they have to do already.
    """
    sums = list(loads) or [0] * count
    found = {}
    for key in sorted(costs, key=lambda key: -costs[key]):  # stable: equal on all ranks
        found[key] = min(range(count), key=sums.__getitem__)
        sums[found[key]] += costs[key]
    return found


# --- Exchanges ---


def collect(pieces: Mapping[K, Piece], parts: Mapping[K, Tensor]) -> dict[K, Tensor]:
    """Bring the parts of all ranks together; return the wholes that this rank owns. All ranks have to call this.

    Raises:
        RuntimeError: another rank is gone.
    """
    whole: dict[K, Tensor] = {}
    for (lane, dtype), keys in _buckets(pieces).items():
        mine = [key for key in keys if pieces[key].mine]
        ranks = range(lane.count)
        outgoing = [[parts[key] for key in keys if pieces[key].owner == rank] for rank in ranks]
        shapes = [[pieces[key].part(rank) for key in mine] for rank in ranks]
        received = _exchanged(lane, dtype, outgoing, shapes)
        for key, *found in zip(mine, *received, strict=True):
            whole[key] = torch.cat(found, dim=pieces[key].axis).to(parts[key].device)
    return whole


def spread(pieces: Mapping[K, Piece], whole: Mapping[K, Tensor]) -> dict[K, Tensor]:
    """Invert :func:`collect`: return this rank's parts of the wholes that the owners have."""
    parts: dict[K, Tensor] = {}
    for (lane, dtype), keys in _buckets(pieces).items():
        ranks = range(lane.count)
        outgoing = [[_cut(pieces[key], whole[key], rank) for key in keys if pieces[key].mine] for rank in ranks]
        from_each = [[key for key in keys if pieces[key].owner == rank] for rank in ranks]
        shapes = [[pieces[key].part(lane.rank) for key in some] for some in from_each]
        for some, found in zip(from_each, _exchanged(lane, dtype, outgoing, shapes), strict=True):
            parts.update(zip(some, found, strict=True))
    return parts


def _buckets(pieces: Mapping[K, Piece]) -> dict[tuple[Lane, torch.dtype], list[K]]:
    """Return what travels together."""
    buckets: dict[tuple[Lane, torch.dtype], list[K]] = {}
    for key, piece in pieces.items():
        buckets.setdefault((piece.lane, piece.dtype), []).append(key)
    return buckets


def _cut(piece: Piece, whole: Tensor, rank: int) -> Tensor:
    start, end = piece.span(rank)
    return whole.narrow(piece.axis, start, end - start)


def _exchanged(
    lane: Lane, dtype: torch.dtype, outgoing: list[list[Tensor]], shapes: list[list[tuple[int, ...]]]
) -> list[list[Tensor]]:
    """Send each rank a list of tensors, and return those of the given shapes that each has sent: one collective."""
    flat = [[tensor.detach().reshape(-1).to(lane.device, dtype) for tensor in some] for some in outgoing]
    lengths = [[math.prod(shape) for shape in some] for some in shapes]
    sent, received = ([sum(some) for some in sizes] for sizes in ([[t.numel() for t in f] for f in flat], lengths))
    source = torch.cat([torch.empty(0, dtype=dtype, device=lane.device), *(t for some in flat for t in some)])
    target = torch.empty(sum(received), dtype=dtype, device=lane.device)
    lane.call(distributed.all_to_all_single, target, source, received, sent)
    found = []
    for block, some, sizes in zip(torch.split(target, received), shapes, lengths, strict=True):
        tensors = torch.split(block, sizes) if sizes else ()
        found.append([tensor.reshape(shape) for tensor, shape in zip(tensors, some, strict=True)])
    return found


# --- What all ranks know ---


def anywhere(lanes: Sequence[Lane], flags: Sequence[bool]) -> list[bool]:
    """Return for each flag whether one rank at least has it; all ranks have to call this."""
    if not flags or not lanes:
        return list(flags)
    told = torch.tensor(flags, dtype=torch.int32, device=lanes[0].device)
    for lane in lanes:
        lane.call(distributed.all_reduce, told, distributed.ReduceOp.MAX)
    return [bool(flag) for flag in told.tolist()]


def merged(lanes: Sequence[Lane], mine: Mapping[K, T]) -> dict[K, T]:
    """Return what all ranks have, small things by key; all have to call this."""
    known = dict(mine)
    for lane in lanes:
        found: list[Any] = [None] * lane.count
        lane.call(distributed.all_gather_object, found, known)
        known = {key: value for part in found for key, value in part.items()}
    return known


def mean(lanes: Sequence[Lane], value: Tensor | float) -> Tensor:
    """Return the mean over all ranks, the same bits on each; of losses of parts of a batch, for instance."""
    total = local(torch.as_tensor(value)).detach().to(lanes[0].device).clone()
    for lane in lanes:
        lane.call(distributed.all_reduce, total)
        total /= lane.count
    return total


def agreed(lanes: Sequence[Lane], attempt: Callable[[], T | None]) -> T | None:
    """Return what ``attempt`` returns on this rank; ``None`` if it is that on any rank.

    Raises:
        ValueError: it was raised on a rank, with the message of the first such rank.
        RuntimeError: another error was raised on a rank; or a rank is gone.
    """
    if not lanes:
        return attempt()
    result, error = None, None
    try:
        result = attempt()
    except Exception as caught:  # whatever it is, the others wait
        error = caught
    failed, declined = anywhere(lanes, [error is not None, result is None])
    if failed:
        kind = "" if isinstance(error, ValueError) else type(error).__name__
        told = merged(lanes, {} if error is None else {distributed.get_rank(): (kind, str(error))})
        rank, (kind, text) = min(told.items())
        raise (RuntimeError(f"{kind} on rank {rank}: {text}") if kind else ValueError(text)) from error
    return None if declined else result


# --- State, as torch's tools see it ---

Layouts = dict[str, dict[str, tuple[tuple[int, ...], torch.dtype]]]  # by parameter and field: shape and dtype


def layouts_of(parts: Mapping[str, Mapping[str, Tensor]]) -> Layouts:
    """Return shapes and dtypes of the state of parameters."""
    return {name: {key: (tuple(t.shape), t.dtype) for key, t in part.items()} for name, part in parts.items()}


def absent(layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, Tensor]:
    """Return a state that another rank has: tensors without memory, on the device ``meta``."""
    return {key: torch.empty(shape, dtype=dtype, device="meta") for key, (shape, dtype) in layout.items()}


def as_dtensors(
    pieces: Mapping[str, Piece], layouts: Layouts, parts: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, dict[str, Tensor]]:
    """Return the state of all parameters on all ranks: DTensors split along the first axis, and plain scalars.

    Args:
        pieces: the parameters.
        layouts: of their states.
        parts: the states that this rank has.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    kinds = {(name, key): kind for name in pieces for key, kind in layouts[name].items()}
    # A scalar travels as one copy for each rank.
    travelling = {
        (name, key): Piece(shape or (pieces[name].lane.count,), 0, pieces[name].owner, pieces[name].lane, dtype)
        for (name, key), (shape, dtype) in kinds.items()
    }
    whole = {
        (name, key): parts[name][key] if shape else parts[name][key].expand(pieces[name].lane.count)
        for (name, key), (shape, _) in kinds.items()
        if pieces[name].mine
    }
    found: dict[str, dict[str, Tensor]] = {name: {} for name in pieces}
    split_up = spread(travelling, whole)
    for (name, key), (shape, _) in kinds.items():  # the order of all ranks: torch gathers DTensors one after another
        part, lane = split_up[name, key], pieces[name].lane
        if shape:
            placements = [Shard(0) if dim == lane.dim else Replicate() for dim in range(lane.mesh.ndim)]
            stride = torch.empty(shape, device="meta").stride()
            found[name][key] = DTensor.from_local(
                part.clone(), lane.mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
            )
        else:
            found[name][key] = part.reshape(()).clone()
    return found


def whole(tensor: Tensor) -> Tensor:
    """Return all of a DTensor; all ranks of its mesh have to call this. A plain tensor is returned as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def pieces_of(
    geometry: Sequence[ParameterGeometry], members: Mapping[str, Parameter], others: Sequence[tuple[Piece, int]]
) -> dict[str, Piece]:
    """Return those of the parameters that are split, each with its owner.

    Args:
        geometry: the parameters.
        members: their tensors.
        others: what is owned already, and its cost.

    Raises:
        ValueError: see :func:`split`.
    """
    splits = {p.name: found for p in geometry if (found := split(p.name, members[p.name])) is not None}
    pieces: dict[str, Piece] = {}
    for lane in dict.fromkeys(lane for lane, _ in splits.values()):
        loads = [sum(c for piece, c in others if (piece.lane, piece.owner) == (lane, r)) for r in range(lane.count)]
        costs = {p.name: cost(p) for p in geometry if p.name in splits and splits[p.name][0] == lane}
        for name, owner in owners(costs, lane.count, loads).items():
            p = members[name]
            pieces[name] = Piece(tuple(p.shape), splits[name][1], owner, lane, p.dtype)
    # In the order of the parameters, not of their costs.
    return {p.name: pieces[p.name] for p in geometry if p.name in pieces}
