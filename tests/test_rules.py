"""Rules by module type: the side that is named is the orthonormal one, or the one of unit length, in plain torch."""

import glob
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from making import normal
from torch import nn

import subspace_meta as sm

STIEFEL, OBLIQUE = sm.Stiefel(), sm.Oblique()


def vectors_of(kind, weight, side, module):
    """Return what is claimed to be vectors, ``(batch, count, dimension)``, by plain indexing of the weight."""
    if kind in ("conv", "transposed"):
        groups = module.groups
        first, second = weight.shape[:2]
        grouped = weight.reshape(groups, first // groups, second, -1)
        outputs = grouped.transpose(1, 2) if kind == "transposed" else grouped  # groups, out, in, taps
        if side == "per tap":
            return outputs.flatten(2).mT
        return (outputs if side == "per output" else outputs.transpose(1, 2)).flatten(2)
    if kind == "gates":
        gated = weight.reshape(module, -1, weight.shape[-1])
        return gated if side == "per output" else gated.mT
    if kind == "heads":  # rows are the outputs of heads
        return weight.reshape(module, -1, weight.shape[-1])
    if kind == "head inputs":
        return weight.T.reshape(module, -1, weight.shape[0])
    return (weight if side in ("per output", "per token") else weight.T)[None]


LAYERS = {
    "Linear 50 8": (partial(nn.Linear, 50, 8), "weight", "linear", "per output", 8),
    "Linear 8 50": (partial(nn.Linear, 8, 50), "weight", "linear", "per input", 8),
    "Conv1d": (partial(nn.Conv1d, 4, 8, 3), "weight", "conv", "per output", 8),
    "Conv2d": (partial(nn.Conv2d, 3, 8, 5), "weight", "conv", "per output", 8),
    "Conv3d": (partial(nn.Conv3d, 2, 5, 2), "weight", "conv", "per output", 5),
    "grouped": (partial(nn.Conv2d, 4, 6, 3, groups=2), "weight", "conv", "per output", 3),
    "depthwise": (partial(nn.Conv2d, 6, 6, 3, groups=6), "weight", "conv", "per output", 1),
    "ConvTranspose2d": (partial(nn.ConvTranspose2d, 4, 6, 3), "weight", "transposed", "per output", 6),
    "grouped transposed": (partial(nn.ConvTranspose1d, 4, 6, 3, groups=2), "weight", "transposed", "per output", 3),
    "many filters": (partial(nn.Conv2d, 2, 30, 3), "weight", "conv", "per tap", 18),
    "LSTM": (partial(nn.LSTM, 9, 5), "weight_ih_l0", "gates", "per output", 5),
    "GRUCell": (partial(nn.GRUCell, 9, 5), "weight_ih", "gates", "per output", 5),
    "RNN": (partial(nn.RNN, 9, 5), "weight_hh_l0", "gates", "per output", 5),
    "attention": (partial(nn.MultiheadAttention, 8, 2), "in_proj_weight", "heads", "per head", 4),
    "attention, keys apart": (partial(nn.MultiheadAttention, 8, 2, kdim=6), "k_proj_weight", "heads", "per head", 4),
    "attention, out": (partial(nn.MultiheadAttention, 8, 2), "out_proj.weight", "head inputs", "per head", 4),
}
GATES = {"LSTM": 4, "GRUCell": 3, "RNN": 1, "attention": 6, "attention, keys apart": 2, "attention, out": 2}


def checked(name, manifold, side=""):
    """Return the vectors of a layer's weight after projection on the manifold, and its rules."""
    make, weight, kind, _, _ = LAYERS[name]
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": make()}).double()
    rules = sm.rules_for(model, {type(model["layer"]): (manifold, side) if side else manifold})
    params = {key: value.detach() for key, value in model.named_parameters()}
    geometry = sm.Geometry.from_rules(params, rules)
    params = geometry.project(params)
    optimizer = sm.RSGD(geometry, 0.05)
    grads = {key: normal(*value.shape, seed=1) for key, value in params.items()}
    params, _ = optimizer.update(grads, optimizer.init(params), params)
    found = next(p for p in geometry.parameters if p.name == f"layer.{weight}")
    shown = vectors_of(kind, params[f"layer.{weight}"], side or LAYERS[name][3], GATES.get(name, model["layer"]))
    return shown, found, model, rules


@pytest.mark.parametrize("name", LAYERS)
def test_the_usual_side_is_orthonormal(name):
    vectors, found, model, rules = checked(name, STIEFEL)
    count, dimension = vectors.shape[-2:]
    assert count == LAYERS[name][4]
    torch.testing.assert_close(vectors @ vectors.mT, torch.eye(count).double().expand(len(vectors), count, count))
    assert f"{count} orthonormal " in found.words
    assert found.words.endswith(f" of {dimension}")
    with pytest.warns(sm.optim.ProjectionWarning):
        optimizer = sm.optim.Riemannian(model, rules, sm.RSGD, lr=1e-2)
    sum(p.square().sum() for p in model.parameters()).backward()
    optimizer.step()
    optimizer.check(1e-10)
    assert not any("bias" in key for key in rules)


@pytest.mark.parametrize("side", ["per output", "per input"])
@pytest.mark.parametrize("name", [n for n in LAYERS if LAYERS[n][2] in ("linear", "conv", "transposed", "gates")])
def test_each_side_has_unit_vectors(name, side):
    if name == "depthwise" and side == "per input":
        pytest.skip("one output each: the same vectors")
    vectors, found, *_ = checked(name, OBLIQUE, side)
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(vectors.shape[:-1]).double())
    matrices = len(vectors) if LAYERS[name][2] in ("conv", "transposed") else 1  # unit vectors know of no groups
    assert f"{matrices * vectors.shape[-2]} unit " in found.words


def test_tokens_and_features_of_embeddings():
    model = nn.Sequential(nn.Embedding(30, 7))
    for manifold, side, along, text in (
        (OBLIQUE, "", -1, "30 unit tokens of 7"),
        (OBLIQUE, "per feature", 0, "7 unit features of 30"),
        (STIEFEL, "", 0, "7 orthonormal features of 30"),
    ):
        rules = sm.rules_for(model, {nn.Embedding: (manifold, side)})
        geometry = sm.Geometry.from_rules(dict(model.named_parameters()), rules)
        weight = geometry.project({"0.weight": model[0].weight})["0.weight"]
        torch.testing.assert_close(weight.norm(dim=along), torch.ones(7 if along == 0 else 30))
        assert geometry.parameters[0].words == text
    few = nn.Sequential(nn.Embedding(3, 7))
    rules = sm.rules_for(few, {nn.Embedding: STIEFEL})
    assert (
        sm.Geometry.from_rules(dict(few.named_parameters()), rules).parameters[0].words == "3 orthonormal tokens of 7"
    )


def test_recurrent_rotations_take_the_square_weights():
    model = nn.LSTM(9, 5, num_layers=2, bidirectional=True, proj_size=3)
    rules = sm.rules_for(model, {nn.LSTM: STIEFEL})
    assert len([key for key in rules if key.startswith("weight_hr")]) == 4
    plain = nn.LSTM(9, 5, num_layers=2, bidirectional=True)
    rules = sm.rules_for(plain, {nn.LSTM: sm.Rotations()})
    assert sorted(rules) == sorted(name for name, _ in plain.named_parameters() if name.startswith("weight_hh"))
    geometry = sm.Geometry.from_rules(dict(plain.named_parameters()), rules)
    params = geometry.project(dict(plain.named_parameters()))
    gates = params["weight_hh_l1"].reshape(4, 5, 5)
    torch.testing.assert_close(torch.linalg.det(gates), torch.ones(4))


class Narrow(nn.Linear):
    """A subclass with a rule of its own."""


def test_the_most_specific_type_wins_and_attention_keeps_its_output():
    model = nn.ModuleDict({"a": nn.Linear(9, 3), "b": Narrow(9, 3), "attention": nn.MultiheadAttention(8, 2)})
    rules = sm.rules_for(model, {nn.Linear: OBLIQUE, Narrow: STIEFEL, nn.MultiheadAttention: sm.Grassmann()})
    assert {key: rule.manifold.name for key, rule in rules.items()} == {
        "a.weight": "Oblique",
        "b.weight": "Stiefel",
        "attention.in_proj_weight": "Grassmann",
        "attention.out_proj.weight": "Grassmann",
    }
    assert "attention.out_proj.weight" in sm.rules_for(model, {nn.Linear: OBLIQUE})


def test_tied_weights_have_one_rule():
    model = nn.ModuleDict({"encoder": nn.Embedding(20, 6), "decoder": nn.Linear(6, 20, bias=False)})
    model["decoder"].weight = model["encoder"].weight
    same = {nn.Embedding: (OBLIQUE, "per token"), nn.Linear: (OBLIQUE, "per output")}
    assert list(sm.rules_for(model, same)) == ["encoder.weight"]  # rows of length one, by either name
    with pytest.raises(ValueError, match=r"'encoder.weight' and 'decoder.weight' are one parameter, .* rules differ"):
        sm.rules_for(model, {**same, nn.Linear: (OBLIQUE, "per input")})
    assert list(sm.rules_for(model, {nn.Embedding: OBLIQUE})) == ["encoder.weight"]
    twice = nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 3)])
    twice[1].weight = twice[0].weight
    assert list(sm.rules_for(twice, {nn.Linear: STIEFEL})) == ["0.weight"]


def test_names_with_brackets_are_escaped():
    model = nn.Module()
    model.add_module("h[0]", nn.Linear(5, 2))
    rules = sm.rules_for(model, {nn.Linear: STIEFEL})
    assert list(rules) == [glob.escape("h[0].weight")]
    assert sm.Geometry.from_rules(dict(model.named_parameters()), rules).parameters[0].manifold == STIEFEL


PARAMETRIZED = nn.utils.parametrizations.orthogonal


@pytest.mark.parametrize(
    ("model", "chosen", "message"),
    [
        (nn.Linear(5, 2), {3: STIEFEL}, "is no type of module"),
        (nn.Linear(5, 2), {nn.Linear: "Stiefel"}, "write a manifold, Stiefel"),
        (nn.Linear(5, 2), {nn.Linear: (STIEFEL, "per output", 1)}, "write a manifold, Stiefel"),
        (nn.Linear(5, 2), {nn.Conv2d: STIEFEL}, "Conv2d matches no module of the model; there are Linear"),
        (
            nn.Linear(5, 2),
            {nn.Linear: (STIEFEL, "per row")},
            "has no side 'per row'; it has 'per output', 'per input'$",
        ),
        (
            nn.Linear(50, 8),
            {nn.Linear: (STIEFEL, "per input")},
            r"\(Linear, shape 8 x 50\) cannot be Stiefel per input: 50 inputs of dimension 8 .*'per output'",
        ),
        (nn.Linear(5, 2), {nn.Linear: sm.Rotations()}, "Rotations needs square matrices.*None"),
        (nn.LayerNorm(5), {nn.LayerNorm: STIEFEL}, "no sides are known for LayerNorm"),
        (nn.LazyLinear(5), {nn.LazyLinear: STIEFEL}, "'weight' of a lazy module has no shape yet: call the model once"),
        (
            PARAMETRIZED(nn.Linear(5, 2)),
            {nn.Linear: STIEFEL},
            "weight' is parametrized .*take the parametrization away",
        ),
    ],
)
def test_what_is_wrong_is_said(model, chosen, message):
    with pytest.raises(ValueError, match=message):
        sm.rules_for(model, chosen)


def test_words_of_plain_rules_say_what_is_seen():
    params = {"wide": torch.empty(3, 60), "tall": torch.empty(60, 3), "conv": torch.empty(8, 3, 5, 5)}
    geometry = sm.Geometry.from_rules({**params, "cov": torch.empty(4, 4)}, {"cov": sm.SPD(), "*": OBLIQUE})
    assert [p.words for p in geometry.parameters] == [
        "3 unit rows of 60",
        "3 unit columns of 60",
        "8 unit filters of 75",
        "",
    ]
    assert "3 unit rows of 60" in geometry.summary()
    heads = sm.Geometry.from_rules({"w": torch.empty(6, 10)}, {"w": sm.Rule(STIEFEL, sm.MatrixView.heads(2))})
    assert heads.parameters[0].words == "2 times 3 orthonormal columns of 10"


def test_points_on_a_sphere_as_wide_columns():
    points = torch.nn.functional.normalize(normal(3, 60), dim=0)
    seen_wrong = sm.Geometry.from_rules({"x": points}, {"x": OBLIQUE})
    with pytest.raises(ValueError, match=r"seen transposed, as 60 x 3.*the rule is Rule\(manifold, MatrixView\(\)\)"):
        seen_wrong.check_feasible({"x": points})
    seen = sm.Geometry.from_rules({"x": points}, {"x": sm.Rule(OBLIQUE, sm.MatrixView())})
    seen.check_feasible({"x": points}, 1e-12)
    assert math.prod(seen.parameters[0].matrix_shape) == 180
    assert seen.parameters[0].matrix_shape == (3, 60)


def test_the_page_about_rules_runs():
    page = (Path(__file__).parents[1] / "docs" / "rules.md").read_text(encoding="utf-8")
    block = page.split("```python\n")[1].split("```")[0]
    names = {}
    with pytest.warns(sm.optim.ProjectionWarning):
        exec(block, names)
    assert set(names["rules"]) == {"0.weight", "1.weight", "2.weight", "3.in_proj_weight", "3.out_proj.weight"}
    names["optimizer"].check(1e-5)


def test_a_rule_takes_no_words():
    with pytest.raises(ValueError, match=r"got Rule\(Stiefel.*'per output'\); sides in words are for rules_for"):
        sm.Rule(STIEFEL, "per output")
    with pytest.raises(ValueError, match=r"a manifold and a MatrixView or None, got Rule\('Stiefel', None\)$"):
        sm.Rule("Stiefel")
