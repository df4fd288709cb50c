"""``torch.compile`` for the blocks of an inner loop, with two rewritings of the compiler's graph.

Losses, geometry and their derivatives bring both patterns again and again, so the graph is rewritten, not the source.
Measured on one core of a CPU with 16 floats in a register:

* Batched products of small matrices with fewer than 16 columns run at a quarter of the speed of their transposes in the
  library that torch uses: 16 products of 64 x 64 with 64 x 8 take 73 us, as (B^T A^T)^T they take 20 us.
* The vectorised tanh takes four times as long as the sigmoid. In float32 tanh(x) = 2 sigmoid(2x) - 1 is as good in
  absolute error (1e-7), which is what an LSTM cell needs.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import types
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
from torch.utils import _pytree as pytree

_NARROW = 16  # columns; from there on the two orders take the same time
_count = itertools.count()

Block = TypeVar("Block", bound=Callable[..., Any])


def rewrite(graph: torch.fx.Graph) -> None:
    """Transpose narrow batched products, ``(b, m, k)`` by ``(b, k, n)`` with n < 16 and 2n <= m; replace tanh."""
    aten = torch.ops.aten

    def put(target: Any, *args: Any) -> torch.fx.Node:
        new = graph.call_function(target, args)
        new.meta["val"] = target(*(arg.meta["val"] if isinstance(arg, torch.fx.Node) else arg for arg in args))
        return new

    for node in [*graph.find_nodes(op="call_function", target=aten.bmm.default)]:
        value = node.meta["val"]
        if value.device.type != "cpu" or value.shape[-1] >= _NARROW or 2 * value.shape[-1] > value.shape[-2]:
            continue
        with value.fake_mode, graph.inserting_before(node):
            right, left = (put(aten.permute.default, side, [0, 2, 1]) for side in node.args)
            node.replace_all_uses_with(put(aten.permute.default, put(aten.bmm.default, left, right), [0, 2, 1]))
        graph.erase_node(node)
    for node in [*graph.find_nodes(op="call_function", target=aten.tanh.default)]:
        value = node.meta["val"]
        if value.device.type != "cpu" or value.dtype != torch.float32:
            continue
        with value.fake_mode, graph.inserting_before(node):
            doubled = put(aten.mul.Tensor, node.args[0], 2.0)
            node.replace_all_uses_with(
                put(aten.sub.Tensor, put(aten.mul.Tensor, put(aten.sigmoid.default, doubled), 2.0), 1.0)
            )
        graph.erase_node(node)


class _WithoutFallbackNotes(logging.Filter):
    """Drop the compiler's remark that factorisations are called through a slower door; nobody can act on it."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "missing a c-shim implementation" not in record.getMessage()


def _options(device: str) -> dict[str, Any]:
    """Return options of the compiler; all of these are about what was measured on a CPU."""
    if device != "cpu":
        return {}
    try:
        from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
    except ImportError:  # an older torch: slower, the same results
        return {}

    class Rewrite(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            rewrite(graph)

        def uuid(self) -> Any:
            """Identify this code to the compiler's cache."""
            return get_hash_for_files((__file__,))

    logging.getLogger("torch._inductor.ir").addFilter(_NOTES)
    options = {
        "post_grad_custom_post_pass": Rewrite(),
        # On small matrices a wrapper in Python takes as long as the kernels that it calls. In C++ it is compiled apart
        # from them, and less optimized: a fifth of the time to compile.
        "cpp_wrapper": True,
        "cpp_wrapper_build_separate": True,
        # Checks of what the compiler itself allocated.
        "size_asserts": False,
        "alignment_asserts": False,
        # A trial of the vector instructions in three more compilations and processes, 8 s; the processor's own flags
        # have been looked at before.
        "cpp.vec_isa_ok": True,
    }
    known = torch._inductor.config.get_config_copy()
    return {name: value for name, value in options.items() if name in known}


_NOTES = _WithoutFallbackNotes()


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """Pause Python's garbage collector: a tracer makes millions of objects and few cycles; a fifth of a warm start."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def compile_block(function: Block) -> Block:
    """Compile a function as one graph for fixed shapes.

    Functions made by the same ``def`` share a code object, and with it the compiler's limit on the number of graphs:
    each gets its own here. The compiler's options are those for the device of the first call's tensors.
    """
    assert isinstance(function, types.FunctionType)
    own = types.FunctionType(
        function.__code__.replace(co_name=f"{function.__name__}_{next(_count)}"),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    compiled: Callable[..., Any] | None = None

    def call(*arguments: Any) -> Any:
        nonlocal compiled
        if compiled is not None:
            return compiled(*arguments)
        device = next(leaf.device.type for leaf in pytree.tree_flatten(arguments)[0] if isinstance(leaf, torch.Tensor))
        with _without_collection():  # the compiler is imported here
            first = torch.compile(own, fullgraph=True, dynamic=False, options=_options(device))
            result = first(*arguments)
        compiled = first
        return result

    return cast(Block, call)
