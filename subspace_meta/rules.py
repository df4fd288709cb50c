"""Rules by module type, with the side that is orthonormal or of unit length in words.

A weight is a linear map, and its vectors can be taken per output, per input, per token, and so on. :func:`rules_for`
knows how the layers of ``torch.nn`` store their weights, and gives each one the :class:`~subspace_meta.MatrixView`
whose columns are the vectors that are asked for. What it returns is an ordinary dict for ``Geometry.from_rules``.
"""

from __future__ import annotations

import fnmatch
import glob
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from subspace_meta.geometry import MatrixView, ParameterGeometry, Rule
from subspace_meta.manifolds import (
    SPD,
    Grassmann,
    Manifold,
    Oblique,
    Orthogonal,
    Rotations,
    Sphere,
    Stiefel,
    StiefelCanonical,
)

SIDES = ("output", "input", "tap", "token", "feature", "head")
RECURRENT = (nn.RNNBase, nn.RNNCellBase)
EMBEDDING = (nn.Embedding, nn.EmbeddingBag)
KNOWN = (nn.Linear, nn.Bilinear, _ConvNd, *EMBEDDING, nn.MultiheadAttention, *RECURRENT)

Asked = Manifold | tuple[Manifold, str] | tuple[Manifold, str, int] | None
Layers = Mapping[type[nn.Module] | str, Asked]
Axes = tuple[str, str, str]  # of the batch, of a vector, and those that count the vectors


@dataclass(frozen=True)
class _Weight:
    """How a module stores a weight: its name there, its axes and their sizes, and the matrix of every side.

    Sides stand in the order in which they are tried where none is asked for.
    """

    name: str
    axes: str
    sizes: dict[str, int]
    sides: dict[str, Axes]
    zero_row: int | None = None  # of an embedding whose padding_idx stays zero
    recurrent: bool = False


class _Per(NamedTuple):
    """What is asked of a layer; without a side, on its own one. One that no layer has is as it was written."""

    manifold: Manifold
    side: str = ""
    heads: int = 0


def rules_for(model: nn.Module, layers: Layers) -> dict[str, Rule]:
    """Return rules for the weights of a model's layers, by their types.

    Args:
        model: the module whose ``named_parameters()`` the rules are for.
        layers: type of module, or glob pattern of module names -> a manifold, or (manifold, side), or ``None`` for no
            rule, a container's name with ``None`` for all that is in it. Subclasses match as well; the most specific
            type counts; names come before types, and of several the first. Biases and normalisation never get a rule.

    Sides, each of which says what has a vector of its own: ``"per output"`` (a row of a linear layer, a filter),
    ``"per input"`` (a column; of a convolution all that one input channel meets), ``"per tap"`` (of a convolution: what
    one place of the kernel on one input channel gives to the outputs), ``"per token"`` and ``"per feature"`` (a row and
    a column of an embedding), ``"per head"`` (the dimensions of a head, a matrix for each; of a linear layer
    ``(manifold, "per head", heads)``). The vectors are the columns of the manifold's matrix; on a ``Sphere`` each of
    them is a point, or each head. Without a side it is the layer's first one that can carry the manifold.

    Returns:
        A dict parameter name -> :class:`~subspace_meta.Rule`; brackets in names are escaped.

    Raises:
        ValueError: a key matches no module, none whose weights are known, or none that other keys leave to it; a weight
            cannot carry what is asked of it, is parametrized, or has no shape yet; two modules share a weight and ask
            for different things.

    Example:
        >>> import subspace_meta as sm
        >>> model = nn.Sequential(nn.Conv1d(4, 8, 3), nn.Linear(50, 8))
        >>> rules = sm.rules_for(model, {nn.Conv1d: sm.Stiefel(), nn.Linear: (sm.Oblique(), "per input")})
        >>> geometry = sm.Geometry.from_rules(dict(model.named_parameters()), rules)
        >>> [parameter.words for parameter in geometry.parameters if "weight" in parameter.name]
        ['8 orthonormal filters of 12', '50 unit inputs of 8']
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"rules_for takes the module itself, got {type(model).__name__}")
    modules = dict(model.named_modules(remove_duplicate=False))
    asked = _checked(modules, layers)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    padding = {id(m._parameters.get("weight")): m.padding_idx for m in modules.values() if isinstance(m, EMBEDDING)}
    found: dict[str, tuple[Rule, str]] = {}
    decided: set[object] = set()
    for name, module in modules.items():
        if not isinstance(module, KNOWN):
            continue
        key = _key(name, modules, layers)
        per = None if key is None else asked[key]
        decided.add(key)
        if per is None:
            continue
        attention = _attention_of(name, modules)
        # An output projection is one of its attention's weights, unless it is asked for as the linear layer that it is.
        plain = isinstance(key, type) and (attention is None or _key(attention, modules, layers) is None)
        for weight in _weights(module, None if attention is None or plain else modules[attention], per):
            if isinstance(module, RECURRENT) and _is_square(per.manifold) and not weight.recurrent:
                continue  # only a state that is mapped to itself has square matrices by its nature
            path = f"{name}.{weight.name}" if name else weight.name
            shape = tuple((parameter := _parameter(module, weight.name, path)).shape)
            weight = replace(weight, zero_row=padding.get(id(parameter)))
            what = f"{path!r} ({type(module).__name__}, shape {' x '.join(map(str, shape))})"
            rule = _rule(weight, per, shape, what, name)
            earlier, there = found.setdefault(names[id(parameter)], (rule, path))
            if _meaning(earlier) != _meaning(rule):
                raise ValueError(
                    f"{there!r} and {path!r} are one parameter, and their rules differ: {_said(earlier, shape)}, and "
                    f"{_said(rule, shape)}; give both the same, or {{{name!r}: None}} for the second"
                )
    if idle := [_shown(key) for key in layers if key not in decided]:
        raise ValueError(
            f"{', '.join(idle)} decides nothing: what it matches goes by names that stand before it, or by types that "
            "are more specific; put it first, or leave it out"
        )
    return {glob.escape(name): rule for name, (rule, _) in found.items()}


def _checked(modules: Mapping[str, nn.Module], layers: Layers) -> dict[type[nn.Module] | str, _Per | None]:
    """Return what is asked under every key; raise ``ValueError`` where a key or a value is of no use."""
    checked = {key: None if asked is None else _per(key, asked) for key, asked in layers.items()}
    for key, per in checked.items():
        if isinstance(key, str):
            matching = [module for name, module in modules.items() if _named(name, key, modules)]
            there = ", ".join(repr(name) for name, module in modules.items() if isinstance(module, KNOWN))
        elif isinstance(key, type):
            matching = [module for module in modules.values() if key in type(module).__mro__]
            there = ", ".join(sorted({type(module).__name__ for module in modules.values() if module._parameters}))
        else:
            raise ValueError(f"{key!r} is no type of module and no pattern of module names")
        if not matching:
            raise ValueError(f"{_shown(key)} matches no module of the model; there are {there or 'none with weights'}")
        if per is None and isinstance(key, type) and not any(isinstance(module, KNOWN) for module in matching):
            raise ValueError(
                f"{_shown(key)} has no weights of its own; leave modules out by their names, {{'name': None}}"
            )
        if per is not None and not any(isinstance(module, KNOWN) for module in matching):
            raise ValueError(
                f"no sides are known for {_shown(key)}, only for Linear, Bilinear, convolutions, embeddings, "
                "MultiheadAttention and recurrent layers; give a rule by the parameter's name"
            )
    return checked


def _per(key: object, asked: Any) -> _Per:
    """Return a manifold with its side, from the ways in which they can be written."""
    manifold, side, heads = (*asked, *("", 0)[len(asked) - 1 :]) if _is_tuple(asked) else (asked, "", 0)
    whole = isinstance(heads, int) and not isinstance(heads, bool) and heads >= 0
    if not whole or (_is_tuple(asked) and len(asked) == 3 and not heads):
        raise ValueError(f"for {_shown(key)} the number of heads must be a positive integer, got {asked[2]!r}")
    if not isinstance(manifold, Manifold) or not isinstance(side, str) or (heads and side != "per head"):
        raise ValueError(
            f"for {_shown(key)} there is {asked!r}; write a manifold, Stiefel(), one with a side, "
            f"(Oblique(), 'per output'), or None{'; a Rule is for one parameter' if isinstance(asked, Rule) else ''}"
        )
    known = side.removeprefix("per ") in SIDES
    return _Per(manifold, side.removeprefix("per ") if known else side, heads)


def _is_tuple(asked: object) -> bool:
    return isinstance(asked, tuple) and len(asked) in (2, 3)


def _shown(key: object) -> str:
    return key.__name__ if isinstance(key, type) else repr(key)


def _named(name: str, pattern: str, modules: Mapping[str, nn.Module]) -> bool:
    """Say whether a pattern means a module; one that is a module's name means that one."""
    return name == pattern if pattern in modules else fnmatch.fnmatchcase(name, pattern)


def _key(name: str, modules: Mapping[str, nn.Module], layers: Layers) -> type[nn.Module] | str | None:
    """Return the key that a module goes by.

    That is its name, that of a container that is left out, the attention that it belongs to, or its most specific type.
    """
    for key in layers:
        if isinstance(key, str) and _named(name, key, modules):
            return key
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        inside = ".".join(parts[:length])
        for key, asked in layers.items():
            if asked is None and isinstance(key, str) and _named(inside, key, modules):
                return key
    attention = _attention_of(name, modules)
    if attention is not None and (key_of_attention := _key(attention, modules, layers)) is not None:
        return key_of_attention
    return next((base for base in type(modules[name]).__mro__ if base in layers), None)


def _attention_of(name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """Return the name of the attention whose output projection a module is."""
    parent, _, last = name.rpartition(".")
    return parent if last == "out_proj" and isinstance(modules[parent], nn.MultiheadAttention) else None


def _parameter(module: nn.Module, name: str, path: str) -> nn.Parameter:
    """Return a weight of a module, if it is a parameter of known shape."""
    parameter = module._parameters.get(name)
    if parameter is None:
        if parametrize.is_parametrized(module, name):
            tensors, away = f"{path.removesuffix(name)}parametrizations.{name}.original*", "remove_parametrizations"
            why = f"is parametrized (torch.nn.utils.parametrize), {tensors!r} is what is learned"
            way_out = f"take the parametrization away, torch.nn.utils.parametrize.{away}(module, {name!r})"
        else:
            why = "is no parameter: weight_norm, spectral_norm or pruning put others in its place"
            way_out = "take that away"
        raise ValueError(f"{path!r} {why}; {way_out}, or give None for this module")
    if is_lazy(parameter):
        raise ValueError(f"parameter {path!r} of a lazy module has no shape yet: call the model once first")
    return parameter


def _rule(weight: _Weight, per: _Per, shape: tuple[int, ...], what: str, name: str) -> Rule:
    """Return the rule of a weight for a side; without one, of the first side that can carry the manifold."""
    manifold = per.manifold
    if per.side == "head" and (weight.name, weight.axes) == ("weight", "output input"):
        raise ValueError(f"{what} does not know its heads: say ({_call(manifold)}, 'per head', heads)")
    if per.side and per.side not in weight.sides:
        sides = ", ".join(f"'per {side}'" for side in weight.sides)
        asked = f"per {per.side}" if per.side in SIDES else per.side
        raise ValueError(f"{what} has no side {asked!r}; it has {sides}")
    # Vectors of unit length are possible on every side: there the first one is what is meant.
    tried = [per.side] if per.side else list(weight.sides)[: 1 if isinstance(manifold, Oblique | Sphere) else None]
    views = {side: _view(weight, side, manifold) for side in weight.sides}
    problems = {side: _problem(weight, side, view, manifold, shape) for side, view in views.items()}
    for side in tried:
        if not problems[side]:
            return Rule(manifold, views[side])
    refused = ", ".join(f"per {side}: {problems[side]}" for side in tried)
    ways = [
        f"say 'per {side}' ({_counted(view, shape)})"
        for side, view in views.items()
        if side not in tried and not problems[side]
    ]
    ways.append(f"give {{{name!r}: None}} to leave it free")
    raise ValueError(f"{what} cannot be {manifold.name} {refused}; {', or '.join(ways)}")


def _view(weight: _Weight, side: str, manifold: Manifold) -> MatrixView:
    """Return the view whose columns are the vectors of a side."""
    batch, vector, columns = weight.sides[side]
    noun = columns.split()[-1].rstrip("0123456789") + ("s of a head" if side == "head" else "s")
    if isinstance(manifold, Oblique) and batch == "group":
        batch, columns = "", f"group {columns}"  # unit vectors know of no groups, and one matrix costs less than many
    if isinstance(manifold, Sphere) and side != "head":
        batch, columns = f"{batch} {columns}".strip(), "1"
    grouped = (f"({axes})" if " " in axes else axes for axes in (batch, vector, columns))
    pattern = f"{weight.axes} -> {' '.join(filter(None, grouped))}"
    return MatrixView(pattern, tuple(weight.sizes.items()) if "(" in pattern else (), noun)


def _matrix_shape(view: MatrixView, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(view.to_matrix(torch.empty(shape, device="meta")).shape)


def _problem(weight: _Weight, side: str, view: MatrixView, manifold: Manifold, shape: tuple[int, ...]) -> str:
    """Return why a shape cannot carry a manifold, or an empty string."""
    try:
        matrix_shape = _matrix_shape(view, shape)
    except Exception:  # einops raises its own class
        sizes = ", ".join(f"{axis} = {size}" for axis, size in view.sizes)
        return f"the shape is not ({weight.axes}){f' with {sizes}' if sizes else ''}"
    words = _counted(view, shape)
    if weight.zero_row is not None:
        if side in ("token", "output"):
            return f"{side} {weight.zero_row} is padding (padding_idx), a zero vector that has no length"
        d, p = matrix_shape[-2:]
        if not isinstance(manifold, Oblique | Sphere) and p >= d:
            padding = f"row {weight.zero_row} is padding (padding_idx) and stays zero"
            return f"{padding}, and {d - 1} rows are too few for {words}"
    try:
        manifold.check_shape(matrix_shape)
    except ValueError as error:
        orthonormal = isinstance(manifold, Stiefel | StiefelCanonical | Grassmann)
        return f"{words} cannot be orthonormal" if orthonormal else f"{words}: {error}"
    return "" if manifold.dimension(matrix_shape) else f"{words} on {manifold.name} have no freedom, nothing to learn"


def _counted(view: MatrixView, shape: tuple[int, ...]) -> str:
    """Return how many vectors there are in a matrix, and of which dimension."""
    *_, d, p = _matrix_shape(view, shape)
    return f"{p} {view.vectors} of dimension {d}"


def _call(manifold: Manifold) -> str:
    return f"{type(manifold).__name__}({'' if manifold.name == type(manifold).__name__ else '...'})"


def _is_square(manifold: Manifold) -> bool:
    return isinstance(manifold, Orthogonal | Rotations | SPD)


def _meaning(rule: Rule) -> object:
    """Return a rule with the axes of its view numbered: what they are called makes no difference."""
    assert rule.view is not None
    axes = list(dict.fromkeys(re.findall(r"[a-z]\w*", rule.view.pattern)))
    pattern = re.sub(r"[a-z]\w*", lambda axis: f"a{axes.index(axis[0])}", rule.view.pattern)
    return rule.manifold, pattern, sorted((axes.index(axis), size) for axis, size in rule.view.sizes)


def _said(rule: Rule, shape: tuple[int, ...]) -> str:
    """Return a rule in words."""
    assert rule.view is not None
    seen = ParameterGeometry("", shape, rule.manifold, rule.view, _matrix_shape(rule.view, shape))
    return f"{rule.manifold.name}, {seen.words}"


def _weights(module: nn.Module, attention: nn.Module | None, per: _Per) -> list[_Weight]:
    """Return the weights of a module of a known type; ``attention``: whose output projection it is to be."""
    if attention is not None:
        return _attention_weights(attention, per, projection=True)
    if isinstance(module, nn.MultiheadAttention):
        return _attention_weights(module, per, projection=False)
    if isinstance(module, _ConvNd):
        return [_convolution_weight(module)]
    if isinstance(module, EMBEDDING):
        token, feature = ("", "feature", "token"), ("", "token", "feature")
        # A token has a length of its own; to be orthonormal there are usually too many of them.
        unit = isinstance(per.manifold, Oblique | Sphere)
        sides = {"token": token, "feature": feature} if unit else {"feature": feature, "token": token}
        if module.max_norm is not None:
            raise ValueError(
                f"an {type(module).__name__} with max_norm shortens its rows as it is called, which no rule survives; "
                "take max_norm away, or give {'NAME': None}"
            )
        return [_Weight("weight", "token feature", {}, sides)]
    if isinstance(module, nn.Bilinear):
        sizes = {"first": module.in1_features, "second": module.in2_features}
        return [_Weight("weight", "output first second", sizes, {"output": ("", "first second", "output")})]
    if isinstance(module, RECURRENT):
        return _recurrent_weights(module)
    if per.heads:
        sides = {"head": ("head", "input", "output")}
        return [_Weight("weight", "(head output) input", {"head": per.heads}, sides)]
    return [_linear_weight("weight")]


def _linear_weight(name: str) -> _Weight:
    return _Weight(name, "output input", {}, {"output": ("", "input", "output"), "input": ("", "output", "input")})


def _convolution_weight(module: _ConvNd) -> _Weight:
    """Return the weight (out, in / groups, kernel), or of a transposed convolution (in, out / groups, kernel)."""
    group = "group" if module.groups > 1 else ""
    taps = {f"tap{i}": size for i, size in enumerate(module.kernel_size)}
    names = " ".join(taps)
    first, second = ("input", "filter") if isinstance(module, _ConvTransposeNd) else ("filter", "input")
    axes = f"(group {first}) {second} {names}" if group else f"{first} {second} {names}"
    sizes = {
        **({"group": module.groups} if group else {}),
        "filter": module.out_channels // module.groups,
        "input": module.in_channels // module.groups,
        **taps,
    }
    sides = {
        "output": (group, f"input {names}", "filter"),
        "tap": (group, "filter", f"input {names}"),
        "input": (group, f"filter {names}", "input"),
    }
    return _Weight("weight", axes, sizes, sides)


def _attention_weights(module: Any, per: _Per, projection: bool) -> list[_Weight]:
    """Return the weights of queries, keys and values, or of the output projection, whose inputs are the heads'."""
    if per.heads not in (0, module.num_heads):
        raise ValueError(
            f"heads={per.heads}, but the attention has {module.num_heads}; leave heads away, or name its projection "
            "apart, {'NAME.out_proj': ...}"
        )
    heads = {"head": module.num_heads}
    if projection:
        sides = {
            "head": ("head", "output", "input"),
            "output": ("", "head input", "output"),
            "input": ("", "output", "head input"),
        }
        return [_Weight("weight", "output (head input)", heads, sides)]
    sides = {
        "head": ("head", "input", "output"),
        "output": ("", "input", "head output"),
        "input": ("", "head output", "input"),
    }
    if not module._qkv_same_embed_dim:
        return [_Weight(f"{part}_proj_weight", "(head output) input", heads, sides) for part in "qkv"]
    packed = {side: (f"part {batch}".strip(), vector, columns) for side, (batch, vector, columns) in sides.items()}
    return [_Weight("in_proj_weight", "(part head output) input", {"part": 3, **heads}, packed)]


def _recurrent_weights(module: Any) -> list[_Weight]:
    """Return the weights of a recurrent layer or cell, with the gates that are stacked in them."""
    gates = {"LSTM": 4, "GRU": 3}.get(getattr(module, "mode", ""), 1)
    if isinstance(module, nn.LSTMCell | nn.GRUCell):
        gates = 4 if isinstance(module, nn.LSTMCell) else 3
    gate = "gate" if gates > 1 else ""
    axes, sizes = ("(gate output) input", {"gate": gates}) if gate else ("output input", {})
    sides = {"output": (gate, "input", "output"), "input": (gate, "output", "input")}
    endings = [""]
    if isinstance(module, nn.RNNBase):
        directions = ("", "_reverse") if module.bidirectional else ("",)
        endings = [f"_l{layer}{direction}" for layer in range(module.num_layers) for direction in directions]
    weights = []
    for ending in endings:
        weights.append(_Weight(f"weight_ih{ending}", axes, sizes, sides))
        weights.append(_Weight(f"weight_hh{ending}", axes, sizes, sides, recurrent=True))
        if getattr(module, "proj_size", 0):
            weights.append(_linear_weight(f"weight_hr{ending}"))
    return weights
