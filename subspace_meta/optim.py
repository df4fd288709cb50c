"""Every optimizer of this library as a ``torch.optim.Optimizer``: for models, ``loss.backward()`` and schedulers.

The shell keeps tensors and names together, and nothing else: each step is the functional optimizer's, bit for bit. The
parameters on manifolds are those that a rule names; the others go to another torch optimizer (AdamW unless told
otherwise), which is stepped along, so that one object serves the whole model. Parameters stay plain
``torch.nn.Parameter``: no parametrization, nothing to remove before saving the model.

What the words of torch.optim mean here:

* ``lr``: of a hand-made optimizer its learning rate; of the learned one a factor of its steps, 1 unless a scheduler
  changes it. The other optimizer has its own.
* weight decay: refused on parameter groups here. Columns of unit length cannot decay, and on other manifolds there is
  no zero to decay to. The other optimizer has its own.
* parameters that need no gradient are left alone; one without a gradient in a step stays where it is in that step (if
  it had gradients before, its state sees a zero one).
* clipping by a global norm changes what the hand-made optimizers see; of the learned one it changes the next few steps
  little, and a constant factor nothing.
"""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import glob
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.utils import _pytree as pytree

from subspace_meta._tracing import is_compiling
from subspace_meta.adapter.network import Weights
from subspace_meta.geometry import Geometry, Rule
from subspace_meta.manifolds import Euclidean, Manifold
from subspace_meta.optimizers.base import Optimizer
from subspace_meta.optimizers.subspace import Adapter, SubspaceOptimizer
from subspace_meta.weights import pretrained

Rules = Mapping[str, Manifold | Rule]
Make = Callable[..., Optimizer]  # (geometry, lr=...) -> functional optimizer
Others = Callable[..., torch.optim.Optimizer]  # (list of parameters) -> torch optimizer
FEASIBLE = 1e-5  # a larger violation at construction is mended, with a warning
FORMAT = 1


class ProjectionWarning(UserWarning):
    """Parameters were moved to the nearest point of their manifolds."""


@dataclass
class _Cohort:
    """The functional optimizer and state of parameters of one device and dtype whose gradients first came together."""

    optimizer: Any  # an Optimizer, frozen, with the setting lr
    state: Any

    def saved(self) -> dict[str, Any]:
        leaves = [_cloned(leaf) for leaf in pytree.tree_leaves(self.state)]
        return {"names": list(self.optimizer.geometry.names), "leaves": leaves}

    def set_rate(self, lr: float | Tensor) -> None:
        if lr is not self.optimizer.lr:
            self.optimizer = dataclasses.replace(self.optimizer, lr=lr)


@dataclass
class _Group:
    """What the shell keeps for one of its parameter groups."""

    geometry: Geometry
    cohorts: list[_Cohort] = field(default_factory=list)


@dataclass(frozen=True)
class _Subspace:
    """Makes the learned optimizer with the weights on the device and of the dtype of the parameters."""

    weights: Weights
    preset: str | Adapter
    guarded: bool

    def __call__(self, geometry: Geometry, lr: float | Tensor, like: Tensor) -> SubspaceOptimizer:
        weights = {name: value.to(like) for name, value in self.weights.items()}
        return SubspaceOptimizer(geometry, weights, self.preset, self.guarded, lr)


@dataclass(frozen=True)
class _HandMade:
    """Makes a hand-made optimizer."""

    make: Make
    settings: dict[str, Any]

    def __call__(self, geometry: Geometry, lr: float | Tensor, like: Tensor) -> Optimizer:
        return self.make(geometry, lr=lr, **self.settings)


class Riemannian(torch.optim.Optimizer):
    """A functional optimizer of this library as a torch optimizer.

    Args:
        params: a module, an iterable of ``(name, parameter)``, or of parameter groups: dicts with such an iterable
            (or a module) as ``"params"``, and ``"lr"`` if it is not the common one.
        rules: glob pattern of names -> manifold or ``Rule``, as for ``Geometry.from_rules``.
        optimizer: the class of a hand-made optimizer, ``sm.RAdam`` for instance.
        lr: its learning rate; a float or a scalar tensor.
        others: ``(list of parameters) -> torch optimizer``, for what is on no manifold; ``None``: this one takes them,
            as matrices of Euclidean space.
        project: move weights that are off their manifold by more than 1e-5 to its nearest point, with a warning that
            names them; otherwise they are refused at their first step.
        check_gradients: raise before anything is changed if a gradient is not finite. On a device that waits for it.
        settings: further ones of ``optimizer``.

    Raises:
        ValueError: names are missing or twice there, a rule matches nothing, no parameter is on a manifold, a shape
            or dtype cannot carry its manifold, a setting is out of its range, or a parameter is sharded.
    """

    def __init__(
        self,
        params: Module | Iterable[Any],
        rules: Rules,
        optimizer: Make,
        lr: float | Tensor,
        *,
        others: Others | None = torch.optim.AdamW,
        project: bool = True,
        check_gradients: bool = True,
        **settings: Any,
    ) -> None:
        self._set_up(params, rules, _HandMade(optimizer, settings), lr, others, project, check_gradients)

    def _set_up(
        self,
        params: Module | Iterable[Any],
        rules: Rules | None,
        make: _HandMade | _Subspace,
        lr: float | Tensor,
        others: Others | None,
        project: bool,
        check_gradients: bool,
    ) -> None:
        self._make, self._make_others, self._project, self._check = make, others, project, check_gradients
        self._groups: list[_Group] = []  # in the order of this optimizer's own groups within param_groups
        self._others: torch.optim.Optimizer | None = None
        self._rules = dict(rules or {})
        groups = _named_groups(params)
        everything = {name: p for group in groups for name, p in group["params"]}
        if sum(len(group["params"]) for group in groups) != len(everything):
            raise ValueError("a parameter's name is in two groups")
        geometry = Geometry.from_rules(everything, self._rules)
        if others is not None and all(isinstance(p.manifold, Euclidean) for p in geometry.parameters):
            raise ValueError("no parameter is on a manifold: give rules, or others=None if this optimizer takes all")
        super().__init__(groups, {"lr": lr})

    @property
    def others(self) -> torch.optim.Optimizer | None:
        """The optimizer of the parameters that are on no manifold."""
        return self._others

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, named as in the constructor; the constructor's rules hold for them.

        Raises:
            ValueError: see the constructor; also if weight decay is asked for, or a name is already there.
        """
        group = dict(param_group)
        named = {name: p for name, p in _named(group.pop("params")) if p.requires_grad}
        if group.get("weight_decay"):
            raise ValueError(
                f"weight_decay={group['weight_decay']} has no meaning on a manifold; of the other parameters it is a "
                "setting of others=..., for instance functools.partial(torch.optim.AdamW, weight_decay=1e-2)"
            )
        if not named:
            raise ValueError("a parameter group has no parameter that needs a gradient")
        for name, p in named.items():
            if hasattr(p, "placements"):
                raise ValueError(
                    f"parameter {name!r} is sharded; a retraction needs whole matrices: keep the layers on manifolds "
                    "out of sharding (replicated, as under DistributedDataParallel)"
                )
        taken = {name for own in self._groups for name in own.geometry.names}
        if twice := sorted(taken & named.keys()):
            raise ValueError(f"parameters {twice} are already in a group")
        if len({id(p) for p in named.values()}) < len(named):
            raise ValueError("one parameter is there under two names; model.named_parameters() gives each once")
        rules = {pattern: rule for pattern, rule in self._rules.items() if _matches(pattern, named)}
        geometry = Geometry.from_rules(named, rules)
        curved = [p.name for p in geometry.parameters if not isinstance(p.manifold, Euclidean)]
        own = geometry.names if self._make_others is None else tuple(curved)
        if own:
            geometry = _subset(geometry, named, own)
            # What is wrong is found before anything is changed.
            geometry.check_points({name: named[name] for name in own})
            self._make(geometry, group.get("lr", self.defaults["lr"]), named[own[0]])
            if self._project:
                _move_to_manifold(geometry, {name: named[name] for name in own})
            super().add_param_group({**group, "params": [named[name] for name in own]})
            self.param_groups[-1]["names"] = list(own)
            self._groups.append(_Group(geometry))
            # This optimizer's groups come first: they are told from the other's by their place.
            self.param_groups.insert(len(self._groups) - 1, self.param_groups.pop())
        if rest := [p for name, p in named.items() if name not in own]:
            self._add_to_others(rest)

    def _add_to_others(self, parameters: list[Parameter]) -> None:
        if self._others is None:
            assert self._make_others is not None
            self._others = self._make_others(parameters)
        else:
            self._others.add_param_group({"params": parameters})
        # The same dict objects: what a scheduler or GradScaler does to one is done to the other.
        self.param_groups[len(self._groups) :] = self._others.param_groups

    @torch.no_grad()
    def step(  # type: ignore[override]  # torch's overloads know no loss, and floats only
        self, closure: Callable[[], Tensor] | None = None, *, loss: Tensor | None = None
    ) -> Tensor | None:
        """Take one step along the gradients of the parameters.

        Args:
            closure: computes the loss and its gradients anew, and returns the loss; called once.
            loss: the loss at the parameters, for ``guarded`` where there is no closure.

        Returns:
            What the closure returned.

        Raises:
            ValueError: a gradient is sparse or not finite (nothing is changed then), a parameter is off its manifold
                at its first step, or a guarded optimizer is given no loss.
        """
        returned = None
        if closure is not None:
            with torch.enable_grad():
                returned = loss = closure()
        if loss is None and isinstance(self._make, _Subspace) and self._make.guarded:
            raise ValueError("guarded=True watches the loss: give it, step(closure) or step(loss=loss)")
        for cohort, params, grads in self._prepare():
            cohort.state = _advance(cohort.optimizer, grads, cohort.state, params, loss)
        if self._others is not None:
            self._others.step()
        return returned

    @torch._disable_dynamo  # type: ignore[attr-defined]  # torch.compiler.disable would import the compiler
    def _prepare(self) -> list[tuple[_Cohort, dict[str, Tensor], dict[str, Tensor | None]]]:
        """Look at the gradients, start the state of parameters that have their first, and return what is to be done.

        Plain Python about names and values: ``torch.compile(optimizer.step)`` compiles what comes after it.
        """
        if self._check:
            self._refuse_bad_gradients()
        todo = []
        for own, group, named in self._own():
            seen = {name for cohort in own.cohorts for name in cohort.optimizer.geometry.names}
            fresh: dict[tuple[torch.device, torch.dtype], list[str]] = {}
            for name, p in named.items():
                if name not in seen and p.grad is not None:
                    fresh.setdefault((p.device, p.dtype), []).append(name)
            for names in fresh.values():
                params = {name: named[name].detach() for name in names}
                geometry = _subset(own.geometry, params, names)
                optimizer = self._make(geometry, group["lr"], params[names[0]])
                own.cohorts.append(_Cohort(optimizer, optimizer.init(params)))
            for cohort in own.cohorts:
                cohort.set_rate(group["lr"])
                grads = {name: named[name].grad for name in cohort.optimizer.geometry.names}
                if any(grad is not None for grad in grads.values()):
                    todo.append((cohort, {name: named[name].detach() for name in grads}, grads))
        return todo

    def _refuse_bad_gradients(self) -> None:
        gradients = {name: p.grad for *_, named in self._own() for name, p in named.items() if p.grad is not None}
        for name, gradient in gradients.items():
            if gradient.is_sparse:
                raise ValueError(f"the gradient of {name!r} is sparse; a parameter on a manifold needs a dense one")
        if bad := _not_finite(gradients):
            raise ValueError(f"the gradients of {bad} are not finite; nothing was changed")

    def check(self, tolerance: float = 1e-3) -> dict[str, float]:
        """Return the constraint violation of every parameter on a manifold.

        Raises:
            ValueError: one is above ``tolerance`` or not finite.
        """
        found: dict[str, float] = {}
        for own, _, named in self._own():
            params = _detached(named)
            own.geometry.check_feasible(params, tolerance)
            found.update(own.geometry.violation(params))
        return found

    def _own(self) -> Iterator[tuple[_Group, dict[str, Any], dict[str, Parameter]]]:
        """Yield this optimizer's groups, the first ones of ``param_groups``, with their parameters by name."""
        for own, group in zip(self._groups, self.param_groups, strict=False):
            yield own, group, dict(zip(group["names"], group["params"], strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Return copies of state and settings, tensors in plain Python: for ``torch.save``."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        settings = [
            {key: _cloned(value) for key, value in group.items() if key != "params"}
            for group in self.param_groups[: len(self._groups)]
        ]
        state = [[cohort.saved() for cohort in own.cohorts] for own in self._groups]
        others = None if self._others is None else copy.deepcopy(self._others.state_dict())
        saved: dict[str, Any] = {"format": FORMAT, "state": state, "param_groups": settings, "others": others}
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, saved)
            saved = saved if changed is None else changed
        return saved

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; tensors are brought to the parameters' device and dtype.

        Raises:
            ValueError: it is of another optimizer, other parameters or shapes; nothing is changed then.
        """
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        if state_dict.get("format") != FORMAT or not {"state", "param_groups", "others"} <= state_dict.keys():
            raise ValueError("this is no state_dict of an optimizer of subspace_meta.optim")
        settings, states = state_dict["param_groups"], state_dict["state"]
        own_names = [list(own.geometry.names) for own in self._groups]
        if [group["names"] for group in settings] != own_names:
            raise ValueError(f"the groups are {[group['names'] for group in settings]}, this optimizer has {own_names}")
        if (state_dict["others"] is None) != (self._others is None):
            raise ValueError("only one of the two has an optimizer of other parameters")
        loaded = []
        for (own, _, named), cohorts, new in zip(self._own(), states, settings, strict=True):
            loaded.append([self._loaded(own, _detached(named), cohort, new["lr"]) for cohort in cohorts])
        if self._others is not None:
            self._others.load_state_dict(copy.deepcopy(state_dict["others"]))
            self.param_groups[len(self._groups) :] = self._others.param_groups
        for (own, group, _), cohorts, new in zip(self._own(), loaded, settings, strict=True):
            own.cohorts = cohorts
            group.update({key: _cloned(value) for key, value in new.items()})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _loaded(self, own: _Group, params: dict[str, Tensor], cohort: Mapping[str, Any], lr: Any) -> _Cohort:
        geometry = _subset(own.geometry, params, cohort["names"])
        chosen = {name: params[name] for name in geometry.names}
        like = next(iter(chosen.values()))
        optimizer = self._make(geometry, lr, like)
        leaves, structure = pytree.tree_flatten(optimizer.init(chosen))
        if [tuple(leaf.shape) for leaf in leaves] != [tuple(leaf.shape) for leaf in cohort["leaves"]]:
            raise ValueError(f"the state of {cohort['names']} is of another optimizer or of other settings")
        fitted = [
            _cloned(given).to(leaf.device, leaf.dtype) for leaf, given in zip(leaves, cohort["leaves"], strict=True)
        ]
        return _Cohort(optimizer, pytree.tree_unflatten(fitted, structure))

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles need; hooks stay behind, as those of torch's optimizers."""
        kept = ("_make", "_make_others", "_project", "_check", "_groups", "_others", "_rules")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take up a copy's or a pickle's state."""
        super().__setstate__(state)
        if self._others is not None:
            self.param_groups[len(self._groups) :] = self._others.param_groups


class SubspaceMeta(Riemannian):
    """The learned optimizer as a torch optimizer: no learning rate to choose.

    Args:
        params, rules, others, project, check_gradients: see :class:`Riemannian`.
        lr: a factor of the learned steps, for schedulers.
        weights: the meta-parameters; ``None``: those that ship with the preset.
        preset: what the weights belong to; see ``SubspaceOptimizer``.
        guarded: see ``SubspaceOptimizer``; needs the loss, ``step(closure)`` or ``step(loss=loss)``.

    Raises:
        ValueError: see :class:`Riemannian`; or the weights are not the preset's.
    """

    def __init__(
        self,
        params: Module | Iterable[Any],
        rules: Rules | None = None,
        lr: float | Tensor = 1.0,
        *,
        weights: Weights | None = None,
        preset: str | Adapter = "base",
        guarded: bool = False,
        others: Others | None = torch.optim.AdamW,
        project: bool = True,
        check_gradients: bool = True,
    ) -> None:
        if weights is None:
            if not isinstance(preset, str):
                raise ValueError("an adapter with settings of its own needs its weights")
            weights = pretrained(preset)
        make = _Subspace(dict(weights), preset, guarded)
        self._set_up(params, rules, make, lr, others, project, check_gradients)


def _advance(
    optimizer: Any, grads: dict[str, Tensor | None], state: Any, params: dict[str, Tensor], loss: Tensor | None
) -> Any:
    """Write one step of a functional optimizer over ``params``; return the new state."""
    kept = {name: params[name].clone() for name, grad in grads.items() if grad is None}
    filled = {name: torch.zeros_like(params[name]) if grad is None else grad for name, grad in grads.items()}
    value = None if loss is None else torch.as_tensor(loss).detach()
    if isinstance(optimizer, SubspaceOptimizer) and not is_compiling():
        state = optimizer.update_(filled, state, params, value)
    else:
        moved, state = optimizer.update(filled, state, params, value)
        for name, tensor in moved.items():
            params[name].copy_(tensor)
    for name, tensor in kept.items():
        params[name].copy_(tensor)
    return state


def _matches(pattern: str, named: Mapping[str, Any]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in named)


def _subset(geometry: Geometry, params: Mapping[str, Tensor], names: Collection[str]) -> Geometry:
    """Return the geometry of some of the parameters, in the same order."""
    chosen = [p for p in geometry.parameters if p.name in names]
    rules = {glob.escape(p.name): Rule(p.manifold, p.view) for p in chosen}
    return Geometry.from_rules({p.name: params[p.name] for p in chosen}, rules)


def _detached(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in named.items()}


def _cloned(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _named(params: Any) -> list[tuple[str, Parameter]]:
    """Return names and parameters of a module or an iterable of pairs."""
    if isinstance(params, Module):
        return list(params.named_parameters())
    if isinstance(params, Mapping):
        params = params.items()
    named = []
    for entry in params:
        if not (isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str)):
            raise ValueError(
                f"rules need names: give the module, or model.named_parameters(), not {type(entry).__name__} objects"
            )
        named.append(entry)
    return named


def _named_groups(params: Any) -> list[dict[str, Any]]:
    """Return parameter groups whose ``"params"`` are lists of pairs."""
    entries = params if isinstance(params, Module | Mapping) else list(params)
    if not isinstance(entries, Module | Mapping) and entries and all(isinstance(e, dict) for e in entries):
        return [{**entry, "params": _named(entry["params"])} for entry in entries]
    return [{"params": _named(entries)}]


def _not_finite(tensors: Mapping[str, Tensor]) -> str:
    """Return the quoted names of the tensors that are not finite, or an empty string."""
    return ", ".join(repr(name) for name, tensor in tensors.items() if not torch.isfinite(tensor).all())


@torch.no_grad()
def _move_to_manifold(geometry: Geometry, params: Mapping[str, Parameter]) -> None:
    """Move parameters that are off their manifolds to the nearest point, and say so."""
    violations = geometry.violation(params)
    off = {name: value for name, value in violations.items() if not value <= FEASIBLE}
    if not off:
        return
    start = {name: params[name] for name in off}
    if bad := _not_finite(start):
        raise ValueError(f"the parameters {bad} are not finite")
    moving = _subset(geometry, params, off)
    nearest = moving.project(start)
    moving.check_feasible(nearest)
    for name, value in nearest.items():
        params[name].copy_(value)
    worst = max(off, key=lambda name: off[name])
    shown = ", ".join(sorted(off)[:5]) + (f" and {len(off) - 5} more" if len(off) > 5 else "")
    warnings.warn(
        f"moved to the nearest point of their manifolds: {shown} (largest violation {off[worst]:.1e}, {worst})",
        ProjectionWarning,
        stacklevel=7,
    )
