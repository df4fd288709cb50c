"""An optimizer's state in torch's layout, and back: for every parameter a dict of tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils import _pytree as pytree

from subspace_meta.optim import cohorts, ranks, sharding
from subspace_meta.optim.contents import Contents, Group, Own
from subspace_meta.optim.messages import shortened
from subspace_meta.optim.names import plain
from subspace_meta.optim.options import PARAMETERS, refuse_unknown


def copies(tree: Any) -> Any:
    """Return dicts and lists with copies of their tensors."""
    return pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, tree)


# --- Out ---


def state_of(contents: Contents) -> dict[Parameter, dict[str, Tensor]]:
    """Return the state of the parameters that are stepped here: views; of what another rank owns without memory."""
    found: dict[Parameter, dict[str, Tensor]] = {}
    for group, _, members in contents.own:
        parts = {
            name: {**sharding.absent(layout), cohorts.COHORT: torch.tensor(group.numbers[name])}
            for name, layout in group.layouts.items()
        }
        parts.update(group.saved())
        found.update({p: parts[name] for name, p in members.items() if name in parts})  # the order of all ranks
    return found


def as_dtensors(contents: Contents) -> dict[str, dict[str, Tensor]]:
    """Return the state of the parameters that are split over ranks, on all ranks; all have to call this."""
    found: dict[str, dict[str, Tensor]] = {}
    for group in (own.group for own in contents.own if own.group.layouts):
        pieces = {name: group.pieces[name] for name in group.pieces if name in group.layouts}
        found.update(sharding.as_dtensors(pieces, group.layouts, group.saved()))
    return found


# --- In ---


def check_groups(contents: Contents, groups: list[dict[str, Any]]) -> None:
    """Raise ``ValueError`` unless saved groups are those of this optimizer: names, and options of the own ones."""

    def names(groups: list[dict[str, Any]]) -> list[list[str]]:
        return [[plain(name) for name in group.get("param_names", group["params"])] for group in groups]

    if any("param_names" not in group for group in groups):
        raise ValueError("this is no state_dict of an optimizer of subspace_meta.optim: its groups have no param_names")
    given, wanted = names(groups), names(contents.param_groups)
    if given != wanted:
        raise ValueError(f"the state is of other parameters: {_difference(given, wanted)}")
    for saved, own in zip(groups, contents.own, strict=False):
        lacking = [key for key in contents.defaults if key not in saved]
        strange = [key for key in saved if key not in own.options and key not in PARAMETERS]
        try:
            refuse_unknown(strange, contents.defaults, contents.settings.make.name, saved["param_names"])
        except ValueError as error:
            raise ValueError(f"the state is of another optimizer: {error}") from None
        if lacking:
            raise ValueError(f"the state is of another optimizer: its groups have no option {lacking[0]!r}")


def _difference(given: list[list[str]], wanted: list[list[str]]) -> str:
    """Return in words how the names in saved groups differ from those of this optimizer."""
    saved, here = ([name for group in groups for name in group] for groups in (given, wanted))
    said = [
        f"{what} {shortened(some)}"
        for what, some in (
            ("it lacks", [name for name in here if name not in set(saved)]),
            ("this optimizer does not have", [name for name in saved if name not in set(here)]),
        )
        if some
    ]
    if said:
        return ", and ".join(said)
    if saved == here:
        sizes = [[len(group) for group in groups] for groups in (given, wanted)]
        return f"its groups are of {sizes[0]} parameters, here they are of {sizes[1]}"
    one, other = next(pair for pair in zip(saved, here, strict=True) if pair[0] != pair[1])
    return f"they stand in another order, {one!r} where {other!r} is here"


def groups_from(contents: Contents, state: Mapping[Any, Any], groups: list[dict[str, Any]]) -> list[Group]:
    """Return the groups that are stepped here with the cohorts that a saved state makes; all ranks have to call this.

    Args:
        contents: the optimizer, which is not changed.
        state: by parameter; those that are missing have their first gradient before them.
        groups: the saved options of these groups.

    Raises:
        ValueError: the state is of another optimizer, or does not fit.
    """
    wholes = ranks.wholes(contents)
    parts: dict[str, dict[str, Any]] = {}
    for name, p in contents.members.items():
        if (part := state.get(p)) is not None:
            parts[name] = {key: sharding.whole(part[key]) for key in sorted(part)}  # the order of all ranks

    def found() -> list[Group]:
        pairs = zip(contents.own, groups, strict=True)
        return [_group_from(contents, own, options, parts, wholes) for own, options in pairs]

    return sharding.agreed(contents.lanes, found) or []


def _group_from(
    contents: Contents,
    own: Own,
    options: Mapping[str, Any],
    parts: Mapping[str, dict[str, Any]],
    wholes: Mapping[str, Tensor],
) -> Group:
    group = own.group
    together: dict[tuple[int, bool], dict[str, Any]] = {}
    numbers, layouts = {}, {}
    for name in group.geometry.names:
        if (part := parts.get(name)) is None:
            continue
        if cohorts.COHORT not in part:
            raise ValueError(f"the state of {name!r} is of another optimizer: it has {sorted(part)}")
        numbers[name] = int(part[cohorts.COHORT])
        if name in group.pieces:
            layouts.update(sharding.layouts_of({name: part}))
        if name in wholes:
            together.setdefault((numbers[name], name in group.pieces), {})[name] = part
    made = []
    for (number, _), some in sorted(together.items()):
        params = {name: wholes[name] for name in some}
        geometry = cohorts.subset(group.geometry, params, params)
        like = next(iter(params.values()))
        optimizer = contents.settings.make(geometry, like=like, **{key: options[key] for key in contents.defaults})
        made.append(cohorts.loaded(optimizer, params, some, number))
    return dataclasses.replace(group, cohorts=made, numbers=numbers, layouts=layouts)


def check_others(others: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> None:
    """Raise ``ValueError`` unless saved groups have the options of the other optimizer."""
    for saved, group in zip(groups, others.param_groups, strict=True):
        if lacking := [key for key in group if key not in saved and key in others.defaults]:
            kind = type(others).__name__
            raise ValueError(f"the other parameters' state is not of {kind}: it has no option {lacking[0]!r}")
