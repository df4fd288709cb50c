"""Whether values can be looked at here: not in a trace, and not under a ``torch.func`` transform."""

from __future__ import annotations

import torch
from torch import Tensor

# torch.compiler.is_compiling came with torch 2.3. torch._dynamo is a slow import, so it is touched only where needed.
is_compiling = torch.compiler.is_compiling if hasattr(torch.compiler, "is_compiling") else torch._dynamo.is_compiling


def has_values(*tensors: Tensor) -> bool:
    """Return whether all tensors are plain ones with values, so that a Python condition on them is meaningful."""
    if is_compiling():
        return False
    return not any(
        torch._C._functorch.is_functorch_wrapped_tensor(tensor) or type(tensor) not in (Tensor, torch.nn.Parameter)
        for tensor in tensors
    )


def values_at_hand(*tensors: Tensor) -> bool:
    """Return whether reading the tensors costs nothing: they have values and are on a CPU; a device would have to wait.

    Then a cheaper way to the *same* result may be chosen by looking, never another result.
    """
    return has_values(*tensors) and all(tensor.device.type == "cpu" for tensor in tensors)


def known_true(condition: Tensor) -> bool:
    """Return whether ``condition`` holds everywhere, where reading that costs nothing; ``False`` where it is unknown.

    See :func:`values_at_hand`.
    """
    return values_at_hand(condition) and bool(condition.all())
