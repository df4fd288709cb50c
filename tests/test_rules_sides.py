"""Every side of every layer: the vectors that are named are orthonormal, or of unit length; what cannot be is said.

What holds is looked up in the weights themselves, with plain torch and the layouts that torch documents.
"""

import re
import warnings

import pytest
import torch
from making import normal
from torch import nn
from torch.nn.utils import parametrizations

import subspace_meta as sm


def said(words, kind):
    """Return how a summary puts what CASES count, "4 gates x 3 outputs of 5"."""
    batch, count, noun, dimension = re.fullmatch(r"(?:(\d+) \w+ x )?(\d+) (.+) of (\d+)", words).groups()
    if batch and "groups" in words and kind == "unit":  # unit vectors know of no groups
        batch, count = "", int(batch) * int(count)
    return f"{f'{batch} times ' if batch else ''}{count} {kind} {noun} of {dimension}"


def gates(count, transposed=False):
    """The gates of a recurrent weight; rows are the vectors."""

    def vectors(w):
        stacked = w.unflatten(0, (count, -1))
        return stacked.mT if transposed else stacked

    return vectors


def rows(w):
    return w.flatten(1)


def columns(w):
    return w.flatten(1).T


def channels(w):
    """What belongs to each entry of the second axis."""
    return w.transpose(0, 1).flatten(1)


def places(w):
    """What each place of the kernel on each input channel of a transposed convolution gives to the outputs."""
    return w.movedim(1, -1).flatten(0, -2)


def grouped(groups, vectors):
    return lambda w: torch.stack([vectors(part) for part in w.chunk(groups)])


def blocks(heads):
    """The heads' rows."""
    return lambda w: w.unflatten(0, (heads, -1))


def blocks_of_inputs(heads):
    """The heads' columns."""
    return lambda w: torch.stack([part.T for part in w.chunk(heads, dim=1)])


LSTM, BOTH = nn.LSTM(4, 4, 2, bidirectional=True), ("ih", "hh")
LSTM_WEIGHTS = [f"weight_{kind}_l{i}{end}" for kind in BOTH for i in (0, 1) for end in ("", "_reverse")]

# name: module, side, parameter -> its vectors as rows (of each of a batch), what the summary says without the kind
CASES = {
    "Linear, output": (nn.Linear(5, 3), "output", {"weight": rows}, "3 outputs of 5"),
    "Linear, input": (nn.Linear(3, 5), "input", {"weight": columns}, "3 inputs of 5"),
    "Linear, head": (nn.Linear(5, 6), "head", {"weight": blocks(2)}, "2 heads x 3 outputs of a head of 5"),
    "a subclass of Linear": (type("Own", (nn.Linear,), {})(5, 3), "output", {"weight": rows}, "3 outputs of 5"),
    "Conv1d, output": (nn.Conv1d(4, 3, 5), "output", {"weight": rows}, "3 filters of 20"),
    "Conv1d, tap": (nn.Conv1d(2, 9, 3), "tap", {"weight": columns}, "6 taps of 9"),
    "Conv1d, input": (nn.Conv1d(3, 4, 2), "input", {"weight": channels}, "3 inputs of 8"),
    "Conv2d, output": (nn.Conv2d(4, 3, (5, 2)), "output", {"weight": rows}, "3 filters of 40"),
    "Conv2d, tap": (nn.Conv2d(2, 9, 2), "tap", {"weight": columns}, "8 taps of 9"),
    "Conv2d, input": (nn.Conv2d(3, 4, 2), "input", {"weight": channels}, "3 inputs of 16"),
    "Conv3d, output": (nn.Conv3d(2, 3, 2), "output", {"weight": rows}, "3 filters of 16"),
    "Conv3d, tap": (nn.Conv3d(1, 9, 2), "tap", {"weight": columns}, "8 taps of 9"),
    "Conv3d, input": (nn.Conv3d(3, 4, 2), "input", {"weight": channels}, "3 inputs of 32"),
    "ConvTranspose1d, output": (nn.ConvTranspose1d(4, 3, 5), "output", {"weight": channels}, "3 filters of 20"),
    "ConvTranspose1d, tap": (nn.ConvTranspose1d(2, 9, 3), "tap", {"weight": places}, "6 taps of 9"),
    "ConvTranspose1d, input": (nn.ConvTranspose1d(3, 4, 2), "input", {"weight": rows}, "3 inputs of 8"),
    "ConvTranspose2d, output": (nn.ConvTranspose2d(4, 3, (5, 2)), "output", {"weight": channels}, "3 filters of 40"),
    "ConvTranspose2d, tap": (nn.ConvTranspose2d(2, 9, 2), "tap", {"weight": places}, "8 taps of 9"),
    "ConvTranspose2d, input": (nn.ConvTranspose2d(3, 4, 2), "input", {"weight": rows}, "3 inputs of 16"),
    "ConvTranspose3d, output": (nn.ConvTranspose3d(4, 3, 2), "output", {"weight": channels}, "3 filters of 32"),
    "ConvTranspose3d, input": (nn.ConvTranspose3d(3, 4, 2), "input", {"weight": rows}, "3 inputs of 32"),
    "groups, output": (
        nn.Conv2d(4, 6, 3, groups=2), "output", {"weight": grouped(2, rows)}, "2 groups x 3 filters of 18",
    ),
    "groups, input": (
        nn.Conv2d(4, 6, 3, groups=2), "input", {"weight": grouped(2, channels)}, "2 groups x 2 inputs of 27",
    ),
    "groups, tap": (nn.Conv1d(4, 16, 3, groups=2), "tap", {"weight": grouped(2, columns)}, "2 groups x 6 taps of 8"),
    "depthwise, output": (
        nn.Conv2d(4, 4, 3, groups=4), "output", {"weight": grouped(4, rows)}, "4 groups x 1 filters of 9",
    ),
    "transposed groups, output": (
        nn.ConvTranspose2d(4, 6, 3, groups=2), "output", {"weight": grouped(2, channels)}, "2 groups x 3 filters of 18",
    ),
    "transposed groups, input": (
        nn.ConvTranspose1d(4, 6, 3, groups=2), "input", {"weight": grouped(2, rows)}, "2 groups x 2 inputs of 9",
    ),
    "Embedding, token": (nn.Embedding(3, 5), "token", {"weight": rows}, "3 tokens of 5"),
    "Embedding, feature": (nn.Embedding(20, 4), "feature", {"weight": columns}, "4 features of 20"),
    "EmbeddingBag, token": (nn.EmbeddingBag(3, 5), "token", {"weight": rows}, "3 tokens of 5"),
    "attention, output": (
        nn.MultiheadAttention(6, 2), "output", {"in_proj_weight": blocks(3), "out_proj.weight": rows},
        "3 parts x 6 outputs of 6",
    ),
    "attention, input": (
        nn.MultiheadAttention(6, 2), "input", {"in_proj_weight": gates(3, True), "out_proj.weight": columns},
        "3 parts x 6 inputs of 6",
    ),
    "attention, head": (
        nn.MultiheadAttention(6, 2), "head", {"in_proj_weight": blocks(6), "out_proj.weight": blocks_of_inputs(2)},
        "6 heads x 3 outputs of a head of 6",
    ),
    "attention of other widths, head": (
        nn.MultiheadAttention(6, 2, kdim=4, vdim=5),
        "head",
        {
            "q_proj_weight": blocks(2), "k_proj_weight": blocks(2), "v_proj_weight": blocks(2),
            "out_proj.weight": blocks_of_inputs(2),
        },
        "2 heads x 3 outputs of a head of 6",
    ),
    "attention of other widths, output": (
        nn.MultiheadAttention(6, 2, kdim=7, vdim=8),
        "output",
        {"q_proj_weight": rows, "k_proj_weight": rows, "v_proj_weight": rows, "out_proj.weight": rows},
        "6 outputs of 6",
    ),
    "RNN, output": (nn.RNN(5, 4), "output", {"weight_ih_l0": rows, "weight_hh_l0": rows}, "4 outputs of 5"),
    "RNN, input": (nn.RNN(3, 4), "input", {"weight_ih_l0": columns, "weight_hh_l0": columns}, "3 inputs of 4"),
    "LSTM, output": (LSTM, "output", dict.fromkeys(LSTM_WEIGHTS, gates(4)), "4 gates x 4 outputs of 4"),
    "LSTM, projection": (
        nn.LSTM(5, 4, proj_size=3),
        "output",
        {"weight_ih_l0": gates(4), "weight_hr_l0": rows},
        "4 gates x 4 outputs of 5",
    ),
    "GRU, output": (
        nn.GRU(5, 4), "output", dict.fromkeys(("weight_ih_l0", "weight_hh_l0"), gates(3)), "3 gates x 4 outputs of 5",
    ),
    "GRU, input": (
        nn.GRU(3, 4), "input", dict.fromkeys(("weight_ih_l0", "weight_hh_l0"), gates(3, True)),
        "3 gates x 3 inputs of 4",
    ),
    "RNNCell": (nn.RNNCell(5, 4), "output", {"weight_ih": rows, "weight_hh": rows}, "4 outputs of 5"),
    "LSTMCell": (
        nn.LSTMCell(5, 4), "output", {"weight_ih": gates(4), "weight_hh": gates(4)}, "4 gates x 4 outputs of 5",
    ),
    "GRUCell": (nn.GRUCell(5, 4), "output", {"weight_ih": gates(3), "weight_hh": gates(3)}, "3 gates x 4 outputs of 5"),
}  # fmt: skip


def fresh(module, seed=0):
    """Give a module's parameters normal entries, and return them by name, detached."""
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=seed + i))
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def asked(name, manifold):
    module, side, _, _ = CASES[name]
    heads = (2,) if isinstance(module, nn.Linear) and side == "head" else ()
    return {type(module): (manifold, f"per {side}", *heads)}


def holds(params, vectors, orthonormal, tolerance):
    """Check the constraint on the weights as torch stores them."""
    for name, of in vectors.items():
        v = of(params[name].detach())
        gram = v @ v.mT
        if not orthonormal:
            gram = gram.diagonal(dim1=-2, dim2=-1).diag_embed()
        assert (gram - torch.eye(v.shape[-2], dtype=v.dtype)).abs().max() < tolerance, name


KINDS = {"orthonormal": sm.Stiefel(), "unit": sm.Oblique()}
# A projected LSTM has recurrent matrices of 3 outputs for 4 gates of 4: they cannot be orthonormal per output.
POSSIBLE = [(name, kind) for name in CASES for kind in KINDS if (name, kind) != ("LSTM, projection", "orthonormal")]


@pytest.mark.parametrize(("name", "kind"), POSSIBLE)
def test_every_side_of_every_layer(name, kind):
    module, _, vectors, words = CASES[name]
    params = fresh(module)
    rules = sm.rules_for(module, asked(name, KINDS[kind]))
    hidden = {"weight_hh_l0"} if name == "LSTM, projection" else set()
    assert rules.keys() == vectors.keys() | hidden
    geometry = sm.Geometry.from_rules({k: v.double() for k, v in params.items()}, rules)
    assert said(words, kind) in [p.words for p in geometry.parameters]
    assert f"  {said(words, kind)}\n" in geometry.summary()

    params = geometry.project({k: v.double() for k, v in params.items()})
    holds(params, vectors, kind == "orthonormal", 1e-12)
    holds(geometry.initialize(torch.Generator().manual_seed(0), torch.float64), vectors, kind == "orthonormal", 1e-12)
    optimizer = sm.RSGD(geometry, lr=0.1)
    grads = {k: normal(*v.shape, seed=i + 50) for i, (k, v) in enumerate(params.items())}
    moved, _ = optimizer.update(grads, optimizer.init(params), params)
    holds(moved, vectors, kind == "orthonormal", 1e-12)
    assert all((moved[k] - params[k]).abs().max() > 1e-3 for k in vectors)
    assert not {k for k in params if "bias" in k or "norm" in k} & rules.keys()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_torch_optimizers_keep_every_side(name, kind):
    if (name, kind) not in POSSIBLE:
        return
    module, _, vectors, _ = CASES[name]
    for make in (
        lambda m, rules: sm.optim.Riemannian(m, rules, sm.RSGD, lr=1e-2),
        lambda m, rules: sm.optim.SubspaceMeta(m, rules),
    ):
        fresh(module)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", sm.optim.ProjectionWarning)
            optimizer = make(module, sm.rules_for(module, asked(name, KINDS[kind])))
        before = {k: p.detach().clone() for k, p in module.named_parameters()}
        holds(before, vectors, kind == "orthonormal", 1e-5)
        slopes = [normal(*p.shape, seed=i + 100, dtype=p.dtype) for i, p in enumerate(module.parameters())]
        sum((p * slope).sum() for p, slope in zip(module.parameters(), slopes, strict=True)).backward()
        optimizer.step()
        after = dict(module.named_parameters())
        holds(after, vectors, kind == "orthonormal", 1e-5)
        assert all(not torch.equal(after[k], before[k]) for k in vectors)
        module.zero_grad()


@pytest.mark.parametrize("name", [name for name, (_, side, _, _) in CASES.items() if side != "head"])
def test_on_a_sphere_every_vector_is_a_point(name):
    module, side, vectors, _ = CASES[name]
    params = fresh(module)
    rules = sm.rules_for(module, {type(module): (sm.Sphere(), f"per {side}")})
    projected = sm.Geometry.from_rules(params, rules).project(params)
    holds(projected, vectors, False, 1e-5)
    unit = sm.Geometry.from_rules(params, sm.rules_for(module, asked(name, sm.Oblique()))).project(params)
    for key in vectors:
        torch.testing.assert_close(projected[key], unit[key])
        count = vectors[key](params[key]).shape[:-1].numel()
        assert f"  {count} unit " in sm.Geometry.from_rules(params, rules).summary()


def test_on_a_sphere_every_head_is_a_point():
    module = nn.Linear(5, 6, bias=False)
    rules = sm.rules_for(module, {nn.Linear: (sm.Sphere(), "per head", 2)})
    geometry = sm.Geometry.from_rules(dict(module.named_parameters()), rules)
    weight = geometry.project(dict(module.named_parameters()))["weight"]
    torch.testing.assert_close(weight.unflatten(0, (2, 3)).flatten(1).norm(dim=1), torch.ones(2))
    assert geometry.parameters[0].words == "2 times 5 x 3 of unit norm"


@pytest.mark.parametrize("manifold", [sm.Orthogonal(), sm.Rotations()])
def test_orthogonal_recurrent_matrices(manifold):
    module = nn.LSTM(5, 4, 2)
    params = fresh(module)
    rules = sm.rules_for(module, {nn.LSTM: manifold})
    assert list(rules) == ["weight_hh_l0", "weight_hh_l1"]
    geometry = sm.Geometry.from_rules(params, rules)
    assert geometry.parameters[1].words == "4 times 4 orthonormal outputs of 4"
    moved = geometry.project(params)
    for gate in moved["weight_hh_l1"].chunk(4):
        torch.testing.assert_close(gate @ gate.T, torch.eye(4), rtol=0, atol=1e-5)
        assert isinstance(manifold, sm.Orthogonal) or torch.linalg.det(gate) > 0


@pytest.mark.parametrize(
    ("module", "manifold", "expected"),
    [
        (nn.Linear(50, 8), sm.Oblique(), "8 unit outputs of 50"),
        (nn.Linear(8, 50), sm.Oblique(), "50 unit outputs of 8"),
        (nn.Linear(50, 8), sm.Stiefel(), "8 orthonormal outputs of 50"),
        (nn.Linear(8, 50), sm.Stiefel(), "8 orthonormal inputs of 50"),
        (nn.Linear(8, 50), sm.StiefelCanonical(), "8 orthonormal inputs of 50"),
        (nn.Linear(8, 50), sm.Grassmann(), "8 orthonormal inputs of 50"),
        (nn.Linear(8, 8), sm.Rotations(), "8 orthonormal outputs of 8"),
        (nn.Linear(8, 8), sm.SPD(), ""),
        (nn.Linear(8, 8), sm.Euclidean(), ""),
        (nn.Conv1d(3, 8, 5), sm.Stiefel(), "8 orthonormal filters of 15"),
        (nn.Conv2d(3, 8, 5), sm.Stiefel(), "8 orthonormal filters of 75"),
        (nn.Conv2d(1, 16, 3), sm.Stiefel(), "9 orthonormal taps of 16"),
        (nn.Conv2d(1, 16, 3), sm.Oblique(), "16 unit filters of 9"),
        (nn.Conv2d(8, 8, 3, groups=8), sm.Oblique(), "8 unit filters of 9"),
        (nn.Conv2d(8, 8, 3, groups=8), sm.Sphere(), "8 unit filters of 9"),
        (nn.Conv2d(8, 8, 3, groups=8), sm.Stiefel(), "8 times 1 orthonormal filters of 9"),
        (nn.Embedding(1000, 16), sm.Oblique(), "1000 unit tokens of 16"),
        (nn.Embedding(1000, 16), sm.Stiefel(), "16 orthonormal features of 1000"),
        (nn.Embedding(1000, 16, padding_idx=0), sm.Stiefel(), "16 orthonormal features of 1000"),
        (nn.Embedding(10, 16), sm.Stiefel(), "10 orthonormal tokens of 16"),
        (nn.MultiheadAttention(16, 4), sm.Stiefel(), "12 times 4 orthonormal outputs of a head of 16"),
        (nn.MultiheadAttention(16, 4), sm.Orthogonal(), "3 times 16 orthonormal outputs of 16"),
        (nn.Bilinear(3, 4, 5), sm.Stiefel(), "5 orthonormal outputs of 12"),
    ],
)  # fmt: skip
def test_the_side_that_is_meant_without_one(module, manifold, expected):
    rules = sm.rules_for(module, {type(module): manifold})
    assert sm.Geometry.from_rules(dict(module.named_parameters()), rules).parameters[0].words == expected


def test_orthonormal_filters_are_those_of_plain_rules():
    """A convolution's default is the library's, so that networks need not be trained anew."""
    for module in (nn.Conv2d(3, 8, 5, bias=False), nn.Conv2d(1, 16, 3, bias=False), nn.Conv3d(1, 2, 3, bias=False)):
        params = fresh(module)
        plain = sm.Geometry.from_rules(params, {"weight": sm.Stiefel()})
        (matrix,) = sm.Geometry.from_rules(params, sm.rules_for(module, {nn.Module: sm.Stiefel()})).gather(params)
        assert torch.equal(matrix, plain.gather(params)[0])


def small_model():
    return nn.ModuleDict(
        {
            "embed": nn.Embedding(20, 6),
            "attend": nn.MultiheadAttention(6, 2),
            "norm": nn.LayerNorm(6),
            "first": nn.Linear(6, 8),
            "head": nn.Linear(8, 20),
        }
    )


def test_what_is_nearest_counts():
    class Narrow(nn.Linear):
        pass

    model = nn.ModuleDict({**small_model(), "narrow": Narrow(6, 2), "h[0]": nn.Linear(6, 2)})
    layers = {
        nn.Module: sm.Oblique(),
        nn.Linear: sm.Stiefel(),
        Narrow: (sm.Oblique(), "per input"),
        "head": None,
        "h[0]": sm.Grassmann(),
    }
    rules = sm.rules_for(model, layers)
    assert {name: rule.manifold for name, rule in rules.items()} == {
        "embed.weight": sm.Oblique(),
        "attend.in_proj_weight": sm.Oblique(),
        "attend.out_proj.weight": sm.Oblique(),  # it belongs to the attention, though it is a Linear
        "first.weight": sm.Stiefel(),
        "narrow.weight": sm.Oblique(),
        "h[[]0].weight": sm.Grassmann(),
    }
    geometry = sm.Geometry.from_rules(dict(model.named_parameters()), rules)
    words = {p.name: p.words for p in geometry.parameters}
    assert words["narrow.weight"] == "6 unit inputs of 2"
    assert words["h[0].weight"] == "2 orthonormal outputs of 6"
    assert words["head.weight"] == words["norm.weight"] == words["attend.in_proj_bias"] == ""
    only = sm.rules_for(model, {nn.Linear: sm.Stiefel()})
    assert "attend.out_proj.weight" in only
    assert "attend.in_proj_weight" not in only
    by_name = sm.rules_for(model, {"att*": (sm.Stiefel(), "per head"), "*": sm.Oblique()})
    out = by_name["attend.out_proj.weight"].view  # the first name that fits counts
    assert (out.pattern, out.sizes) == ("output (head input) -> head output input", (("head", 2),))
    exact = sm.rules_for(model, {"attend": (sm.Stiefel(), "per head"), "attend.out_proj": sm.Oblique()})
    assert exact["attend.out_proj.weight"].manifold == sm.Oblique()
    assert "attend.out_proj.weight" not in sm.rules_for(model, {"attend": None, nn.Linear: sm.Stiefel()})
    assert sm.rules_for(model, {}) == {}


def test_a_model_of_many_layers_trains():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2, enable_nested_tensor=False
    )
    model = nn.Sequential(nn.Embedding(10, 8), model, nn.Linear(8, 10))
    rules = sm.rules_for(
        model,
        {nn.Embedding: sm.Oblique(), nn.MultiheadAttention: sm.Stiefel(), nn.Linear: sm.Stiefel()},
    )
    assert len(rules) == 1 + 2 * 4 + 1
    with pytest.warns(sm.optim.ProjectionWarning):
        optimizer = sm.optim.SubspaceMeta(model, rules)
    tokens = torch.randint(10, (16, 6))
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        losses.append(nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    assert max(optimizer.check().values()) < 1e-5
    torch.testing.assert_close(model[0].weight.norm(dim=1), torch.ones(10))


def test_tied_weights_have_one_rule():
    model = nn.ModuleDict({"embed": nn.Embedding(20, 6), "head": nn.Linear(6, 20)})
    model.head.weight = model.embed.weight
    for layers, words in (
        ({nn.Module: sm.Oblique()}, "20 unit tokens of 6"),
        ({nn.Module: sm.Stiefel()}, "6 orthonormal features of 20"),
        ({nn.Embedding: sm.Stiefel(), "head": None}, "6 orthonormal features of 20"),
        ({nn.Linear: sm.Oblique()}, "20 unit outputs of 6"),
    ):
        rules = sm.rules_for(model, layers)
        assert list(rules) == ["embed.weight"]
        assert sm.Geometry.from_rules(dict(model.named_parameters()), rules).parameters[0].words == words
    message = (
        "'embed.weight' and 'head.weight' are one parameter, and their rules differ: Oblique, 20 unit tokens of 6, "
        "and Stiefel, 6 orthonormal inputs of 20; give both the same, or {'head': None} for the second"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        sm.rules_for(model, {nn.Embedding: sm.Oblique(), nn.Linear: sm.Stiefel()})
    with pytest.raises(ValueError, match="20 unit tokens of 6, and Oblique, 6 unit inputs of 20"):
        sm.rules_for(model, {nn.Embedding: sm.Oblique(), nn.Linear: (sm.Oblique(), "per input")})


def test_a_module_under_two_names():
    layer = nn.Linear(5, 3)
    model = nn.ModuleDict({"a": layer, "b": layer})
    assert list(sm.rules_for(model, {nn.Linear: sm.Stiefel()})) == ["a.weight"]
    assert list(sm.rules_for(model, {"b": sm.Stiefel()})) == ["a.weight"]
    with pytest.raises(ValueError, match="are one parameter"):
        sm.rules_for(model, {"a": sm.Stiefel(), "b": sm.Oblique()})
    model = nn.ModuleDict({"a": nn.Linear(5, 6), "b": nn.Linear(5, 6)})
    model.b.weight = model.a.weight
    with pytest.raises(
        ValueError, match="Stiefel, 2 times 3 orthonormal outputs of a head of 5, and Stiefel, 3 times 2"
    ):
        sm.rules_for(model, {name: (sm.Stiefel(), "per head", heads) for name, heads in (("a", 2), ("b", 3))})


def test_token_padding_has_no_length():
    model = nn.Sequential(nn.Embedding(20, 6, padding_idx=3))
    message = (
        "'0.weight' (Embedding, shape 20 x 6) cannot be Oblique per token: token 3 is padding (padding_idx), a zero "
        "vector that has no length; say 'per feature' (6 features of dimension 20), or give {'0': None}"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        sm.rules_for(model, {nn.Embedding: sm.Oblique()})
    geometry = sm.Geometry.from_rules(dict(model.named_parameters()), sm.rules_for(model, {"0": sm.Stiefel()}))
    params = geometry.project(dict(model.named_parameters()))
    grads = {"0.weight": normal(20, 6, dtype=torch.float32)}
    grads["0.weight"][3] = 0.0
    moved, _ = (optimizer := sm.RSGD(geometry, lr=0.1)).update(grads, optimizer.init(params), params)
    assert moved["0.weight"][3].abs().max() < 1e-6


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (
            {"first": (sm.Stiefel(), "per output")},
            "'first.weight' (Linear, shape 8 x 6) cannot be Stiefel per output: 8 outputs of dimension 6 cannot be "
            "orthonormal; say 'per input' (6 inputs of dimension 8), or give {'first': None} to leave it free",
        ),
        ({"first": sm.Orthogonal()}, "8 outputs of dimension 6: Orthogonal needs square matrices of shape (..., n, n)"),
        ({"norm": sm.Stiefel()}, "no sides are known for 'norm'"),
        ({nn.LayerNorm: sm.Stiefel()}, "no sides are known for LayerNorm"),
        (
            {nn.Conv3d: sm.Stiefel()},
            "Conv3d matches no module of the model; there are Embedding, LayerNorm, Linear, MultiheadAttention",
        ),
        ({"x": sm.Stiefel()}, "'x' matches no module of the model; there are 'embed', 'attend', 'attend.out_proj', '"),
        ({"first": (sm.Oblique(), "per token")}, "'first.weight' (Linear, shape 8 x 6) has no side 'per token'; it"),
        (
            {"first": (sm.Oblique(), "per row")},
            "'first.weight' (Linear, shape 8 x 6) has no side 'per row'; it has 'per output', 'per input'",
        ),
        ({"embed": (sm.Oblique(), "rows")}, "has no side 'rows'; it has 'per token', 'per feature'"),
        ({"first": (sm.Stiefel(), "per head")}, "does not know its heads: say (Stiefel(), 'per head', heads)"),
        ({"first": (sm.Oblique(), "per head", 3)}, "per head: the shape is not ((head output) input) with head = 3"),
        ({"first": (sm.Oblique(), "per output", 3)}, "for 'first' there is (Oblique("),
        ({"attend": (sm.Stiefel(), "per head", 3)}, "heads=3, but the attention has 2; leave heads away"),
        ({nn.Linear: sm.Rule(sm.Stiefel())}, "(Oblique(), 'per output'), or None; a Rule is for one parameter"),
        ({nn.Linear: "Stiefel"}, "for Linear there is 'Stiefel'; write a manifold, Stiefel(), one with a side"),
        ({nn.Linear: ("per output", sm.Stiefel())}, "for Linear there is ('per output', Stiefel("),
        ({"first": sm.Stiefel}, "write a manifold, Stiefel()"),
        ({nn.Linear(2, 2): sm.Stiefel()}, "is no type of module and no pattern of module names"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said(layers, message):
    model = small_model()
    with pytest.raises(ValueError, match=re.escape(message)):
        sm.rules_for(model, layers)


@pytest.mark.parametrize(
    ("module", "per", "message"),
    [
        (nn.Conv2d(4, 4, 3, groups=4), (sm.Stiefel(), "per tap"), "9 taps of dimension 1 cannot be orthonormal; say"),
        (nn.Conv2d(4, 4, 1, groups=4), sm.Stiefel(), "1 filters of dimension 1 on Stiefel have no freedom"),
        (nn.Linear(1, 4), sm.Oblique(), "4 outputs of dimension 1: Oblique needs matrices of shape (..., d, p)"),
        (nn.Linear(4, 4), sm.Grassmann(), "4 outputs of dimension 4 on Grassmann have no freedom"),
        (nn.LSTM(3, 4), (sm.Stiefel(), "per output"), "'weight_ih_l0' (LSTM, shape 16 x 3) cannot be Stiefel per"),
        (nn.LSTM(3, 4), (sm.Stiefel(), "per head"), "'weight_ih_l0' (LSTM, shape 16 x 3) has no side 'per head'"),
        (nn.LSTM(3, 4, proj_size=2), sm.Orthogonal(), "'weight_hh_l0' (LSTM, shape 16 x 2) cannot be Orthogonal"),
    ],
)  # fmt: skip
def test_layers_that_cannot_carry_it(module, per, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        sm.rules_for(module, {type(module): per})


def test_weights_that_are_no_parameters():
    model = nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 4)), nn.Linear(4, 2))
    message = r"'0\.weight' is parametrized .*'0\.parametrizations\.weight\.original\*' is what is learned; take .*None"
    with pytest.raises(ValueError, match=message):
        sm.rules_for(model, {nn.Linear: sm.Stiefel()})
    assert list(sm.rules_for(model, {nn.Linear: sm.Stiefel(), "0": None})) == ["1.weight"]
    torch.nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    assert list(sm.rules_for(model, {nn.Linear: sm.Stiefel()})) == ["0.weight", "1.weight"]
    recurrent = nn.LSTM(4, 4)
    parametrizations.orthogonal(recurrent, "weight_hh_l0")
    with pytest.raises(ValueError, match=r"'weight_hh_l0' is parametrized"):
        sm.rules_for(recurrent, {nn.LSTM: sm.Stiefel()})
    model = nn.Sequential(torch.nn.utils.spectral_norm(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match=r"'0\.weight' is no parameter: weight_norm, spectral_norm or pruning put oth"):
        sm.rules_for(model, {nn.Linear: sm.Stiefel()})


def test_lazy_modules_are_called_first():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(2))
    with pytest.raises(
        ValueError, match=r"parameter '0\.weight' of a lazy module has no shape yet: call the model once"
    ):
        sm.rules_for(model, {nn.Conv2d: sm.Stiefel()})
    model(torch.randn(1, 3, 5, 5))
    assert list(sm.rules_for(model, {nn.Conv2d: sm.Stiefel(), nn.Linear: sm.Stiefel()})) == ["0.weight", "2.weight"]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(10, 4, padding_idx=0)
        self.out = nn.Linear(4, 10, bias=False)
        self.out.weight = self.tokens.weight


NESTED = nn.Sequential(nn.Sequential(nn.Linear(4, 16), nn.Linear(16, 2)), nn.Linear(4, 4))
ENCODER = nn.TransformerEncoderLayer(8, 2, 16)


@pytest.mark.parametrize(
    ("model", "layers", "message"),
    [
        (Tied(), {nn.Linear: sm.Oblique()}, r"'out.weight' .* output 0 is padding .*say 'per input'"),
        (
            nn.Embedding(4, 4, padding_idx=1),
            {nn.Embedding: sm.Stiefel()},
            "row 1 is padding .* 3 rows are too few for 4",
        ),
        (nn.Embedding(9, 4, max_norm=0.5), {nn.Embedding: sm.Oblique()}, "max_norm shortens its rows as it is called"),
        (
            NESTED,
            {nn.Linear: sm.Stiefel(), nn.Sequential: None},
            "Sequential has no weights of its own; leave modules out",
        ),
        (NESTED, {"*": sm.Stiefel(), "1": None}, "'1' decides nothing: .* put it first"),
        (ENCODER, {"self_attn": (sm.Oblique(), "per head", 4)}, "heads=4, but the attention has 2"),
        (NESTED, {nn.Linear: (sm.Oblique(), "per head", True)}, "must be a positive integer, got True"),
        (NESTED, {nn.Linear: (sm.Oblique(), "per head", 0)}, "must be a positive integer, got 0"),
        (NESTED, {nn.Linear: (sm.Oblique(), "per head", 2.0)}, "must be a positive integer, got 2.0"),
        ({}, {nn.Linear: sm.Oblique()}, "rules_for takes the module itself, got dict"),
    ],
)
def test_what_cannot_hold_or_would_be_ignored(model, layers, message):
    with pytest.raises(ValueError, match=message):
        sm.rules_for(model, layers)


def test_what_is_left_out_is_left_out_with_all_that_is_in_it():
    assert set(sm.rules_for(NESTED, {nn.Linear: sm.Stiefel(), "0": None})) == {"1.weight"}
    assert set(sm.rules_for(NESTED, {"0.1": sm.Stiefel(), "0": None, nn.Linear: sm.Stiefel()})) == {
        "0.1.weight",
        "1.weight",
    }
    assert set(sm.rules_for(nn.Embedding(5, 4, padding_idx=0), {nn.Embedding: sm.Stiefel()})) == {"weight"}


def test_an_output_projection_is_a_linear_layer_unless_its_attention_is_asked_for():
    def words(layers):
        geometry = sm.Geometry.from_rules(dict(ENCODER.named_parameters()), sm.rules_for(ENCODER, layers))
        return {parameter.name: parameter.words for parameter in geometry.parameters}["self_attn.out_proj.weight"]

    assert words({nn.Linear: sm.Oblique()}) == "8 unit outputs of 8"
    assert words({nn.MultiheadAttention: sm.Oblique()}) == "2 times 4 unit inputs of a head of 8"
    assert words({nn.Linear: (sm.Oblique(), "per head", 4)}) == "4 times 2 unit outputs of a head of 8"
