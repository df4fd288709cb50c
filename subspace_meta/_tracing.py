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


def known_true(condition: Tensor) -> bool:
    """Return whether ``condition`` holds everywhere, where reading that costs nothing; ``False`` where it is unknown.

    It is known for plain CPU tensors only; a device would have to wait. So it may choose a cheaper way to the same
    result, never another result.
    """
    return has_values(condition) and condition.device.type == "cpu" and bool(condition.all())
