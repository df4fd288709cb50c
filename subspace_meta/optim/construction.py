"""Construction: settings and parameter groups, found right before anything is changed."""

from __future__ import annotations

import dataclasses
import glob
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from subspace_meta.geometry import Geometry, Rule, matches
from subspace_meta.manifolds import Euclidean, Sphere
from subspace_meta.optim import cohorts, sharding
from subspace_meta.optim.contents import Contents, Group, Maker, Others, Rules, Settings
from subspace_meta.optim.messages import callers_level, shortened
from subspace_meta.optim.names import named, named_groups, plain
from subspace_meta.optim.options import HINTS, changed, check_rate_kind, options, refuse_unknown
from subspace_meta.optimizers.base import Optimizer

Make = Callable[..., Optimizer]  # (geometry, lr=...) -> functional optimizer


# --- Settings ---


@dataclass(frozen=True)
class HandMade:
    """Makes a hand-made optimizer with the constructor's settings, and then with the options of a group."""

    make: Make
    settings: dict[str, Any]
    rate_is_a_factor = False

    @property
    def name(self) -> str:
        """What errors call it."""
        return getattr(self.make, "__name__", "this optimizer")

    def __call__(self, geometry: Geometry, like: Tensor, **given: Any) -> Optimizer:
        """Make it."""
        optimizer: Any = self.make(geometry, **self.settings)
        if "lr" not in options(optimizer):
            raise ValueError(
                f"{type(optimizer).__name__} has no option 'lr': the rate of a parameter group would change nothing "
                "(for averages of iterates there is torch.optim.swa_utils.AveragedModel)"
            )
        made: Optimizer = dataclasses.replace(optimizer, **changed(optimizer, {**options(optimizer), **given}))
        return made


def hand_made(optimizer: Make, lr: float | Tensor | None, settings: dict[str, Any]) -> HandMade:
    """Return what makes a hand-made optimizer, with its learning rate in the settings.

    Raises:
        ValueError: it is none, a setting is unknown, or it has no learning rate of its own and is given none.
    """
    of_torch = inspect.isclass(optimizer) and issubclass(optimizer, torch.optim.Optimizer)
    if of_torch or not callable(optimizer):
        what = optimizer.__name__ if inspect.isclass(optimizer) else f"{optimizer!r:.60}"
        raise ValueError(f"optimizer must be a class of this library, sm.RAdam for instance, got {what}")
    if isinstance(optimizer, type) and dataclasses.is_dataclass(optimizer):
        own = [field.name for field in dataclasses.fields(optimizer) if field.name != "geometry"]
        refuse_unknown(settings, own, optimizer.__name__)
        usual = options(optimizer).get("lr", dataclasses.MISSING)
        lr = usual if lr is None and usual is not dataclasses.MISSING else lr
    if lr is None:
        raise ValueError(f"{getattr(optimizer, '__name__', optimizer)} has no learning rate of its own: give lr")
    return HandMade(optimizer, {"lr": lr, **settings})


def settings_of(
    make: Maker, rules: Rules | None, others: Others | None, project: bool, check_gradients: bool, non_finite: str
) -> Settings:
    """Return the constructor's arguments.

    Raises:
        ValueError: one is of the wrong kind.
    """
    if others is not None and not callable(others):
        raise ValueError(f"others must make a torch optimizer from a list of parameters, or be None, got {others!r}")
    if rules is not None and not isinstance(rules, Mapping):
        raise ValueError(f"rules must be a dict, glob pattern of names -> manifold, got {rules!r}")
    if wrong := [key for key in rules or {} if not isinstance(key, str)]:
        raise ValueError(f"rules go by names, not {wrong[0]!r}; sm.rules_for(model, ...) makes them from types")
    if non_finite not in ("raise", "skip"):
        raise ValueError(f"non_finite must be 'raise' or 'skip', got {non_finite!r}")
    plainly = {plain(pattern, wrapped=False): rule for pattern, rule in (rules or {}).items()}
    return Settings(make, others, plainly, project, check_gradients, non_finite == "skip")


def groups_of(params: Module | Iterable[Any], settings: Settings) -> list[dict[str, Any]]:
    """Return what the constructor is given as parameter groups, with pairs of names and parameters.

    Raises:
        ValueError: names are missing or twice there, a rule matches nothing, or no parameter is on a manifold.
    """
    groups = named_groups(params)
    everything = {name: p for group in groups for name, p in group["params"]}
    if sum(len(group["params"]) for group in groups) != len(everything):
        raise ValueError("a parameter's name is in two groups")
    geometry = Geometry.from_rules(everything, settings.rules)
    if settings.make_others is not None and all(isinstance(p.manifold, Euclidean) for p in geometry.parameters):
        raise ValueError("no parameter is on a manifold: give rules, or others=None if this optimizer takes all")
    return groups


# --- A parameter group ---


@dataclass(frozen=True)
class Addition:
    """A parameter group that was found right, not added yet.

    Attributes:
        group: of those parameters that are stepped here; None: of these there are none.
        members: these parameters by name.
        options: all options of the group.
        defaults: the optimizer's, which are complete with the first such group.
        rest: the parameters for the other optimizer.
        rest_options: those that are given for them.
        lanes: of all parameters, these with them.
    """

    group: Group | None
    members: dict[str, Parameter]
    options: dict[str, Any]
    defaults: dict[str, Any]
    rest: dict[str, Parameter]
    rest_options: dict[str, Any]
    lanes: tuple[sharding.Lane, ...]


def addition(contents: Contents, param_group: Mapping[str, Any]) -> Addition:
    """Return what a parameter group adds to an optimizer; nothing is changed.

    Raises:
        ValueError: see the constructor of the shell; also if a name is already there.
    """
    settings = contents.settings
    given = dict(param_group)
    members = dict(pairs := named(given.pop("params")))
    if not members:
        raise ValueError("a parameter group has no parameters")
    taken = {name for own in contents.own for name in own.group.geometry.names}
    if twice := sorted(taken & members.keys()):
        raise ValueError(f"parameters {twice} are already in a group")
    if len({id(p) for _, p in pairs}) < len(pairs):
        raise ValueError("one parameter is there under two names; model.named_parameters() gives each once")
    rules = {pattern: r for pattern, r in settings.rules.items() if any(matches(pattern, name) for name in members)}
    geometry = Geometry.from_rules(members, rules)
    _warn_of_vectors(geometry, rules)
    curved = [p.name for p in geometry.parameters if not isinstance(p.manifold, Euclidean)]
    names = list(geometry.names) if settings.make_others is None else curved
    here = {name: members[name] for name in names}
    rest = {name: p for name, p in members.items() if name not in names}
    known = _known_by_others(contents, list(rest.values())) if rest else {}
    group, defaults, own_options = None, dict(contents.defaults), dict[str, Any]()
    if here:
        geometry = cohorts.subset(geometry, members, names)
        geometry.check_points(here)
        owned = [pair for own in contents.own for pair in own.group.owned]
        group = Group(geometry, pieces=sharding.pieces_of(geometry.parameters, members, owned))
        like = sharding.local(here[names[0]])
        defaults, own_options = _options_of(contents, group, like, given, bool(known))
    else:
        what = getattr(settings.make_others, "__name__", "the other optimizer")
        refuse_unknown(given, known, what, list(rest))
    for key in given.keys() - own_options.keys():
        refuse_unknown([key], known, settings.make.name, list(members))
    everything = [p for one in contents.param_groups for p in one["params"]]
    lanes = sharding.lanes_of([*everything, *members.values()])
    rest_options = {key: value for key, value in given.items() if key in known}
    return Addition(group, here, own_options, defaults, rest, rest_options, lanes)


def _options_of(
    contents: Contents, group: Group, like: Tensor, given: dict[str, Any], rest: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the optimizer's defaults and all options of a group; it is made once, so that it can refuse their values.

    Args:
        contents: the optimizer.
        group: what is added.
        like: one of its tensors.
        given: the options that it has of its own.
        rest: whether some of them may be the other optimizer's.
    """
    make, geometry, defaults = contents.settings.make, group.geometry, contents.defaults
    check_rate_kind(defaults["lr"])
    # Also where the other optimizer knows them: half of a group would not be what is asked for.
    refuse_unknown([key for key in HINTS if given.get(key)], defaults, make.name, geometry.names)
    probe = make(geometry, like=like, **defaults)
    if group.pieces and isinstance(probe, sharding.SEE_ALL):
        raise ValueError(
            f"the steps of {type(probe).__name__} depend on all matrices of a run, and a rank owns some: keep "
            "the layers on manifolds out of sharding (replicated, as under DistributedDataParallel)"
        )
    defaults = {**defaults, **options(probe)}
    check_rate_kind(given.get("lr", defaults["lr"]))
    own = {key: value for key, value in given.items() if key in defaults}
    make(geometry, like=like, **{**defaults, **own})
    if not rest:
        refuse_unknown(given, defaults, make.name, geometry.names)
    return defaults, {**defaults, **own}


def _known_by_others(contents: Contents, parameters: list[Parameter]) -> dict[str, Any]:
    """Return the options of the other optimizer."""
    make = contents.settings.make_others
    assert make is not None
    others = contents.others or make(parameters)
    return dict(others.defaults)


def _warn_of_vectors(geometry: Geometry, rules: Rules) -> None:
    """Warn of patterns that make parameters of one dimension, biases for instance, columns; names are no patterns."""
    found: dict[str, list[str]] = {}
    for p in geometry.parameters:
        if len(p.shape) > 1 or isinstance(p.manifold, Sphere) or not p.manifold.vectors:
            continue
        pattern = next(pattern for pattern in rules if matches(pattern, p.name))
        rule = rules[pattern]
        if pattern not in (p.name, glob.escape(p.name)) and not (isinstance(rule, Rule) and rule.view):
            found.setdefault(pattern, []).append(p.name)
    for pattern, names in found.items():
        manifold = next(p.manifold for p in geometry.parameters if p.name == names[0])
        warnings.warn(
            f"rule {pattern!r} matches vectors, too: {shortened(names)}; each is then a matrix of one column on "
            f"{manifold.name}, of unit length. A pattern like '*.weight' leaves them free; if they are meant, give "
            "their names, or Sphere()",
            UserWarning,
            stacklevel=callers_level(),
        )


def start_feasible(new: Addition, project: bool) -> None:
    """Bring the parameters that will move to their manifolds, or refuse them.

    Raises:
        ValueError: one is off its manifold and ``project`` is false, or not finite.
    """
    assert new.group is not None
    geometry = new.group.geometry
    start = {name: sharding.local(p.detach()) for name, p in new.members.items() if p.requires_grad}
    pieces = {name: piece for name, piece in new.group.pieces.items() if name in start}
    wholes = sharding.collect(pieces, start)
    everywhere = {name: p for name, p in start.items() if name not in pieces}

    def mend() -> bool:
        # What all ranks have has to stay equal on them, bit for bit: it is not batched with what only one owns.
        for mine in (everywhere, wholes):
            if mine:
                some = cohorts.subset(geometry, mine, mine)
                cohorts.bring_to_manifolds(some, mine, project, cohorts.FEASIBLE)
        return True

    sharding.agreed(new.lanes, mend)
    for name, part in sharding.spread(pieces, wholes).items():
        start[name].copy_(part)


def others_with(new: Addition, settings: Settings, others: torch.optim.Optimizer | None) -> torch.optim.Optimizer:
    """Return the optimizer of the other parameters, which is made for the first of them, with those of a new group."""
    assert settings.make_others is not None
    rest, given = list(new.rest.values()), dict(new.rest_options)
    if others is None:
        others = settings.make_others(rest)
    else:
        others.add_param_group({"params": rest, "param_names": list(new.rest)})
    group = others.param_groups[-1]
    if "lr" in given and settings.make.rate_is_a_factor:
        given["lr"] = given["lr"] * group["lr"]
    group.update(given, param_names=list(new.rest))
    return others
