"""The optimizer itself: construction, step, saving and loading."""

from __future__ import annotations

import dataclasses
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.utils import _pytree as pytree

from subspace_meta.geometry import Geometry, Rule, matches
from subspace_meta.manifolds import Euclidean, Manifold
from subspace_meta.optim import cohorts, states
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
    cohorts: list[Cohort] = field(default_factory=list)


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
            or dtype cannot carry its manifold, an option is unknown or out of its range, or a parameter is sharded.
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
        for name, p in members.items():
            if hasattr(p, "placements"):
                raise ValueError(
                    f"parameter {name!r} is sharded; a retraction needs whole matrices: keep the layers on manifolds "
                    "out of sharding (replicated, as under DistributedDataParallel)"
                )
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
        if names:
            geometry = cohorts.subset(geometry, members, names)
            geometry.check_points({name: members[name] for name in names})
            own_options = self._options_of(geometry, members[names[0]], given, rest=bool(known))
        else:
            refuse_unknown(given, known, getattr(self._make_others, "__name__", "the other optimizer"), list(rest))
        for key in given.keys() - own_options.keys():
            refuse_unknown([key], known, self._make.name, list(members))
        if names:
            moving = [name for name in names if members[name].requires_grad]
            if moving:
                starting = cohorts.subset(geometry, members, moving)
                start = {name: members[name] for name in moving}
                cohorts.bring_to_manifolds(starting, start, self._project, cohorts.FEASIBLE)
            super().add_param_group({**own_options, "params": [members[n] for n in names], "param_names": names})
            self._groups.append(_Group(geometry))
            # This optimizer's groups come first: they are told from the other's by their place.
            self.param_groups.insert(len(self._groups) - 1, self.param_groups.pop())
        if rest:
            self._add_to_others(rest, {key: value for key, value in given.items() if key in known})

    def _options_of(self, geometry: Geometry, like: Tensor, given: dict[str, Any], rest: bool) -> dict[str, Any]:
        """Return all options of a group of this optimizer; it is made once, so that it can refuse their values."""
        check_rate_kind(self.defaults["lr"])
        # Also where the other optimizer knows them: half of a group would not be what is asked for.
        refuse_unknown([key for key in HINTS if given.get(key)], self.defaults, self._make.name, geometry.names)
        probe = self._make(geometry, like=like, **self.defaults)
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
        work = self._prepare(loss)
        if work is None:
            return returned
        results = [_advanced(one, loss) for one in work]
        if not self._acceptable(results):
            return returned
        if self._withheld(work, loss):
            self.skipped += 1
        elif self._others is not None:
            self._others.step()  # before anything is written: it may refuse
        self._commit(results)
        return returned

    @torch._disable_dynamo  # type: ignore[attr-defined]  # torch.compiler.disable would import the compiler
    def _prepare(self, loss: Tensor | None) -> list[_Work] | None:
        """Look at options, gradients and parameters, and return what is to be done; ``None``: the step is skipped.

        Plain Python about names and values: ``torch.compile(optimizer.step)`` compiles what comes after it.
        """
        if self._check and not self._gradients_are_good():
            return None
        for group in self.param_groups[len(self._groups) :]:
            assert self._others is not None
            refuse_unknown(group, self._others.defaults, type(self._others).__name__, group["param_names"])
        work = []
        for own, group, members in self._own():
            refuse_unknown(group, self.defaults, self._make.name, own.geometry.names)
            check_rate_kind(group["lr"])
            self._start_cohorts(own, group, members)
            for cohort in own.cohorts:
                params = {name: members[name].detach() for name in cohort.geometry.names}
                grads = {name: members[name].grad for name in params}
                if all(grad is None for grad in grads.values()) or _nothing_to_do(group["lr"], grads):
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

    def _start_cohorts(self, own: _Group, group: Mapping[str, Any], members: Mapping[str, Parameter]) -> None:
        """Start the state of parameters that have their first gradient."""
        seen = {name for cohort in own.cohorts for name in cohort.geometry.names}
        fresh: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}
        for name, p in members.items():
            if name not in seen and p.grad is not None:
                fresh.setdefault((p.device, p.dtype), {})[name] = p.detach()
        for params in fresh.values():
            geometry = cohorts.subset(own.geometry, params, params)
            if self._check:
                cohorts.bring_to_manifolds(geometry, params, self._project, cohorts.LATER)
            optimizer = self._make(
                geometry, like=next(iter(params.values())), **{key: group[key] for key in self.defaults}
            )
            own.cohorts.append(Cohort(optimizer, optimizer.init(params)))

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _withheld(self, work: list[_Work], loss: Tensor | None) -> bool:
        """Return whether the guard does not take this step, so that the other parameters stay, too."""
        return _guarded(work) and not bool(torch.isfinite(torch.as_tensor(loss)).all())

    def _gradients_are_good(self) -> bool:
        gradients = {name: p.grad for *_, members in self._own() for name, p in members.items() if p.grad is not None}
        for name, gradient in gradients.items():
            if gradient.is_sparse:
                raise ValueError(f"the gradient of {name!r} is sparse; a parameter on a manifold needs a dense one")
        for group in self.param_groups[len(self._groups) :]:
            pairs = zip(group["param_names"], group["params"], strict=True)
            gradients.update({name: p.grad for name, p in pairs if p.grad is not None and not p.grad.is_sparse})
        if cohorts.all_finite(gradients.values()):
            return True
        members = {name: p.detach() for *_, group in self._own() for name, p in group.items()}
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
        found: dict[str, float] = {}
        for own, _, members in self._own():
            params = {name: p.detach() for name, p in members.items()}
            own.geometry.check_feasible(params, tolerance)
            found.update(own.geometry.violation(params))
        return found

    def _own(self) -> Iterator[tuple[_Group, dict[str, Any], dict[str, Parameter]]]:
        """Yield this optimizer's groups, the first ones of ``param_groups``, with their parameters by name."""
        for own, group in zip(self._groups, self.param_groups, strict=False):
            yield own, group, dict(zip(group["param_names"], group["params"], strict=True))

    # --- State, saving and loading ---

    @property
    def state(self) -> defaultdict[Any, Any]:  # torch keeps a plain attribute
        """The state of every parameter that has one, as torch lays it out: ``state[parameter]`` is a dict of tensors.

        Made from the functional state when it is asked for. Its tensors are views, so values can be changed in place;
        another dict has to be assigned as a whole: ``optimizer.state = {}`` starts anew.
        """
        found: defaultdict[Any, Any] = defaultdict(dict)
        for own, _, members in self._own() if hasattr(self, "_groups") else ():
            for number, cohort in enumerate(own.cohorts):
                found.update({members[name]: part for name, part in cohort.saved(number).items()})
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
        """Return copies of state and options in torch's layout: for ``torch.save``."""
        # Not views: the next step would write over them.
        saved: dict[str, Any] = pytree.tree_map(_cloned, super().state_dict())
        return saved

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; tensors are brought to the parameters' device and dtype.

        Names count without the prefixes of compiled (``_orig_mod.``) and replicated (``module.``) modules.

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
        found = self._found_cohorts(state, groups[:own])
        if self._others is not None:
            for saved, group in zip(groups[own:], self._others.param_groups, strict=True):
                if lacking := [key for key in group if key not in saved and key in self._others.defaults]:
                    kind = type(self._others).__name__
                    raise ValueError(f"the other parameters' state is not of {kind}: it has no option {lacking[0]!r}")
            rest = {p for group in self._others.param_groups for p in group["params"]}
            of_others = {number: state_dict["state"][number] for number, p in by_id.items() if p in rest and p in state}
            self._others.load_state_dict({"state": of_others, "param_groups": groups[own:]})
            self.param_groups[own:] = self._others.param_groups
        for (mine, group, _), made, new in zip(self._own(), found, groups, strict=False):
            mine.cohorts = made
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

    def _found_cohorts(self, state: Mapping[Any, Any], groups: list[dict[str, Any]]) -> list[list[Cohort]]:
        """Return for each own group the cohorts that a saved state makes."""
        found = []
        for (own, _, members), group in zip(self._own(), groups, strict=True):
            together: dict[int, dict[str, Any]] = {}
            for name, p in members.items():
                part = state.get(p)
                if part is None:
                    continue
                if cohorts.COHORT not in part:
                    raise ValueError(f"the state of {name!r} is of another optimizer: it has {sorted(part)}")
                together.setdefault(int(part[cohorts.COHORT]), {})[name] = part
            made = []
            for _, parts in sorted(together.items()):
                params = {name: members[name].detach() for name in parts}
                geometry = cohorts.subset(own.geometry, params, params)
                like = next(iter(params.values()))
                optimizer = self._make(geometry, like=like, **{key: group[key] for key in self.defaults})
                made.append(cohorts.loaded(optimizer, params, parts))
            found.append(made)
        return found

    def _take_state(self, state: Mapping[Any, Any], groups: list[dict[str, Any]]) -> None:
        for own, made in zip(self._groups, self._found_cohorts(state, groups), strict=True):
            own.cohorts = made

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles need; hooks stay behind, as those of torch's optimizers."""
        kept = ("_make", "_make_others", "_project", "_check", "_skip", "_groups", "_others", "_rules", "skipped")
        saved = {"defaults": self.defaults, "param_groups": self.param_groups}
        return {**saved, **{name: getattr(self, name) for name in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take up a copy's or a pickle's state."""
        super().__setstate__(state)
        if self._others is not None:
            self.param_groups[len(self._groups) :] = self._others.param_groups


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
