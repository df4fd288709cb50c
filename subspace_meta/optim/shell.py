"""The optimizer itself: construction, step, saving and loading."""

from __future__ import annotations

import dataclasses
import inspect
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.utils import _pytree as pytree

from subspace_meta.geometry import Geometry, Rule, matches
from subspace_meta.manifolds import Euclidean, Manifold
from subspace_meta.optim import cohorts, sharding, states
from subspace_meta.optim.cohorts import Cohort
from subspace_meta.optim.names import named, named_groups, plain
from subspace_meta.optim.options import HINTS, PARAMETERS, changed, check_rate_kind, options, refuse_unknown
from subspace_meta.optimizers.base import Optimizer

Rules = Mapping[str, Manifold | Rule]
Make = Callable[..., Optimizer]  # (geometry, lr=...) -> functional optimizer
Others = Callable[..., torch.optim.Optimizer]  # (list of parameters) -> torch optimizer


@dataclass
class _Group:
    """What the shell keeps for one of its parameter groups."""

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


class _Held(NamedTuple):
    """What this rank steps of a group: whole parameters, without derivatives, and gradients."""

    params: dict[str, Tensor]
    grads: dict[str, Tensor | None]
    # Those whose gradients move their cohort, on whichever rank it is; None: every gradient is here to be looked at.
    moving: Collection[str] | None = None


class _Work(NamedTuple):
    """What is to be done in one step for a cohort: its parameters, without derivatives, and their gradients."""

    cohort: Cohort
    params: dict[str, Tensor]
    grads: dict[str, Tensor | None]


class _Result(NamedTuple):
    """What a step gives, not yet written into the parameters."""

    work: _Work
    moved: dict[str, Tensor]
    state: Any


@dataclass(frozen=True)
class _HandMade:
    """Makes a hand-made optimizer with the constructor's settings, and then with the options of a group."""

    make: Make
    settings: dict[str, Any]
    rate_is_a_factor = False

    @property
    def name(self) -> str:
        return getattr(self.make, "__name__", "this optimizer")

    def __call__(self, geometry: Geometry, like: Tensor, **given: Any) -> Optimizer:
        optimizer: Any = self.make(geometry, **self.settings)
        if "lr" not in options(optimizer):
            raise ValueError(
                f"{type(optimizer).__name__} has no option 'lr': the rate of a parameter group would change nothing "
                "(for averages of iterates there is torch.optim.swa_utils.AveragedModel)"
            )
        made: Optimizer = dataclasses.replace(optimizer, **changed(optimizer, {**options(optimizer), **given}))
        return made


class Riemannian(torch.optim.Optimizer):
    """A functional optimizer of this library as a torch optimizer.

    Args:
        params: a module, an iterable of ``(name, parameter)``, or of parameter groups: dicts with such an iterable
            (or a module) as ``"params"``, and options of their own. An option goes to the parameters of the group that
            are on manifolds if it is one of ``optimizer``, and to the rest if it is one of ``others``.
        rules: glob pattern of names -> manifold or ``Rule``, as for ``Geometry.from_rules``.
        optimizer: the class of a hand-made optimizer, ``sm.RAdam`` for instance.
        lr: its learning rate; a float or a scalar tensor. May be left out where the class has a default (``RDoG``).
        others: ``(list of parameters) -> torch optimizer``, for what is on no manifold; ``None``: this one takes them,
            as matrices of Euclidean space.
        project: move weights that are off their manifold to its nearest point, with a warning that names them:
            by more than 1e-5 at construction, by more than 1e-3 where somebody else has moved them since the last
            step. Otherwise a step from such weights is refused.
        check_gradients: look at gradients, at results, and whether somebody moved the weights. On a device a step
            waits for that.
        non_finite: what is done with a step that has a gradient or a result that is not finite: ``"raise"`` a
            ``ValueError`` that names the parameters, or ``"skip"`` it and count it in ``skipped``. It changes nothing.
        settings: further options of ``optimizer``; :func:`options` lists them.

    Raises:
        ValueError: names are missing or twice there, a rule matches nothing, no parameter is on a manifold, a shape
            or dtype cannot carry its manifold, an option is unknown or out of its range, or a matrix is split over
            ranks in another way than ``fully_shard`` does.
    """

    skipped: int = 0  # steps that were not taken, by the guard neither

    def __init__(
        self,
        params: Module | Iterable[Any],
        rules: Rules,
        optimizer: Make,
        lr: float | Tensor | None = None,
        *,
        others: Others | None = torch.optim.AdamW,
        project: bool = True,
        check_gradients: bool = True,
        non_finite: Literal["raise", "skip"] = "raise",
        **settings: Any,
    ) -> None:
        of_torch = inspect.isclass(optimizer) and issubclass(optimizer, torch.optim.Optimizer)
        if of_torch or not callable(optimizer):
            what = optimizer.__name__ if inspect.isclass(optimizer) else f"{optimizer!r:.60}"
            raise ValueError(f"optimizer must be a class of this library, sm.RAdam for instance, got {what}")
        if isinstance(optimizer, type) and dataclasses.is_dataclass(optimizer):
            refuse_unknown(settings, [field.name for field in dataclasses.fields(optimizer)], optimizer.__name__)
            usual = options(optimizer).get("lr", dataclasses.MISSING)
            lr = usual if lr is None and usual is not dataclasses.MISSING else lr
        if lr is None:
            raise ValueError(f"{getattr(optimizer, '__name__', optimizer)} has no learning rate of its own: give lr")
        make = _HandMade(optimizer, {"lr": lr, **settings})
        self._set_up(params, rules, make, {"lr": lr}, others, project, check_gradients, non_finite)

    # --- Construction ---

    def _set_up(
        self,
        params: Module | Iterable[Any],
        rules: Rules | None,
        make: Any,
        defaults: dict[str, Any],
        others: Others | None,
        project: bool,
        check_gradients: bool,
        non_finite: Literal["raise", "skip"],
    ) -> None:
        if others is not None and not callable(others):
            raise ValueError(
                f"others must make a torch optimizer from a list of parameters, or be None, got {others!r}"
            )
        if rules is not None and not isinstance(rules, Mapping):
            raise ValueError(f"rules must be a dict, glob pattern of names -> manifold, got {rules!r}")
        if wrong := [key for key in rules or {} if not isinstance(key, str)]:
            raise ValueError(f"rules go by names, not {wrong[0]!r}; sm.rules_for(model, ...) makes them from types")
        if non_finite not in ("raise", "skip"):
            raise ValueError(f"non_finite must be 'raise' or 'skip', got {non_finite!r}")
        self._make, self._make_others, self._project, self._check = make, others, project, check_gradients
        self._skip = non_finite == "skip"
        self._lanes: tuple[sharding.Lane, ...] = ()  # of all ranks that have parts of parameters
        self._groups: list[_Group] = []  # in the order of this optimizer's own groups within param_groups
        self._others: torch.optim.Optimizer | None = None
        self._rules = {plain(pattern, wrapped=False): rule for pattern, rule in (rules or {}).items()}
        groups = named_groups(params)
        everything = {name: p for group in groups for name, p in group["params"]}
        if sum(len(group["params"]) for group in groups) != len(everything):
            raise ValueError("a parameter's name is in two groups")
        geometry = Geometry.from_rules(everything, self._rules)
        if others is not None and all(isinstance(p.manifold, Euclidean) for p in geometry.parameters):
            raise ValueError("no parameter is on a manifold: give rules, or others=None if this optimizer takes all")
        super().__init__(groups, defaults)

    @property
    def others(self) -> torch.optim.Optimizer | None:
        """The optimizer of the parameters that are on no manifold."""
        return self._others

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, named as in the constructor; the constructor's rules and options hold for them.

        Raises:
            ValueError: see the constructor; also if a name is already there.
        """
        given = dict(param_group)
        members = dict(pairs := named(given.pop("params")))
        if not members:
            raise ValueError("a parameter group has no parameters")
        taken = {name for own in self._groups for name in own.geometry.names}
        if twice := sorted(taken & members.keys()):
            raise ValueError(f"parameters {twice} are already in a group")
        if len({id(p) for _, p in pairs}) < len(pairs):
            raise ValueError("one parameter is there under two names; model.named_parameters() gives each once")
        rules = {pattern: r for pattern, r in self._rules.items() if any(matches(pattern, name) for name in members)}
        geometry = Geometry.from_rules(members, rules)
        curved = [p.name for p in geometry.parameters if not isinstance(p.manifold, Euclidean)]
        names = list(geometry.names) if self._make_others is None else curved
        rest = {name: p for name, p in members.items() if name not in names}
        # What is wrong is found before anything is changed.
        known = self._known_by_others(list(rest.values())) if rest else {}
        own_options: dict[str, Any] = {}
        pieces: dict[str, sharding.Piece] = {}
        if names:
            geometry = cohorts.subset(geometry, members, names)
            geometry.check_points({name: members[name] for name in names})
            owned = [pair for own in self._groups for pair in own.owned]
            pieces = sharding.pieces_of(geometry.parameters, members, owned)
            like = sharding.local(members[names[0]])
            own_options = self._options_of(geometry, like, given, bool(known), split=bool(pieces))
        else:
            refuse_unknown(given, known, getattr(self._make_others, "__name__", "the other optimizer"), list(rest))
        for key in given.keys() - own_options.keys():
            refuse_unknown([key], known, self._make.name, list(members))
        lanes = sharding.lanes_of([p for group in self.param_groups for p in group["params"]] + [*members.values()])
        if names:
            self._start_feasible(geometry, {n: members[n] for n in names if members[n].requires_grad}, pieces, lanes)
            super().add_param_group({**own_options, "params": [members[n] for n in names], "param_names": names})
            self._groups.append(_Group(geometry, pieces=pieces))
            # This optimizer's groups come first: they are told from the other's by their place.
            self.param_groups.insert(len(self._groups) - 1, self.param_groups.pop())
        if rest:
            self._add_to_others(rest, {key: value for key, value in given.items() if key in known})
        self._lanes = lanes

    def _start_feasible(
        self,
        geometry: Geometry,
        moving: dict[str, Parameter],
        pieces: dict[str, sharding.Piece],
        lanes: tuple[sharding.Lane, ...],
    ) -> None:
        """Bring the parameters that will move to their manifolds, or refuse them."""
        pieces = {name: piece for name, piece in pieces.items() if name in moving}
        start = {name: sharding.local(p.detach()) for name, p in moving.items()}
        wholes = sharding.collect(pieces, start)
        mine = {name: wholes.get(name, p) for name, p in start.items() if name not in pieces or name in wholes}

        def mend() -> bool:
            if mine:
                some = cohorts.subset(geometry, mine, mine)
                cohorts.bring_to_manifolds(some, mine, self._project, cohorts.FEASIBLE)
            return True

        sharding.agreed(lanes, mend)
        for name, part in sharding.spread(pieces, wholes).items():
            start[name].copy_(part)

    def _options_of(
        self, geometry: Geometry, like: Tensor, given: dict[str, Any], rest: bool, split: bool
    ) -> dict[str, Any]:
        """Return all options of a group of this optimizer; it is made once, so that it can refuse their values."""
        check_rate_kind(self.defaults["lr"])
        # Also where the other optimizer knows them: half of a group would not be what is asked for.
        refuse_unknown([key for key in HINTS if given.get(key)], self.defaults, self._make.name, geometry.names)
        probe = self._make(geometry, like=like, **self.defaults)
        if split and isinstance(probe, sharding.SEE_ALL):
            raise ValueError(
                f"the steps of {type(probe).__name__} depend on all matrices of a run, and a rank owns some: keep "
                "the layers on manifolds out of sharding (replicated, as under DistributedDataParallel)"
            )
        self.defaults = {**self.defaults, **options(probe)}
        check_rate_kind(given.get("lr", self.defaults["lr"]))
        own = {key: value for key, value in given.items() if key in self.defaults}
        self._make(geometry, like=like, **{**self.defaults, **own})
        if not rest:
            refuse_unknown(given, self.defaults, self._make.name, geometry.names)
        return {**self.defaults, **own}

    def _known_by_others(self, parameters: list[Parameter]) -> dict[str, Any]:
        """Return the options of the other optimizer."""
        assert self._make_others is not None
        others = self._others or self._make_others(parameters)
        return dict(others.defaults)

    def _add_to_others(self, rest: dict[str, Parameter], given: dict[str, Any]) -> None:
        assert self._make_others is not None
        if self._others is None:
            self._others = self._make_others(list(rest.values()))
        else:
            self._others.add_param_group({"params": list(rest.values()), "param_names": list(rest)})
        group = self._others.param_groups[-1]
        if "lr" in given and self._make.rate_is_a_factor:
            given["lr"] = given["lr"] * group["lr"]
        group.update(given, param_names=list(rest))
        # The same dict objects: what a scheduler or GradScaler does to one is done to the other.
        self.param_groups[len(self._groups) :] = self._others.param_groups

    # --- The step ---

    @torch.no_grad()
    def step(  # type: ignore[override]  # torch's overloads know no loss, and floats only
        self, closure: Callable[[], Tensor] | None = None, *, loss: Tensor | None = None
    ) -> Tensor | None:
        """Take one step along the gradients of the parameters: all of them, or none.

        Args:
            closure: computes the loss and its gradients anew, and returns the loss; called once.
            loss: the loss at the parameters, for ``guarded`` where there is no closure.

        Returns:
            What the closure returned.

        Raises:
            ValueError: a gradient is sparse; a gradient or a result is not finite (unless those steps are skipped); a
                parameter is off its manifold, and is not to be moved; a parameter group has an unknown option; or a
                guarded optimizer is given no loss. Nothing is changed then.
        """
        returned = None
        if closure is not None:
            with torch.enable_grad():
                returned = loss = closure()
        if self._lanes:
            self._step_sharded(loss)
            return returned
        results = self._results(loss)
        if results is None:
            return returned
        if self._withheld(results, loss):
            self.skipped += 1
        elif self._others is not None:
            self._others.step()  # before anything is written: it may refuse
        self._commit(results)
        return returned

    def _results(self, loss: Tensor | None, held: list[_Held] | None = None) -> list[_Result] | None:
        """Return what the step gives, of what this rank steps; ``None``: it is skipped."""
        work = self._prepare(loss, held)
        if work is None:
            return None
        results = [_advanced(one, loss) for one in work]
        return results if self._acceptable(results) else None

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _step_sharded(self, loss: Tensor | None) -> None:
        """Take the step where parameters are split over ranks; see the module ``sharding``."""
        loss = None if loss is None else sharding.mean(self._lanes, loss)
        held, pieces, uneven = self._held_by_owners()
        before = [(list(own.cohorts), dict(own.numbers)) for own in self._groups]
        skipped, taken, others = self.skipped, False, self._others

        def attempt() -> list[_Result] | None:
            if uneven:
                raise ValueError(f"{cohorts.quoted(uneven)} have gradients on some ranks only")
            return self._results(loss, held)

        try:
            results = sharding.agreed(self._lanes, attempt)
            skips = results is None or self._withheld(results, loss)
            if others is not None and not skips:
                sharding.agreed(self._lanes, lambda: (others.step(), True))
            taken = results is not None
            skipped += skips
        finally:
            self.skipped = skipped  # one rank alone may have counted
            if not taken:  # what was started on some ranks was not on all
                for own, (started, numbers) in zip(self._groups, before, strict=True):
                    own.cohorts, own.numbers = started, numbers
        if results is not None:
            self._commit(results)
            self._write(pieces, {name: p for one in held for name, p in one.params.items()})
            self._tell_layouts()

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _prepare(self, loss: Tensor | None, held: list[_Held] | None) -> list[_Work] | None:
        """Look at options, gradients and parameters, and return what is to be done; ``None``: the step is skipped.

        Plain Python about names and values: ``torch.compile(optimizer.step)`` compiles what comes after it.
        """
        if self._check and not self._gradients_are_good(held or []):
            return None
        for group in self.param_groups[len(self._groups) :]:
            assert self._others is not None
            refuse_unknown(group, self._others.defaults, type(self._others).__name__, group["param_names"])
        work = []
        for number, (own, group, members) in enumerate(self._own()):
            refuse_unknown(group, self.defaults, self._make.name, own.geometry.names)
            check_rate_kind(group["lr"])
            here = held[number] if held else _held(members)
            self._start_cohorts(own, group, members, here)
            for cohort in own.cohorts:
                params = {name: here.params[name] for name in cohort.geometry.names}
                grads = {name: here.grads[name] for name in params}
                if here.moving is not None:
                    stays = cohort.number not in {own.numbers[name] for name in here.moving}
                else:
                    stays = all(grad is None for grad in grads.values()) or _nothing_to_do(group["lr"], grads)
                if stays:
                    continue
                cohort.take_options(group, params)
                if self._check and (elsewhere := cohorts.moved_by_others(cohort, params)):
                    some = cohorts.subset(cohort.geometry, params, elsewhere)
                    points = {name: params[name] for name in elsewhere}
                    cohorts.bring_to_manifolds(some, points, self._project, cohort.tolerance)
                    cohorts.keep_tangent(cohort, params)
                work.append(_Work(cohort, params, cohort.scaled(grads, params)))
        if _guarded(work):
            if loss is None:
                raise ValueError("guarded=True watches the loss: give it, step(closure) or step(loss=loss)")
            if torch.as_tensor(loss).numel() != 1:
                raise ValueError(f"guarded=True watches one loss, got a tensor of shape {tuple(loss.shape)}")
        return work

    def _start_cohorts(
        self, own: _Group, group: Mapping[str, Any], members: Mapping[str, Parameter], held: _Held
    ) -> None:
        """Start the state of parameters that have their first gradient."""
        fresh: dict[tuple[torch.device, torch.dtype], list[str]] = {}
        for name, p in members.items():
            if name not in own.numbers and p.grad is not None:
                fresh.setdefault((p.device, p.dtype), []).append(name)
        for names in fresh.values():
            number = 1 + max(own.numbers.values(), default=-1)
            # What all ranks step has to stay equal on them, bit for bit: it is not batched with what only one owns.
            for of_owner in (False, True):
                here = [name for name in names if (name in own.pieces) == of_owner and name in held.params]
                if not here:
                    continue
                params = {name: held.params[name] for name in here}
                geometry = cohorts.subset(own.geometry, params, params)
                if self._check:
                    cohorts.bring_to_manifolds(geometry, params, self._project, cohorts.LATER)
                optimizer = self._make(
                    geometry, like=next(iter(params.values())), **{key: group[key] for key in self.defaults}
                )
                own.cohorts.append(Cohort(optimizer, optimizer.init(params), number=number))
            own.numbers.update(dict.fromkeys(names, number))

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _withheld(self, results: list[_Result], loss: Tensor | None) -> bool:
        """Return whether the guard does not take this step, so that the other parameters stay, too."""
        guarded = _guarded([one.work for one in results])
        if self._lanes:  # also where this rank owns nothing
            guarded = any(group.get("guarded") for _, group, _ in self._own()) and loss is not None
        return guarded and not bool(torch.isfinite(torch.as_tensor(loss)).all())

    def _gradients_are_good(self, held: list[_Held]) -> bool:
        gradients = {name: p.grad for *_, members in self._own() for name, p in members.items() if p.grad is not None}
        for name, gradient in gradients.items():
            if gradient.is_sparse:
                raise ValueError(f"the gradient of {name!r} is sparse; a parameter on a manifold needs a dense one")
        for group in self.param_groups[len(self._groups) :]:
            pairs = zip(group["param_names"], group["params"], strict=True)
            gradients.update({name: p.grad for name, p in pairs if p.grad is not None and not p.grad.is_sparse})
        if self._lanes:  # parts, and what is whole here
            gradients = {name: sharding.local(gradient) for name, gradient in gradients.items()}
            gradients.update({n: grad for one in held for n, grad in one.grads.items() if grad is not None})
        if cohorts.all_finite(gradients.values()):
            return True
        members = {name: sharding.local(p.detach()) for *_, group in self._own() for name, p in group.items()}
        if spoiled := cohorts.not_finite(members):
            return self._refused(f"the parameters {cohorts.quoted(spoiled)} are not finite, nor are gradients")
        return self._refused(f"the gradients of {cohorts.quoted(cohorts.not_finite(gradients))} are not finite")

    def _refused(self, reason: str) -> bool:
        if not self._skip:
            raise ValueError(f"{reason}; nothing was changed. non_finite='skip' leaves such steps out")
        self.skipped += 1
        return False

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _acceptable(self, results: list[_Result]) -> bool:
        """Return whether all results are finite, so that the step is taken."""
        for work, moved, state in results if self._check else ():
            leaves = [leaf for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor)]
            if cohorts.all_finite((*moved.values(), *leaves)):
                continue
            parts = states.split(state, work.cohort.geometry)
            bad = [name for name in moved if cohorts.not_finite({**parts[name], "": moved[name]})]
            largest = max(float(grad.abs().max()) for name in bad if (grad := work.grads[name]) is not None)
            return self._refused(
                f"the step of {cohorts.quoted(bad)} would not be finite (largest entry of a gradient {largest:.1e}; "
                f"squares overflow from {torch.finfo(moved[bad[0]].dtype).max ** 0.5:.0e})"
            )
        return True

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _commit(self, results: list[_Result]) -> None:
        for work, moved, state in results:
            work.cohort.state = state
            for name, tensor in moved.items():
                if work.grads[name] is not None:
                    work.params[name].copy_(tensor)
            work.cohort.norms = cohorts.norms_of(work.params.values()) if self._check else None

    def check(self, tolerance: float = 1e-3) -> dict[str, float]:
        """Return the constraint violation of every parameter on a manifold.

        Raises:
            ValueError: one is above ``tolerance`` or not finite.
        """
        wholes = self._wholes()

        def violations() -> dict[str, float]:
            found: dict[str, float] = {}
            for own, _, members in self._own():
                params = {name: wholes[name] for name in members if name in wholes}
                if params:
                    geometry = cohorts.subset(own.geometry, params, params)
                    geometry.check_feasible(params, tolerance)
                    found.update(geometry.violation(params))
            return found

        found = sharding.merged(self._lanes, sharding.agreed(self._lanes, violations) or {})
        return {name: found[name] for *_, members in self._own() for name in members}

    def _own(self) -> Iterator[tuple[_Group, dict[str, Any], dict[str, Parameter]]]:
        """Yield this optimizer's groups, the first ones of ``param_groups``, with their parameters by name."""
        for own, group in zip(self._groups, self.param_groups, strict=False):
            yield own, group, dict(zip(group["param_names"], group["params"], strict=True))

    # --- Parameters that are split over ranks ---

    def _wholes(self) -> dict[str, Tensor]:
        """Return the parameters that this rank steps, as they are; all ranks have to call this."""
        members = {name: p for *_, group in self._own() for name, p in group.items()}
        pieces = {name: piece for own in self._groups for name, piece in own.pieces.items()}
        here = {name: sharding.local(p.detach()) for name, p in members.items()}
        wholes = sharding.collect(pieces, {name: here[name] for name in pieces})
        return {name: wholes.get(name, p) for name, p in here.items() if name not in pieces or name in wholes}

    def _held_by_owners(self) -> tuple[list[_Held], dict[str, sharding.Piece], list[str]]:
        """Bring parameters and gradients to their owners.

        Returns:
            What this rank steps; the parameters that travelled; and those with a gradient on some ranks only.
        """
        travelling: dict[str, sharding.Piece] = {}
        pieces: dict[tuple[str, str], sharding.Piece] = {}
        parts: dict[tuple[str, str], Tensor] = {}
        for own, _, members in self._own():
            for name, piece in own.pieces.items():
                p = members[name]
                if not (p.requires_grad or p.grad is not None or name in own.numbers):
                    continue
                travelling[name] = piece
                part, grad = sharding.local(p.detach()), sharding.gradient(p)
                there = dataclasses.replace(piece, shape=(piece.lane.count,), axis=0)
                pieces.update({(name, "value"): piece, (name, "gradient"): piece, (name, "there"): there})
                parts[name, "value"] = part
                parts[name, "gradient"] = torch.zeros_like(part) if grad is None else grad
                parts[name, "there"] = part.new_full((1,), float(grad is not None))
        wholes = sharding.collect(pieces, parts)
        held, uneven = [], []
        for own, group, members in self._own():
            here = _held({name: p for name, p in members.items() if name not in own.pieces})
            for name in own.pieces:
                if (name, "value") in wholes:
                    everywhere = bool(wholes[name, "there"].all())
                    uneven += [name] if everywhere != bool(wholes[name, "there"].any()) else []
                    here.params[name] = wholes[name, "value"]
                    here.grads[name] = wholes[name, "gradient"] if everywhere else None
            check_rate_kind(group["lr"])
            grads = {name: sharding.local(p.grad) for name, p in members.items() if p.grad is not None}
            if float(group["lr"]) == 0.0:  # see _nothing_to_do
                moves = sharding.anywhere(self._lanes, [bool(grad.any()) for grad in grads.values()])
                grads = {name: grads[name] for name, moving in zip(grads, moves, strict=True) if moving}
            held.append(here._replace(moving=grads.keys()))
        return held, travelling, uneven

    def _write(self, pieces: dict[str, sharding.Piece], wholes: dict[str, Tensor]) -> None:
        """Bring what the owners have to the parameters of all ranks."""
        members = {name: p for *_, group in self._own() for name, p in group.items()}
        for name, part in sharding.spread(pieces, wholes).items():
            sharding.local(members[name].detach()).copy_(part)

    def _tell_layouts(self) -> None:
        """Let all ranks know what the state of parameters that were started consists of."""
        fresh = {name for own in self._groups for name in own.numbers.keys() & own.pieces.keys() - own.layouts.keys()}
        if fresh:
            parts = {name: part for own in self._groups for c in own.cohorts for name, part in c.saved().items()}
            mine = sharding.layouts_of({name: part for name, part in parts.items() if name in fresh})
            told = sharding.merged(self._lanes, mine)
            for own in self._groups:
                own.layouts.update({name: told[name] for name in own.pieces if name in fresh})

    # --- State, saving and loading ---

    @property
    def state(self) -> defaultdict[Any, Any]:  # torch keeps a plain attribute
        """The state of every parameter that has one, as torch lays it out: ``state[parameter]`` is a dict of tensors.

        Made from the functional state when it is asked for. Its tensors are views, so values can be changed in place;
        another dict has to be assigned as a whole: ``optimizer.state = {}`` starts anew. What another rank owns is here
        on the device ``meta``.
        """
        found: defaultdict[Any, Any] = defaultdict(dict)
        for own, _, members in self._own() if hasattr(self, "_groups") else ():
            parts = {
                name: {**sharding.absent(layout), cohorts.COHORT: torch.tensor(own.numbers[name])}
                for name, layout in own.layouts.items()
            }
            parts.update({name: part for cohort in own.cohorts for name, part in cohort.saved().items()})
            found.update({p: parts[name] for name, p in members.items() if name in parts})  # the order of all ranks
        if (others := getattr(self, "_others", None)) is not None:
            found.update(others.state)
        return found

    @state.setter
    def state(self, state: Mapping[Any, Any]) -> None:
        """Take another state, of this layout; an empty one starts anew."""
        if not state and not getattr(self, "_groups", None):
            return  # torch's constructor
        self._take_state(state, [group for _, group, _ in self._own()])
        if self._others is not None:
            mine = {p for group in self._others.param_groups for p in group["params"]}
            self._others.state = defaultdict(dict, {p: value for p, value in state.items() if p in mine})

    def state_dict(self) -> dict[str, Any]:
        """Return copies of state and options in torch's layout: for ``torch.save``.

        Of parameters that are split over ranks the state is, too, in DTensors: for ``torch.distributed.checkpoint``.
        All ranks have to call this then.
        """
        # Not views: the next step would write over them.
        saved: dict[str, Any] = pytree.tree_map(_cloned, super().state_dict())
        pairs = [zip(group["param_names"], group["params"], strict=True) for group in saved["param_groups"]]
        ids = dict(pair for some in pairs for pair in some)
        for own in self._groups:
            if own.layouts:
                pieces = {name: own.pieces[name] for name in own.pieces if name in own.layouts}
                parts = {name: part for cohort in own.cohorts for name, part in cohort.saved().items()}
                for name, part in sharding.as_dtensors(pieces, own.layouts, parts).items():
                    saved["state"][ids[name]] = part
        return saved

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; tensors are brought to the parameters' device and dtype.

        Names count without the prefixes of compiled (``_orig_mod.``) and replicated (``module.``) modules. The state of
        a parameter may be in DTensors or in whole tensors, whether or not the parameter itself is split over ranks.

        Raises:
            ValueError: it is of another optimizer, other parameters or shapes; nothing is changed then.
        """
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            other = pre_hook(self, state_dict)
            state_dict = state_dict if other is None else other
        if not (isinstance(state_dict.get("state"), dict) and isinstance(state_dict.get("param_groups"), list)):
            raise ValueError(
                "this is no state_dict of this optimizer, or one in an earlier layout: it has no dict 'state' and list "
                "'param_groups'"
            )
        groups = pytree.tree_map(_cloned, state_dict["param_groups"])
        self._check_names(groups)
        ids = [number for group in groups for number in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        by_id = dict(zip(ids, parameters, strict=True))
        state = {by_id[number]: part for number, part in state_dict["state"].items() if number in by_id}
        own = len(self._groups)
        found = self._found_groups(state, groups[:own])
        if self._others is not None:
            for saved, group in zip(groups[own:], self._others.param_groups, strict=True):
                if lacking := [key for key in group if key not in saved and key in self._others.defaults]:
                    kind = type(self._others).__name__
                    raise ValueError(f"the other parameters' state is not of {kind}: it has no option {lacking[0]!r}")
            rest = {p for group in self._others.param_groups for p in group["params"]}
            of_others = {number: state_dict["state"][number] for number, p in by_id.items() if p in rest and p in state}
            self._others.load_state_dict({"state": of_others, "param_groups": groups[own:]})
            self.param_groups[own:] = self._others.param_groups
        self._groups = found
        for (_, group, _), new in zip(self._own(), groups, strict=False):
            group.update({key: value for key, value in new.items() if key not in PARAMETERS})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _check_names(self, groups: list[dict[str, Any]]) -> None:
        """Raise ``ValueError`` unless the saved groups are those of this optimizer."""

        def names(groups: list[dict[str, Any]]) -> list[list[str]]:
            return [[plain(name) for name in group.get("param_names", group["params"])] for group in groups]

        if any("param_names" not in group for group in groups):
            raise ValueError(
                "this is no state_dict of an optimizer of subspace_meta.optim: its groups have no param_names"
            )
        given, wanted = names(groups), names(self.param_groups)
        if given != wanted:
            raise ValueError(f"the groups are {given}, this optimizer has {wanted}")
        for saved, own in zip(groups[: len(self._groups)], self.param_groups, strict=False):
            lacking = [key for key in self.defaults if key not in saved]
            strange = [key for key in saved if key not in own and key not in PARAMETERS]
            try:
                refuse_unknown(strange, self.defaults, self._make.name, saved["param_names"])
            except ValueError as error:
                raise ValueError(f"the state is of another optimizer: {error}") from None
            if lacking:
                raise ValueError(f"the state is of another optimizer: its groups have no option {lacking[0]!r}")

    def _found_groups(self, state: Mapping[Any, Any], groups: list[dict[str, Any]]) -> list[_Group]:
        """Return this optimizer's groups with the cohorts that a saved state makes."""
        wholes = self._wholes()
        parts: dict[str, dict[str, Any]] = {}
        for *_, members in self._own():
            for name, p in members.items():
                if (part := state.get(p)) is not None:
                    parts[name] = {key: sharding.whole(part[key]) for key in sorted(part)}  # the order of all ranks

        def found() -> list[_Group]:
            pairs = zip(self._own(), groups, strict=True)
            return [self._found_group(own, group, parts, wholes) for (own, *_), group in pairs]

        return sharding.agreed(self._lanes, found) or []

    def _found_group(
        self, own: _Group, group: Mapping[str, Any], parts: Mapping[str, dict[str, Any]], wholes: Mapping[str, Tensor]
    ) -> _Group:
        together: dict[tuple[int, bool], dict[str, Any]] = {}
        numbers, layouts = {}, {}
        for name in own.geometry.names:
            if (part := parts.get(name)) is None:
                continue
            if cohorts.COHORT not in part:
                raise ValueError(f"the state of {name!r} is of another optimizer: it has {sorted(part)}")
            numbers[name] = int(part[cohorts.COHORT])
            if name in own.pieces:
                layouts.update(sharding.layouts_of({name: part}))
            if name in wholes:
                together.setdefault((numbers[name], name in own.pieces), {})[name] = part
        made = []
        for (number, _), some in sorted(together.items()):
            params = {name: wholes[name] for name in some}
            geometry = cohorts.subset(own.geometry, params, params)
            like = next(iter(params.values()))
            optimizer = self._make(geometry, like=like, **{key: group[key] for key in self.defaults})
            made.append(cohorts.loaded(optimizer, params, some, number))
        return dataclasses.replace(own, cohorts=made, numbers=numbers, layouts=layouts)

    def _take_state(self, state: Mapping[Any, Any], groups: list[dict[str, Any]]) -> None:
        self._groups = self._found_groups(state, groups)

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles need; hooks stay behind, as those of torch's optimizers."""
        kept = (
            "_make",
            "_make_others",
            "_project",
            "_check",
            "_skip",
            "_groups",
            "_lanes",
            "_others",
            "_rules",
            "skipped",
        )
        saved = {"defaults": self.defaults, "param_groups": self.param_groups}
        return {**saved, **{name: getattr(self, name) for name in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take up a copy's or a pickle's state."""
        super().__setstate__(state)
        if self._others is not None:
            self.param_groups[len(self._groups) :] = self._others.param_groups


def _held(members: Mapping[str, Parameter]) -> _Held:
    """Return what every rank has whole."""
    grads = {name: sharding.gradient(p) for name, p in members.items()}
    return _Held({name: sharding.local(p.detach()) for name, p in members.items()}, grads)


def _guarded(work: list[_Work]) -> bool:
    """Return whether an optimizer of this step watches the loss."""
    return any(getattr(one.cohort.optimizer, "guarded", False) for one in work)


def _nothing_to_do(lr: Any, grads: Mapping[str, Tensor | None]) -> bool:
    """Return whether a step has rate and gradients zero, by which torch's checkpoints make an optimizer's state."""
    return float(lr) == 0.0 and all(grad is None or not bool(grad.any()) for grad in grads.values())


def _advanced(work: _Work, loss: Tensor | None) -> _Result:
    """Return one step of a functional optimizer; where a parameter has no gradient its state sees a zero one."""
    cohort, params, grads = work
    filled = {name: torch.zeros_like(params[name]) if grad is None else grad for name, grad in grads.items()}
    value = None if loss is None else torch.as_tensor(loss).detach()
    return _Result(work, *cohort.optimizer.update(filled, cohort.state, params, value))


def _cloned(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf
