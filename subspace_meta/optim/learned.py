"""The shell with the learned optimizer inside."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor
from torch.nn import Module

from subspace_meta.adapter.base import BaseAdapter
from subspace_meta.adapter.network import Weights
from subspace_meta.geometry import Geometry
from subspace_meta.optim import construction, ranks, sharding
from subspace_meta.optim.contents import Others, Rules
from subspace_meta.optim.messages import callers_level
from subspace_meta.optim.options import refuse_unknown
from subspace_meta.optim.shell import Riemannian
from subspace_meta.optimizers.subspace import PRESETS, Adapter, SubspaceOptimizer, check_weights_kind
from subspace_meta.weights import pretrained


@dataclass(frozen=True)
class MakeLearned:
    """Makes the learned optimizer with the weights on the device and of the dtype of the parameters."""

    weights: Weights
    preset: str | Adapter

    name = "the learned optimizer"
    rate_is_a_factor = True

    def __call__(self, geometry: Geometry, like: Tensor, **options: Any) -> SubspaceOptimizer:
        """Make it."""
        weights = {name: value.to(like) for name, value in self.weights.items()}
        return SubspaceOptimizer(geometry, weights, self.preset, **options)


class SubspaceMeta(Riemannian):
    """The learned optimizer as a torch optimizer: no learning rate to choose for what it steps.

    That is the parameters on manifolds. The rest goes to AdamW at its default rate, which is seldom the best one,
    unless ``others`` says otherwise; with ``others=None`` the learned optimizer takes it too, as Euclidean matrices.

    Args:
        params, rules, others, project, check_gradients, non_finite: see :class:`Riemannian`.
        lr: a factor of the learned steps, for schedulers; a parameter group's own one is one of its other parameters'
            rate, too.
        weights: the meta-parameters; ``None``: those that ship with the preset.
        preset: what the weights belong to; see ``SubspaceOptimizer``.
        guarded: see ``SubspaceOptimizer``; needs the loss, ``step(closure)`` or ``step(loss=loss)``.
        steps: how many steps there will be, if that is known; see ``SubspaceOptimizer``. No schedule is needed then for
            the parameters on manifolds; those of ``others`` have none.
        averaging: keep averages of the iterates; :meth:`averaged` puts them into the model. See ``SubspaceOptimizer``.

    Warns:
        UserWarning: ``steps`` or ``averaging`` is given, and the weights were not trained with it.

    Raises:
        ValueError: see :class:`Riemannian`; or the weights are not the preset's. Also for an argument that there is
            not, with what would be right: the options of other optimizers are known by name.
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
        steps: int | None = None,
        averaging: bool = False,
        others: Others | None = torch.optim.AdamW,
        project: bool = True,
        check_gradients: bool = True,
        non_finite: Literal["raise", "skip"] = "raise",
        **unknown: NoReturn,
    ) -> None:
        known = [name for name in inspect.signature(SubspaceMeta).parameters if name != "unknown"]
        refuse_unknown(unknown, known, MakeLearned.name)
        if weights is None:
            if not isinstance(preset, str):
                raise ValueError("an adapter with settings of its own needs its weights")
            weights = pretrained(preset)
        check_weights_kind(weights)
        make = MakeLearned(dict(weights), preset)
        chosen = construction.settings_of(make, rules, others, project, check_gradients, non_finite)
        self._set_up(params, chosen, {"lr": lr, "guarded": guarded, "steps": steps, "averaging": averaging})
        adapter = PRESETS[preset] if isinstance(preset, str) else preset
        if steps is not None and isinstance(adapter, BaseAdapter) and not adapter.sees_budget(weights):
            warnings.warn(
                "these weights were not trained with a number of steps in sight, so steps has no effect: leave it away",
                UserWarning,
                stacklevel=callers_level(),
            )
        if averaging and isinstance(adapter, BaseAdapter) and not adapter.sees_noise(weights):
            warnings.warn(
                "these weights were not trained with averages, and hand out the iterates: leave averaging away; "
                "torch.optim.swa_utils.AveragedModel averages anything",
                UserWarning,
                stacklevel=callers_level(),
            )

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the averages of the iterates into the model, for evaluation; at the end the iterates are there again.

        Those are the averages of the parameters that the learned optimizer steps and that have had a gradient; the
        others stay as they are. What the model itself collects while it runs, as batch normalization does, belongs to
        the iterates: ``torch.optim.swa_utils.update_bn`` collects it for the averages. Of parameters that are split
        over ranks all ranks have to call this.

        Raises:
            ValueError: the optimizer keeps none (``averaging=True`` at construction), or they are in the model already.

        Example:
            >>> with optimizer.averaged():  # doctest: +SKIP
            ...     accuracy = evaluate(model)
        """
        if self._iterates is not None:
            raise ValueError("the averages are in the model already")
        contents = self._contents()
        if not any(own.options["averaging"] for own in contents.own):
            raise ValueError("there are no averages: make the optimizer with averaging=True")
        members = {name: sharding.local(p.detach()) for name, p in contents.members.items()}
        averages = ranks.averages(contents)
        self._iterates = {name: members[name].clone() for name in averages}
        try:
            for name, average in averages.items():
                members[name].copy_(average)
            yield
        finally:
            for name, iterate in self._iterates.items():
                members[name].copy_(iterate)
            self._iterates = None
