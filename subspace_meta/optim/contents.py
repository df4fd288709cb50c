"""What an optimizer consists of: the pieces that construction makes, that steps change, and that checkpoints keep.

The shell holds them; the functions of ``construction``, ``stepping``, ``ranks`` and ``saving`` get them as arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from subspace_meta.geometry import Geometry, Rule
from subspace_meta.manifolds import Manifold
from subspace_meta.optim import sharding
from subspace_meta.optim.cohorts import Cohort
from subspace_meta.optimizers.base import Optimizer

Rules = Mapping[str, Manifold | Rule]
Others = Callable[..., torch.optim.Optimizer]  # (list of parameters) -> torch optimizer


class Maker(Protocol):
    """Makes the functional optimizer of parameters from their geometry, one of their tensors, and options."""

    @property
    def name(self) -> str:
        """What errors call the optimizer."""

    @property
    def rate_is_a_factor(self) -> bool:
        """Whether ``lr`` is a factor of the steps, which then is one of the other optimizer's rate, too."""

    def __call__(self, geometry: Geometry, like: Tensor, **options: Any) -> Optimizer:
        """Make it."""


@dataclass(frozen=True)
class Settings:
    """What is chosen at construction for all groups.

    Attributes:
        make: makes the functional optimizers.
        make_others: makes the optimizer of what is on no manifold; None: there is none.
        rules: glob pattern of names -> manifold or rule.
        project: whether weights that are off their manifolds are moved there.
        check: whether gradients, results and weights are looked at.
        skip: whether steps that are not finite are left out, instead of an error.
    """

    make: Maker
    make_others: Others | None
    rules: Rules
    project: bool
    check: bool
    skip: bool


@dataclass
class Group:
    """What is kept for a parameter group whose parameters are stepped here."""

    geometry: Geometry
    cohorts: list[Cohort] = field(default_factory=list)  # of what this rank steps
    numbers: dict[str, int] = field(default_factory=dict)  # of the cohorts of all parameters that had gradients
    pieces: dict[str, sharding.Piece] = field(default_factory=dict)  # the parameters that are split over ranks
    layouts: sharding.Layouts = field(default_factory=dict)  # of the states of these

    @property
    def owned(self) -> list[tuple[sharding.Piece, int]]:
        """Which parameters have owners, and what each costs."""
        known = [p for p in self.geometry.parameters if p.name in self.pieces]
        return [(self.pieces[p.name], sharding.cost(p)) for p in known]

    def saved(self) -> dict[str, dict[str, Tensor]]:
        """Return the state, as far as this rank has it, of each parameter."""
        return {name: part for cohort in self.cohorts for name, part in cohort.saved().items()}


class Own(NamedTuple):
    """A group that is stepped here, beside what torch keeps for it."""

    group: Group
    options: dict[str, Any]  # the dict in param_groups
    members: dict[str, Parameter]


@dataclass(frozen=True)
class Contents:
    """An optimizer's pieces as they are now: groups and dicts are the optimizer's own, not copies.

    Attributes:
        settings: what was chosen at construction.
        defaults: the options of the groups that are stepped here, with their values at construction.
        own: these groups.
        others: the optimizer of the other parameters.
        other_groups: its dicts in ``param_groups``, which come after the own ones.
        lanes: of all ranks that have parts of parameters; none: every parameter is whole here.
    """

    settings: Settings
    defaults: Mapping[str, Any]
    own: tuple[Own, ...]
    others: torch.optim.Optimizer | None
    other_groups: list[dict[str, Any]]
    lanes: tuple[sharding.Lane, ...]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """All groups, as torch knows them."""
        return [*(own.options for own in self.own), *self.other_groups]

    @property
    def members(self) -> dict[str, Parameter]:
        """The parameters that are stepped here, by name."""
        return {name: p for own in self.own for name, p in own.members.items()}
