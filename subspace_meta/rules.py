"""Rules by module type: which vectors of a layer are orthonormal, or of unit length, said in words.

A rule by name sees a weight as a matrix by its shape alone. Here the layer says what its axes mean. The vectors that a
*side* names are the columns of the matrix ``(d, p)``: ``"per output"`` of ``Linear(50, 8)`` are 8 vectors of dimension
50, ``"per input"`` 50 vectors of dimension 8.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from subspace_meta.geometry import MatrixView, Rule
from subspace_meta.manifolds import Manifold, Oblique, Sphere

Chosen = Manifold | tuple[Manifold, str]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
RECURRENT = (nn.RNNBase, nn.RNNCellBase)
KNOWN: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Bilinear,
    *CONVOLUTIONS,
    *TRANSPOSED,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.MultiheadAttention,
    *RECURRENT,
)
OUTPUT, INPUT, HEAD, TOKEN, FEATURE = "per output", "per input", "per head", "per token", "per feature"


class _Weight(NamedTuple):
    """A weight of a layer: its name there, and the view of each side that it has, the usual one first."""

    name: str
    sides: dict[str, MatrixView]


def rules_for(model: nn.Module, chosen: Mapping[type[nn.Module], Chosen]) -> dict[str, Rule]:
    """Return rules for the weights of a model's layers, by the layers' types.

    Args:
        model: its modules are looked through; biases and normalisations get no rule.
        chosen: module type -> manifold, or (manifold, side). Subclasses count; of several types that fit, the most
            specific one does. Sides: ``"per output"`` and ``"per input"`` of linear, convolutional, transposed and
            recurrent layers (of each group, of each gate); ``"per token"`` and ``"per feature"`` of embeddings;
            ``"per head"`` of attention (queries, keys and values each), besides the first two. Without a side it is the
            first of these that the weight's shape can carry, per head for attention. A manifold of square matrices
            takes the recurrent weights of a recurrent layer only.

    Returns:
        Escaped parameter name -> rule, for ``Geometry.from_rules`` and the optimizers.

    Raises:
        ValueError: a key is no module type or of an unknown kind, a type matches no module, a side is unknown, a
            weight cannot carry what is asked of it, has no shape yet or is parametrized, or is tied to another layer
            with another rule.

    Example:
        >>> import torch, subspace_meta as sm
        >>> model = torch.nn.Sequential(torch.nn.Conv1d(4, 8, 3), torch.nn.Linear(50, 8))
        >>> rules = sm.rules_for(model, {torch.nn.Conv1d: sm.Stiefel(), torch.nn.Linear: (sm.Oblique(), "per input")})
        >>> print(sm.Geometry.from_rules(dict(model.named_parameters()), rules).parameters[0].words)
        8 orthonormal filters of 12
    """
    for kind in chosen:
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise ValueError(f"{kind!r} is no module type; write for instance torch.nn.Linear")
    names = {id(p): name for name, p in model.named_parameters()}
    rules: dict[str, Rule] = {}
    used: set[type[nn.Module]] = set()
    claimed: set[int] = set()  # layers that belong to one around them
    for path, module in model.named_modules():
        fitting = [kind for kind in chosen if isinstance(module, kind)]
        if not fitting or id(module) in claimed:
            used.update(fitting)
            continue
        kind = max(fitting, key=lambda kind: len(kind.__mro__))
        used.update(fitting)
        manifold, side = _manifold_and_side(kind, chosen[kind])
        if isinstance(module, nn.MultiheadAttention):
            claimed.add(id(module.out_proj))
        for weight in _weights(module, manifold):
            owner, parameter = _parameter(module, f"{path}." if path else "", weight.name)
            name = names[id(parameter)]
            rule = Rule(manifold, _view(f"{owner} ({type(module).__name__})", parameter, manifold, weight, side))
            if rules.setdefault(glob.escape(name), rule) != rule:
                raise ValueError(f"parameter {name!r} is {owner!r} as well, and the two layers have different rules")
    if idle := [kind.__name__ for kind in chosen if kind not in used]:
        there = sorted({type(module).__name__ for module in model.modules() if isinstance(module, KNOWN)})
        raise ValueError(f"the model has no {idle[0]}; of the types with known sides there are {', '.join(there)}")
    return rules


def _manifold_and_side(kind: type[nn.Module], chosen: Any) -> tuple[Manifold, str]:
    manifold, side = chosen if isinstance(chosen, tuple) and len(chosen) == 2 else (chosen, "")
    if not isinstance(manifold, Manifold) or not isinstance(side, str):
        raise ValueError(
            f"for {kind.__name__} there is {chosen!r}; write a manifold, Stiefel(), or one with a side, "
            f"(Oblique(), {OUTPUT!r})"
        )
    return manifold, side


def _parameter(module: nn.Module, prefix: str, name: str) -> tuple[str, torch.Tensor]:
    """Return the full name and the parameter of a layer's weight; ``name`` may lead into a layer inside."""
    *inside, attribute = name.split(".")
    for part in inside:
        module = getattr(module, part)
    if parametrize.is_parametrized(module, attribute):
        raise ValueError(
            f"{prefix}{name} is parametrized; remove that first, torch.nn.utils.parametrize.remove_parametrizations"
        )
    parameter: torch.Tensor = getattr(module, attribute)
    if is_lazy(parameter):
        raise ValueError(f"{prefix}{name} has no shape yet: call the model once first")
    return f"{prefix}{name}", parameter


def _view(where: str, parameter: torch.Tensor, manifold: Manifold, weight: _Weight, side: str) -> MatrixView:
    """Return the view of the side that is asked for, or of the first one that the shape can carry."""
    if side and side not in weight.sides:
        raise ValueError(f"{where} has no side {side!r}; it has {', '.join(map(repr, weight.sides))}")
    refused: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, view in weight.sides.items():
        shapes[name] = tuple(view.to_matrix(torch.empty(parameter.shape, device="meta")).shape)
        try:
            manifold.check_shape(shapes[name])
        except ValueError as error:
            refused[name] = str(error)
    able = [name for name in weight.sides if name not in refused]
    wanted = side or (able[0] if able else next(iter(weight.sides)))
    if wanted in refused:
        *_, d, p = shapes[wanted]
        way = (
            f"say {' or '.join(map(repr, able))}"
            if able
            else "give the layer another manifold, Oblique for unit vectors"
        )
        raise ValueError(
            f"{where} of shape {tuple(parameter.shape)} cannot be {manifold.name} {wanted}: {p} vectors of dimension "
            f"{d} ({refused[wanted]}); {way}"
        )
    return weight.sides[wanted]


def _weights(module: nn.Module, manifold: Manifold) -> Iterator[_Weight]:
    """Yield the weights of a layer."""
    if isinstance(module, nn.MultiheadAttention):
        yield from _attention(module)
    elif isinstance(module, RECURRENT):
        yield from _recurrent(module, manifold)
    elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
        tokens = MatrixView("t f -> f t", vectors="tokens")
        features = MatrixView("t f -> t f", vectors="features")
        # A token has a length of its own; to be orthonormal there are usually too many of them.
        unit = isinstance(manifold, Oblique | Sphere)
        yield _Weight("weight", {TOKEN: tokens, FEATURE: features} if unit else {FEATURE: features, TOKEN: tokens})
    elif isinstance(module, CONVOLUTIONS + TRANSPOSED):
        yield _Weight("weight", _convolution(module))
    elif isinstance(module, nn.Bilinear):
        yield _Weight("weight", {OUTPUT: MatrixView("o i j -> (i j) o", _sizes(j=module.in2_features), "outputs")})
    elif isinstance(module, nn.Linear):
        yield _Weight("weight", _linear("o", "i"))
    else:
        raise ValueError(
            f"no sides are known for {type(module).__name__}, only for {', '.join(k.__name__ for k in KNOWN)}; give a "
            "rule by the parameter's name"
        )


def _sizes(**sizes: int) -> tuple[tuple[str, int], ...]:
    return tuple(sizes.items())


def _linear(
    outputs: str, inputs: str, batch: str = "", sizes: tuple[tuple[str, int], ...] = ()
) -> dict[str, MatrixView]:
    """Return the sides of a weight whose rows are ``outputs``, an einops axis; one matrix for each of ``batch``."""
    left = f"({batch} {outputs}) {inputs}" if batch else f"{outputs} {inputs}"
    lead = f"{batch} " if batch else ""
    return {
        OUTPUT: MatrixView(f"{left} -> {lead}{inputs} {outputs}", sizes, "outputs"),
        INPUT: MatrixView(f"{left} -> {lead}{outputs} {inputs}", sizes, "inputs"),
    }


def _convolution(module: nn.Module) -> dict[str, MatrixView]:
    """Return the sides of a convolution: of each group a matrix, if there are several."""
    kernel = tuple(module.kernel_size)  # type: ignore[arg-type]
    groups = int(module.groups)  # type: ignore[arg-type]
    taps = [f"k{axis}" for axis in range(len(kernel))]
    inside = " ".join(taps)
    transposed = isinstance(module, TRANSPOSED)
    first, second = ("i", "o") if transposed else ("o", "i")
    left = f"(g {first}) {second} {inside}" if groups > 1 else f"{first} {second} {inside}"
    lead = "g " if groups > 1 else ""
    sizes = (*zip(taps, kernel, strict=True), *([("g", groups)] if groups > 1 else []))
    # What einops cannot infer when the matrix is turned back.
    channels = {"o": int(module.out_channels), "i": int(module.in_channels)}  # type: ignore[arg-type]
    sizes = (*sizes, *((axis, count // groups) for axis, count in channels.items()))
    return {
        OUTPUT: MatrixView(f"{left} -> {lead}(i {inside}) o", sizes, "filters"),
        INPUT: MatrixView(f"{left} -> {lead}(o {inside}) i", sizes, "inputs"),
    }


def _attention(module: nn.MultiheadAttention) -> Iterator[_Weight]:
    """Yield queries, keys, values, packed or not, and the output projection, whose inputs are the heads'."""
    heads = int(module.num_heads)
    if module.in_proj_weight is not None:
        per_head = MatrixView("(q h k) m -> q h m k", _sizes(q=3, h=heads), "outputs of a head")
        yield _Weight("in_proj_weight", {HEAD: per_head, **_linear("o", "m", "q", _sizes(q=3))})
    else:
        for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
            per_head = MatrixView("(h k) m -> h m k", _sizes(h=heads), "outputs of a head")
            yield _Weight(name, {HEAD: per_head, **_linear("o", "m")})
    out = MatrixView("o (h k) -> h o k", _sizes(h=heads), "inputs of a head")
    yield _Weight("out_proj.weight", {HEAD: out, **_linear("o", "i")})


def _recurrent(module: nn.Module, manifold: Manifold) -> Iterator[_Weight]:
    """Yield input and recurrent weights, a matrix a gate; recurrent ones only for a manifold of square matrices."""
    gates = 4 if isinstance(module, nn.LSTM | nn.LSTMCell) else 3 if isinstance(module, nn.GRU | nn.GRUCell) else 1
    try:
        manifold.check_shape((5, 3))
        square = False
    except ValueError:
        square = True
    for name, parameter in module.named_parameters(recurse=False):
        if not name.startswith("weight") or parameter.ndim != 2 or (square and not name.startswith("weight_hh")):
            continue
        count = 1 if name.startswith("weight_hr") else gates
        yield _Weight(name, _linear("h", "i", "g", _sizes(g=count)) if count > 1 else _linear("h", "i"))
