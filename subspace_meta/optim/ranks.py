"""A step where parameters are split over ranks: to the owners, there as on one process, and back.

All ranks have to call these functions; ``sharding`` has the exchanges and says who owns what.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from subspace_meta.optim import cohorts, sharding, stepping
from subspace_meta.optim.contents import Contents
from subspace_meta.optim.options import check_rate_kind
from subspace_meta.optim.stepping import Held, Result


def step(contents: Contents, loss: Tensor | None) -> bool:
    """Take a step on all ranks, or on none; return whether it was, all of it, and not skipped.

    Raises:
        ValueError: see the ``step`` of the shell; on one rank at least.
        RuntimeError: another error on a rank, or a rank is gone.
    """
    loss = None if loss is None else sharding.mean(contents.lanes, loss)
    held, pieces, uneven = _held_by_owners(contents)
    before = [(list(own.group.cohorts), dict(own.group.numbers)) for own in contents.own]
    results, skipped, done = None, True, False

    def attempt() -> list[Result] | None:
        if uneven:
            raise ValueError(f"{cohorts.quoted(uneven)} have gradients on some ranks only")
        work = stepping.plan(contents, loss, held)
        found = None if work is None else [stepping.advanced(one, loss) for one in work]
        return found if found is not None and stepping.finite(found, contents.settings) else None

    try:
        results = sharding.agreed(contents.lanes, attempt)
        # Also where this rank owns nothing.
        watched = any(own.options.get("guarded") for own in contents.own) and loss is not None
        skipped = results is None or stepping.withheld(watched, loss)
        if (others := contents.others) is not None and not skipped:
            sharding.agreed(contents.lanes, lambda: (others.step(), True))
        done = results is not None
    finally:
        if not done:  # what was started on some ranks was not on all
            for own, (started, numbers) in zip(contents.own, before, strict=True):
                own.group.cohorts, own.group.numbers = started, numbers
    if results is not None:
        stepping.commit(results, contents.settings)
        members = contents.members
        for name, part in sharding.spread(pieces, {n: p for one in held for n, p in one.params.items()}).items():
            sharding.local(members[name].detach()).copy_(part)
        _tell_layouts(contents)
    return not skipped


def wholes(contents: Contents) -> dict[str, Tensor]:
    """Return the parameters that this rank steps, as they are."""
    pieces = {name: piece for own in contents.own for name, piece in own.group.pieces.items()}
    here = {name: sharding.local(p.detach()) for name, p in contents.members.items()}
    found = sharding.collect(pieces, {name: here[name] for name in pieces})
    return {name: found.get(name, p) for name, p in here.items() if name not in pieces or name in found}


@torch.no_grad()
def averages(contents: Contents) -> dict[str, Tensor]:
    """Return the averages that the optimizers of the parameters hand out, as far as these are on this rank."""
    found: dict[str, Tensor] = {}
    pieces: dict[str, sharding.Piece] = {}
    for group in (own.group for own in contents.own if own.options["averaging"]):
        for cohort in group.cohorts:
            found.update(cohort.optimizer.averaged(cohort.state))
        pieces.update({name: piece for name, piece in group.pieces.items() if name in group.numbers})
    return {**{name: whole for name, whole in found.items() if name not in pieces}, **sharding.spread(pieces, found)}


def _held_by_owners(contents: Contents) -> tuple[list[Held], dict[str, sharding.Piece], list[str]]:
    """Bring parameters and gradients to their owners.

    Returns:
        What this rank steps; the parameters that travelled; and those with a gradient on some ranks only.
    """
    travelling: dict[str, sharding.Piece] = {}
    pieces: dict[tuple[str, str], sharding.Piece] = {}
    parts: dict[tuple[str, str], Tensor] = {}
    for group, _, members in contents.own:
        for name, piece in group.pieces.items():
            p = members[name]
            if not (p.requires_grad or p.grad is not None or name in group.numbers):
                continue
            travelling[name] = piece
            part, grad = sharding.local(p.detach()), sharding.gradient(p)
            there = dataclasses.replace(piece, shape=(piece.lane.count,), axis=0)
            pieces.update({(name, "value"): piece, (name, "gradient"): piece, (name, "there"): there})
            parts[name, "value"] = part
            parts[name, "gradient"] = torch.zeros_like(part) if grad is None else grad
            parts[name, "there"] = part.new_full((1,), float(grad is not None))
    found = sharding.collect(pieces, parts)
    held, uneven = [], []
    for group, options, members in contents.own:
        here = stepping.held_here({name: p for name, p in members.items() if name not in group.pieces})
        for name in group.pieces:
            if (name, "value") in found:
                everywhere = bool(found[name, "there"].all())
                uneven += [name] if everywhere != bool(found[name, "there"].any()) else []
                here.params[name] = found[name, "value"]
                here.grads[name] = found[name, "gradient"] if everywhere else None
        check_rate_kind(options["lr"])
        grads = {name: sharding.local(p.grad) for name, p in members.items() if p.grad is not None}
        if float(options["lr"]) == 0.0:  # then gradients of zero move nothing, by which torch makes states
            moves = sharding.anywhere(contents.lanes, [bool(grad.any()) for grad in grads.values()])
            grads = {name: grads[name] for name, moving in zip(grads, moves, strict=True) if moving}
        held.append(here._replace(moving=grads.keys()))
    return held, travelling, uneven


def _tell_layouts(contents: Contents) -> None:
    """Let all ranks know what the state of parameters that were started consists of."""
    groups = [own.group for own in contents.own]
    fresh = {name for group in groups for name in group.numbers.keys() & group.pieces.keys() - group.layouts.keys()}
    if fresh:
        parts = {name: part for group in groups for name, part in group.saved().items()}
        mine = sharding.layouts_of({name: part for name, part in parts.items() if name in fresh})
        told = sharding.merged(contents.lanes, mine)
        for group in groups:
            group.layouts.update({name: told[name] for name in group.pieces if name in fresh})
