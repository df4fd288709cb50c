"""The optimizer itself, as torch knows one: it holds the pieces, and hands them to the functions that work on them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Module

from subspace_meta.optim import cohorts, construction, ranks, saving, sharding, stepping
from subspace_meta.optim.construction import Make
from subspace_meta.optim.contents import Contents, Group, Others, Own, Rules, Settings
from subspace_meta.optim.options import PARAMETERS


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
    _iterates: dict[str, Tensor] | None = None  # of this rank, while averages are in the model

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
        make = construction.hand_made(optimizer, lr, settings)
        chosen = construction.settings_of(make, rules, others, project, check_gradients, non_finite)
        self._set_up(params, chosen, {"lr": make.settings["lr"]})

    # --- Construction ---

    def _set_up(self, params: Module | Iterable[Any], settings: Settings, defaults: dict[str, Any]) -> None:
        self._settings = settings
        self._groups: list[Group] = []  # in the order of this optimizer's own groups, the first ones of param_groups
        self._others: torch.optim.Optimizer | None = None
        self._lanes: tuple[sharding.Lane, ...] = ()  # of all ranks that have parts of parameters
        super().__init__(construction.groups_of(params, settings), defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, named as in the constructor; the constructor's rules and options hold for them.

        Raises:
            ValueError: see the constructor; also if a name is already there.
        """
        # What is wrong is found before anything is changed.
        new = construction.addition(self._contents(), param_group)
        if new.group is not None:
            construction.start_feasible(new, self._settings.project)
            self.defaults = new.defaults
            params, names = list(new.members.values()), list(new.members)
            super().add_param_group({**new.options, "params": params, "param_names": names})
            self._groups.append(new.group)
            # This optimizer's groups come first: they are told from the other's by their place.
            self.param_groups.insert(len(self._groups) - 1, self.param_groups.pop())
        if new.rest:
            self._others = construction.others_with(new, self._settings, self._others)
            self._list_others()
        self._lanes = new.lanes

    def _list_others(self) -> None:
        """List the other optimizer's groups after the own ones.

        They are the same dict objects: what a scheduler or GradScaler does to one is done to the other.
        """
        if self._others is not None:
            self.param_groups[len(self._groups) :] = self._others.param_groups

    def _contents(self) -> Contents:
        own = tuple(
            Own(kept, group, dict(zip(group["param_names"], group["params"], strict=True)))
            for kept, group in zip(self._groups, self.param_groups, strict=False)
        )
        rest = self.param_groups[len(self._groups) :]
        return Contents(self._settings, self.defaults, own, self._others, rest, self._lanes)

    @property
    def others(self) -> torch.optim.Optimizer | None:
        """The optimizer of the parameters that are on no manifold."""
        return self._others

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
                parameter is off its manifold, and is not to be moved; the model has another dtype or device than at
                the last step; a parameter group has an unknown option; a guarded optimizer is given no loss; or the
                model holds averages.
                Nothing is changed then.
        """
        if self._iterates is not None:
            raise ValueError("the model holds averages, which are not where steps go on: leave averaged() first")
        returned = None
        if closure is not None:
            with torch.enable_grad():
                returned = loss = closure()
        if self._lanes:
            self._step_on_all_ranks(loss)
            return returned
        if (work := self._plan(loss)) is None:
            return returned
        results = [stepping.advanced(one, loss) for one in work]
        if not self._finite(results):
            return returned
        if self._withheld(work, loss):
            self.skipped += 1
        elif self._others is not None:
            self._others.step()  # before anything is written: it may refuse
        self._commit(results)
        return returned

    # Not compiled by torch.compile(optimizer.step): plain Python about names and values.

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _step_on_all_ranks(self, loss: Tensor | None) -> None:
        self.skipped += not ranks.step(self._contents(), loss)

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _plan(self, loss: Tensor | None) -> list[stepping.Work] | None:
        work = stepping.plan(self._contents(), loss)
        self.skipped += work is None
        return work

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _finite(self, results: list[stepping.Result]) -> bool:
        finite = stepping.finite(results, self._settings)
        self.skipped += not finite
        return finite

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _withheld(self, work: list[stepping.Work], loss: Tensor | None) -> bool:
        return stepping.withheld(stepping.guarded(work), loss)

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _commit(self, results: list[stepping.Result]) -> None:
        stepping.commit(results, self._settings)

    def check(self, tolerance: float = 1e-3) -> dict[str, float]:
        """Return the constraint violation of every parameter on a manifold.

        Raises:
            ValueError: one is above ``tolerance`` or not finite.
        """
        contents = self._contents()
        wholes = ranks.wholes(contents)

        def violations() -> dict[str, float]:
            found: dict[str, float] = {}
            for own in contents.own:
                params = {name: wholes[name] for name in own.members if name in wholes}
                if params:
                    geometry = cohorts.subset(own.group.geometry, params, params)
                    geometry.check_feasible(params, tolerance)
                    found.update(geometry.violation(params))
            return found

        found = sharding.merged(self._lanes, sharding.agreed(self._lanes, violations) or {})
        return {name: found[name] for name in contents.members}

    # --- State, saving and loading ---

    @property
    def state(self) -> defaultdict[Any, Any]:  # torch keeps a plain attribute
        """The state of every parameter that has one, as torch lays it out: ``state[parameter]`` is a dict of tensors.

        Made from the functional state when it is asked for. Its tensors are views, so values can be changed in place;
        another dict has to be assigned as a whole: ``optimizer.state = {}`` starts anew. What another rank owns is here
        on the device ``meta``.
        """
        found: defaultdict[Any, Any] = defaultdict(dict)
        if hasattr(self, "_groups"):
            found.update(saving.state_of(self._contents()))
        if (others := getattr(self, "_others", None)) is not None:
            found.update(others.state)
        return found

    @state.setter
    def state(self, state: Mapping[Any, Any]) -> None:
        """Take another state, of this layout; an empty one starts anew."""
        if not state and not getattr(self, "_groups", None):
            return  # torch's constructor
        contents = self._contents()
        self._groups = saving.groups_from(contents, state, [own.options for own in contents.own])
        if self._others is not None:
            mine = {p for group in self._others.param_groups for p in group["params"]}
            self._others.state = defaultdict(dict, {p: value for p, value in state.items() if p in mine})

    def state_dict(self) -> dict[str, Any]:
        """Return copies of state and options in torch's layout: for ``torch.save``.

        Of parameters that are split over ranks the state is, too, in DTensors: for ``torch.distributed.checkpoint``.
        All ranks have to call this then.
        """
        # Not views: the next step would write over them.
        saved: dict[str, Any] = saving.copies(super().state_dict())
        pairs = [zip(group["param_names"], group["params"], strict=True) for group in saved["param_groups"]]
        ids = dict(pair for some in pairs for pair in some)
        saved["state"].update({ids[name]: part for name, part in saving.as_dtensors(self._contents()).items()})
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
        contents = self._contents()
        groups = saving.copies(state_dict["param_groups"])
        saving.check_groups(contents, groups)
        ids = [number for group in groups for number in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        by_id = dict(zip(ids, parameters, strict=True))
        state = {by_id[number]: part for number, part in state_dict["state"].items() if number in by_id}
        own, rest = groups[: len(self._groups)], groups[len(self._groups) :]
        found = saving.groups_from(contents, state, own)
        if self._others is not None:
            saving.check_others(self._others, rest)
            theirs = {p for group in self._others.param_groups for p in group["params"]}
            of_others = {number: state[p] for number, p in by_id.items() if p in theirs and p in state}
            self._others.load_state_dict({"state": of_others, "param_groups": rest})
            self._list_others()
        self._groups = found
        for group, new in zip(self.param_groups, own, strict=False):
            group.update({key: value for key, value in new.items() if key not in PARAMETERS})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles need; hooks stay behind, as those of torch's optimizers."""
        kept = ("defaults", "param_groups", "_settings", "_groups", "_others", "_lanes", "skipped")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take up a copy's or a pickle's state."""
        defaults = dict(state["defaults"])
        super().__setstate__(state)
        self.defaults = defaults  # torch adds an option that these optimizers do not have
        self._list_others()
