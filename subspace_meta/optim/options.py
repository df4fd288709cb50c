"""Which keys a parameter group has, and what becomes of each: one table, read by checks, errors and tests.

The options of an optimizer are its settings, the fields of its frozen value object. Each parameter group has all of
them, as torch's optimizers have, and each step reads them, so a scheduler may change any. A key that nobody would read
is refused, at construction and at the next step alike: an option that is ignored without a word is a wrong result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor

PARAMETERS = ("params", "param_names")
# What torch's schedulers and averaging write into parameter groups for themselves.
SCHEDULERS = ("initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr")
# Fields of value objects that say what is optimized and with which meta-parameters, not how.
FIXED = ("geometry", "weights", "preset")
HINTS = {
    "weight_decay": "it has no meaning on a manifold: columns of unit length cannot decay; of the other parameters it "
    "is a setting of others=..., for instance functools.partial(torch.optim.AdamW, weight_decay=1e-2)",
    "maximize": "negate the loss",
    "rule": "rules are an argument of the optimizer, for all groups",
    "rules": "they are an argument of the optimizer, for all groups",
    "manifold": "manifolds are given by rules, an argument of the optimizer",
}


def options(optimizer: Any) -> dict[str, Any]:
    """Return the options of a hand-made or learned optimizer (a class or an object) with their values.

    Those without a default, of a class, are ``dataclasses.MISSING``.

    Example:
        >>> import subspace_meta as sm
        >>> sm.optim.options(sm.RAdam)["betas"]
        (0.9, 0.999)
    """
    made = not isinstance(optimizer, type)
    return {
        field.name: getattr(optimizer, field.name) if made else field.default
        for field in dataclasses.fields(optimizer)
        if field.init and field.name not in FIXED
    }


def refuse_unknown(given: Iterable[str], known: Collection[str], owner: str, names: Collection[str] = ()) -> None:
    """Raise ``ValueError`` naming the first key that is no option, the parameters of its group, and what there is.

    Without ``names`` the keys are a constructor's arguments, which schedulers do not write.
    """
    free = (*PARAMETERS, *SCHEDULERS) if names else ()
    for key in given:
        if key not in known and key not in free:
            hint = f": {HINTS[key]}" if key in HINTS else ""
            first = ", ".join(map(repr, list(names)[:3])) + (", ..." if len(names) > 3 else "")
            where = f" (parameter group of {first})" if names else ""
            raise ValueError(f"{key!r} is no option of {owner}{where}{hint}; there are {', '.join(sorted(known))}")


def check_rate_kind(lr: Any) -> None:
    """Raise ``ValueError`` unless a learning rate is a number or a scalar tensor; optimizers look at its range."""
    if isinstance(lr, bool) or not isinstance(lr, int | float | Tensor) or (isinstance(lr, Tensor) and lr.numel() != 1):
        got = "a dict; meta-parameters are the argument weights=" if isinstance(lr, Mapping) else f"{lr!r:.60}"
        raise ValueError(f"lr must be a number or a scalar tensor, got {got}")


def changed(optimizer: Any, group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options whose values in a parameter group are not those of the optimizer."""

    def differs(old: Any, new: Any) -> bool:
        return old is not new and (isinstance(old, Tensor) or isinstance(new, Tensor) or old != new)

    return {key: group[key] for key, value in options(optimizer).items() if differs(value, group[key])}
