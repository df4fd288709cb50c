"""The pieces of a step: what is to be done, the step itself, a look at its results, and writing them.

:func:`plan`, :func:`advanced`, :func:`finite` and :func:`commit`, in this order. What a step computes is written by
the last one; before it, only weights that somebody else moved are brought back, and states started.
``torch.compile(optimizer.step)`` compiles :func:`advanced`; the others are plain Python about names and values.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils import _pytree as pytree

from subspace_meta.optim import cohorts, sharding, states
from subspace_meta.optim.cohorts import Cohort
from subspace_meta.optim.contents import Contents, Own, Settings
from subspace_meta.optim.options import check_rate_kind, refuse_unknown


class Held(NamedTuple):
    """What this rank steps of a group: whole parameters, without derivatives, and gradients."""

    params: dict[str, Tensor]
    grads: dict[str, Tensor | None]
    # Those whose gradients move their cohort, on whichever rank it is; None: every gradient is here to be looked at.
    moving: Collection[str] | None = None


class Work(NamedTuple):
    """What is to be done in one step for a cohort: its parameters, without derivatives, and their gradients."""

    cohort: Cohort
    params: dict[str, Tensor]
    grads: dict[str, Tensor | None]


class Result(NamedTuple):
    """What a step gives, not yet written into the parameters."""

    work: Work
    moved: dict[str, Tensor]
    state: Any


def held_here(members: Mapping[str, Parameter]) -> Held:
    """Return what every rank has whole."""
    grads = {name: sharding.gradient(p) for name, p in members.items()}
    return Held({name: sharding.local(p.detach()) for name, p in members.items()}, grads)


# --- What is to be done ---


def plan(contents: Contents, loss: Tensor | None, held: Sequence[Held] = ()) -> list[Work] | None:
    """Look at options, gradients and parameters, and return what is to be done; ``None``: the step is skipped.

    Args:
        contents: the optimizer; the state of parameters that have their first gradient is started.
        loss: what a guarded optimizer watches.
        held: what this rank steps of each group, where parameters are split over ranks.

    Raises:
        ValueError: see the ``step`` of the shell.
    """
    settings = contents.settings
    if settings.check and (fault := _fault_of_gradients(contents, held)):
        _refuse(fault, settings)
        return None
    for group in contents.other_groups:
        assert contents.others is not None
        refuse_unknown(group, contents.others.defaults, type(contents.others).__name__, group["param_names"])
    work = []
    for number, own in enumerate(contents.own):
        refuse_unknown(own.options, contents.defaults, settings.make.name, own.group.geometry.names)
        check_rate_kind(own.options["lr"])
        here = held[number] if held else held_here(own.members)
        _start_cohorts(own, here, settings, contents.defaults)
        work += [one for cohort in own.group.cohorts if (one := _work(cohort, own, here, settings)) is not None]
    if guarded(work):
        if loss is None:
            raise ValueError("guarded=True watches the loss: give it, step(closure) or step(loss=loss)")
        if torch.as_tensor(loss).numel() != 1:
            raise ValueError(f"guarded=True watches one loss, got a tensor of shape {tuple(loss.shape)}")
    return work


def _start_cohorts(own: Own, held: Held, settings: Settings, keys: Iterable[str]) -> None:
    """Start the state of parameters that have their first gradient."""
    group = own.group
    fresh: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for name, p in own.members.items():
        if name not in group.numbers and p.grad is not None:
            fresh.setdefault((p.device, p.dtype), []).append(name)
    for names in fresh.values():
        number = 1 + max(group.numbers.values(), default=-1)
        # What all ranks step has to stay equal on them, bit for bit: it is not batched with what only one owns.
        for of_owner in (False, True):
            here = [name for name in names if (name in group.pieces) == of_owner and name in held.params]
            if not here:
                continue
            params = {name: held.params[name] for name in here}
            geometry = cohorts.subset(group.geometry, params, params)
            if settings.check:
                cohorts.bring_to_manifolds(geometry, params, settings.project, cohorts.LATER)
            like = next(iter(params.values()))
            optimizer = settings.make(geometry, like=like, **{key: own.options[key] for key in keys})
            group.cohorts.append(cohorts.started(optimizer, params, number))
        group.numbers.update(dict.fromkeys(names, number))


def _work(cohort: Cohort, own: Own, here: Held, settings: Settings) -> Work | None:
    """Return what is to be done for a cohort; ``None``: it stays as it is."""
    params = {name: here.params[name] for name in cohort.geometry.names}
    grads = {name: here.grads[name] for name in params}
    if here.moving is not None:
        stays = cohort.number not in {own.group.numbers[name] for name in here.moving}
    else:
        stays = all(grad is None for grad in grads.values()) or _nothing_to_do(own.options["lr"], grads)
    if stays:
        return None
    cohort.check_kind(params)
    cohort.take_options(own.options, params)
    if settings.check and (elsewhere := cohorts.moved_by_others(cohort, params)):
        some = cohorts.subset(cohort.geometry, params, elsewhere)
        points = {name: params[name] for name in elsewhere}
        cohorts.bring_to_manifolds(some, points, settings.project, cohort.tolerance)
        cohorts.keep_tangent(cohort, params)
    return Work(cohort, params, cohort.scaled(grads, params))


def _nothing_to_do(lr: Any, grads: Mapping[str, Tensor | None]) -> bool:
    """Return whether a step has rate and gradients zero, by which torch's checkpoints make an optimizer's state."""
    return float(lr) == 0.0 and all(grad is None or not bool(grad.any()) for grad in grads.values())


def _fault_of_gradients(contents: Contents, held: Sequence[Held]) -> str | None:
    """Return what is not finite, gradients or parameters; ``None``: all gradients are."""
    gradients = {name: p.grad for name, p in contents.members.items() if p.grad is not None}
    for name, gradient in gradients.items():
        if gradient.is_sparse:
            raise ValueError(f"the gradient of {name!r} is sparse; a parameter on a manifold needs a dense one")
    for group in contents.other_groups:
        pairs = zip(group["param_names"], group["params"], strict=True)
        gradients.update({name: p.grad for name, p in pairs if p.grad is not None and not p.grad.is_sparse})
    if contents.lanes:  # parts, and what is whole here
        gradients = {name: sharding.local(gradient) for name, gradient in gradients.items()}
        gradients.update({n: grad for one in held for n, grad in one.grads.items() if grad is not None})
    if cohorts.all_finite(gradients.values()):
        return None
    members = {name: sharding.local(p.detach()) for name, p in contents.members.items()}
    if spoiled := cohorts.not_finite(members):
        return f"the parameters {cohorts.quoted(spoiled)} are not finite, nor are gradients"
    return f"the gradients of {cohorts.quoted(cohorts.not_finite(gradients))} are not finite"


def _refuse(fault: str, settings: Settings) -> None:
    """Raise ``ValueError`` for a step that is not finite, unless those are left out."""
    if not settings.skip:
        raise ValueError(f"{fault}; nothing was changed. non_finite='skip' leaves such steps out")


# --- The step, and what comes of it ---


def advanced(work: Work, loss: Tensor | None) -> Result:
    """Return one step of a functional optimizer; where a parameter has no gradient its state sees a zero one."""
    cohort, params, grads = work
    filled = {name: torch.zeros_like(params[name]) if grad is None else grad for name, grad in grads.items()}
    value = None if loss is None else torch.as_tensor(loss).detach()
    return Result(work, *cohort.optimizer.update(filled, cohort.state, params, value))


def finite(results: Iterable[Result], settings: Settings) -> bool:
    """Return whether all results are, so that the step is taken; it is an error, unless those are skipped."""
    for work, moved, state in results if settings.check else ():
        leaves = [leaf for leaf in pytree.tree_flatten(state)[0] if isinstance(leaf, Tensor)]
        if cohorts.all_finite((*moved.values(), *leaves)):
            continue
        parts = states.split(state, work.cohort.geometry)
        bad = [name for name in moved if cohorts.not_finite({**parts[name], "": moved[name]})]
        largest = max(float(grad.abs().max()) for name in bad if (grad := work.grads[name]) is not None)
        _refuse(
            f"the step of {cohorts.quoted(bad)} would not be finite (largest entry of a gradient {largest:.1e}; "
            f"squares overflow from {torch.finfo(moved[bad[0]].dtype).max ** 0.5:.0e})",
            settings,
        )
        return False
    return True


def guarded(work: Iterable[Work]) -> bool:
    """Return whether an optimizer of this step watches the loss."""
    return any(getattr(one.cohort.optimizer, "guarded", False) for one in work)


def withheld(watched: bool, loss: Tensor | None) -> bool:
    """Return whether the guard, if it watches the loss, does not take this step: the other parameters stay, too."""
    return watched and not bool(torch.isfinite(torch.as_tensor(loss)).all())


def commit(results: Iterable[Result], settings: Settings) -> None:
    """Write results into parameters and states."""
    for work, moved, state in results:
        work.cohort.state = state
        for name, tensor in moved.items():
            if work.grads[name] is not None:
                work.params[name].copy_(tensor)
        work.cohort.norms = cohorts.norms_of(work.params.values()) if settings.check else None
