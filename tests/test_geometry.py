"""Geometry: rules, matrix views, groups, and errors that name the parameter and both shapes."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from making import normal

import subspace_meta as sm
from subspace_meta.geometry import GROUPING_LIMIT, default_view


def params_of(**shapes):
    return {name.replace("_", "."): normal(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}


def test_rules_are_globs_and_the_first_match_counts():
    params = params_of(layer1_weight=(4, 2), layer2_weight=(4, 2), layer2_bias=(4,), head=(5, 5))
    rules = {"layer1.*": sm.Grassmann(), "*.weight": sm.Stiefel()}
    geometry = sm.Geometry.from_rules(params, rules)
    assert geometry.names == tuple(params)
    assert [p.manifold for p in geometry.parameters] == [sm.Grassmann(), sm.Stiefel(), sm.Euclidean(), sm.Euclidean()]
    reversed_rules = dict(reversed(rules.items()))
    assert sm.Geometry.from_rules(params, reversed_rules).parameters[0].manifold == sm.Stiefel()


def test_globs_match_case():
    with pytest.raises(ValueError, match=re.escape("rule 'w*' matches no parameter; the names are W, bias")):
        sm.Geometry.from_rules(params_of(W=(4, 2), bias=(4,)), {"w*": sm.Stiefel()})


def test_a_name_matches_itself_brackets_and_all():
    params = {"h[0].w": normal(4, 2), "h0.w": normal(4, 2)}
    geometry = sm.Geometry.from_rules(params, {"h[0].w": sm.Stiefel()})
    assert [p.manifold.name for p in geometry.parameters] == ["Stiefel", "Stiefel"]  # and it is a pattern, too
    with pytest.raises(ValueError, match=r"'h\[1\].w' matches no parameter; .*glob.escape\(name\)"):
        sm.Geometry.from_rules(params, {"h[1].w": sm.Stiefel()})


def test_lazy_parameters_have_no_shape():
    with pytest.raises(ValueError, match="'weight' of a lazy module has no shape yet"):
        sm.Geometry.from_rules(dict(torch.nn.LazyLinear(3).named_parameters()), {"weight": sm.Stiefel()})


def test_gradients_whose_squares_overflow_are_named():
    params = {"x": normal(4, 2, dtype=torch.float32)}
    geometry = sm.Geometry.from_rules(params)
    geometry.check_gradients({"x": 1e15 * params["x"]})
    with pytest.raises(ValueError, match=r"gradient of 'x' has entries up to 1e\+20, whose squares overflow"):
        geometry.check_gradients({"x": torch.full((4, 2), 1e20)})


def test_no_parameters_is_an_error():
    with pytest.raises(ValueError, match="there are no parameters"):
        sm.Geometry.from_rules({}, {"x": sm.Stiefel()})


def test_stacked_sets_are_seen_as_one_more_batch_dimension():
    params = params_of(conv=(8, 3, 2, 2), heads=(6, 5), w=(5, 3), v=(5, 3), b=(4,), scale=())
    rules = {"conv": sm.Stiefel(), "heads": sm.Rule(sm.Stiefel(), sm.MatrixView.heads(2)), "[wv]": sm.Grassmann()}
    geometry = sm.Geometry.from_rules(params, rules)
    sets = [geometry.initialize(torch.Generator().manual_seed(seed)) for seed in range(3)]
    stacked = geometry.stacked(3)
    together = {name: torch.stack([one[name] for one in sets]) for name in sets[0]}
    stacked.check(together)
    stacked.check_feasible(together)
    gathered = stacked.gather(together)
    assert [x.shape for x in gathered] == [group.shape for group in stacked.groups]
    assert len(gathered) == len(geometry.groups)
    for i, one in enumerate(sets):
        for group, part, whole in zip(geometry.groups, geometry.gather(one), gathered, strict=True):
            assert torch.equal(whole[:, i] if len(group.members) > 1 else whole[i], part)
    back = stacked.scatter(gathered)
    assert list(back) == list(together)
    assert all(torch.equal(back[name], together[name]) for name in back)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_points_are_refused_by_name(dtype):
    geometry = sm.Geometry.from_rules(params_of(W=(4, 2)), {"W": sm.Stiefel()})
    short = {name: x.to(dtype) for name, x in geometry.initialize(torch.Generator()).items()}
    for call in (geometry.project, sm.RSGD(geometry, 0.1).init):
        with pytest.raises(ValueError, match=r"'W' has dtype torch.b?float16, too short .* float32 master"):
            call(short)


@pytest.mark.parametrize("rule", [sm.Stiefel, "Stiefel", None])
def test_a_rule_is_a_manifold(rule):
    with pytest.raises(ValueError, match=r"rule 'W' is .*, which is no manifold; write for instance Stiefel\(\)"):
        sm.Geometry.from_rules(params_of(W=(4, 2)), {"W": rule})


@pytest.mark.parametrize(
    ("shape", "matrix", "euclidean_matrix"),
    [
        ((), (1, 1), (1, 1)),
        ((5,), (5, 1), (5, 1)),
        ((5, 2), (5, 2), (5, 2)),
        ((2, 5), (5, 2), (2, 5)),
        ((3, 5, 2), (3, 5, 2), (3, 5, 2)),
        ((3, 2, 5), (3, 5, 2), (3, 2, 5)),
        ((4, 2, 3, 3), (18, 4), (4, 18)),  # a convolution: out x (in * kernel)
        ((32, 2, 3, 3), (32, 18), (32, 18)),
        ((4, 2, 3, 3, 3), (54, 4), (4, 54)),
    ],
)
def test_views(shape, matrix, euclidean_matrix):
    x = normal(*shape)
    for manifold, expected in ((sm.Stiefel(), matrix), (sm.Euclidean(), euclidean_matrix)):
        view = default_view(shape, manifold)
        assert view.to_matrix(x).shape == expected
        assert torch.equal(view.from_matrix(view.to_matrix(x)), x)
        assert hash(view) == hash(default_view(shape, manifold))


def test_the_view_of_a_convolution_is_its_matrix():
    x = normal(32, 2, 3, 3)
    assert torch.equal(default_view(x.shape, sm.Stiefel()).to_matrix(x), x.reshape(32, 18))
    y = normal(4, 2, 3, 3)
    assert torch.equal(default_view(y.shape, sm.Stiefel()).to_matrix(y), y.reshape(4, 18).T)
    z = normal(3, 2, 5)
    assert torch.equal(default_view(z.shape, sm.Stiefel()).to_matrix(z), z.mT)


def test_heads_are_a_batch_of_tall_blocks():
    view = sm.MatrixView.heads(4)
    weight = normal(12, 16)
    geometry = sm.Geometry.from_rules({"query": weight}, {"query": sm.Rule(sm.Stiefel(), view)})
    assert geometry.groups[0].shape == (4, 16, 3)
    feasible = geometry.project({"query": weight})["query"]
    for head in feasible.unflatten(0, (4, 3)):
        assert torch.allclose(head @ head.T, torch.eye(3, dtype=weight.dtype), atol=1e-12)
    with pytest.raises(ValueError, match=r"parameter 'query' of shape \(13, 16\) on Stiefel"):
        sm.Geometry.from_rules({"query": normal(13, 16)}, {"query": sm.Rule(sm.Stiefel(), view)})


def test_a_view_of_the_users_own():
    """Attention heads as a batch of tall matrices."""
    view = sm.MatrixView("(h e) d -> h d e", (("h", 4),))
    geometry = sm.Geometry.from_rules({"query": normal(12, 16)}, {"query": sm.Rule(sm.Stiefel(), view)})
    assert geometry.parameters[0].matrix_shape == (4, 16, 3)
    params = geometry.initialize(torch.Generator().manual_seed(0))
    heads = params["query"].reshape(4, 3, 16)
    assert (heads @ heads.mT - torch.eye(3)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("shape", "rule", "message"),
    [
        ((), sm.Rule(sm.Stiefel(), sm.MatrixView("a b -> b a")), r"parameter 'w' of shape \(\) on Stiefel: "),
        (
            (3, 4, 2),
            sm.Rule(sm.Stiefel(), sm.MatrixView("a b c -> a (c b)")),
            r"'w' of shape \(3, 4, 2\).*got \(3, 8\)",
        ),
        (
            (6, 2),
            sm.Rule(sm.Stiefel(), sm.MatrixView("a (b c) -> a b c", (("b", 3),))),
            r"'w' of shape \(6, 2\) on Sti",
        ),
        (
            (10, 288),
            sm.SPD(),
            r"'w' of shape \(10, 288\), seen as 288 x 10, on SPD: .* square .*; give it another manifold, leave it out",
        ),
        ((1, 2, 1, 1, 1, 1), sm.Stiefel(), r"'w' of shape \(1, 2, 1, 1, 1, 1\) .* no matrix view is known for 6 dim"),
        ((4, 0), sm.Stiefel(), r"'w' of shape \(4, 0\) has no entries"),
    ],
)
def test_shapes_that_cannot_be(shape, rule, message):
    with pytest.raises(ValueError, match=message):
        sm.Geometry.from_rules({"w": torch.zeros(shape)}, {"w": rule})


def test_groups_stack_small_equal_matrices():
    params = params_of(a=(6, 2), b=(2, 6), c=(6, 2), d=(6, 2), e=(6, 3), f=(2, 6, 2))
    rules = {"c": sm.Grassmann(), "[abdef]": sm.Stiefel()}
    geometry = sm.Geometry.from_rules(params, rules)
    assert [[m.name for m in g.members] for g in geometry.groups] == [["a", "b", "d"], ["c"], ["e"], ["f"]]
    assert [g.shape for g in geometry.groups] == [(3, 6, 2), (6, 2), (6, 3), (2, 6, 2)]
    assert [g.manifold for g in geometry.groups] == [sm.Stiefel(), sm.Grassmann(), sm.Stiefel(), sm.Stiefel()]
    different = sm.Geometry.from_rules(
        params_of(a=(6, 2), b=(6, 2)), {"a": sm.Stiefel(), "b": sm.Stiefel(sm.PolarNewtonSchulz())}
    )
    assert len(different.groups) == 2


def test_large_matrices_stay_alone():
    p = 64
    small, large = GROUPING_LIMIT // p - 1, GROUPING_LIMIT // p
    names = {f"{kind}{i}": torch.empty(d, p, device="meta") for kind, d in (("s", small), ("l", large)) for i in (0, 1)}
    geometry = sm.Geometry.from_rules(names)
    assert [len(g.members) for g in geometry.groups] == [2, 1, 1]


shapes = st.lists(
    st.sampled_from([(), (4,), (5, 2), (2, 5), (3, 5, 2), (3, 2, 5), (4, 2, 3, 3), (9, 2, 2, 2)]),
    min_size=1,
    max_size=6,
)


@given(shapes=shapes, seed=st.integers(0, 1000))
def test_gather_and_scatter_are_inverse(shapes, seed):
    params = {f"x{i}": normal(*shape, seed=seed + i) for i, shape in enumerate(shapes)}
    for manifold in (sm.Stiefel(), sm.Euclidean()):
        geometry = sm.Geometry.from_rules(params, {"*": manifold})
        gathered = geometry.gather(params)
        assert [tuple(x.shape) for x in gathered] == [group.shape for group in geometry.groups]
        scattered = geometry.scatter(gathered)
        assert list(scattered) == list(params)
        assert all(torch.equal(scattered[name], params[name]) for name in params)
        assert all(scattered[name].shape == params[name].shape for name in params)


@given(shapes=shapes, seed=st.integers(0, 1000))
def test_project_and_initialize_are_feasible(shapes, seed):
    params = {f"x{i}": normal(*shape, seed=seed + i) for i, shape in enumerate(shapes)}
    for manifold in (sm.Stiefel(), sm.Grassmann()):
        geometry = sm.Geometry.from_rules(params, {"*": manifold})
        projected = geometry.project(params)
        geometry.check_feasible(projected, 1e-12)
        again = geometry.project(projected)
        assert all(torch.allclose(again[k], projected[k], atol=1e-12) for k in params)
        geometry.check_feasible(geometry.initialize(torch.Generator().manual_seed(seed), torch.float64), 1e-12)


def test_project_is_nearest_and_leaves_the_input():
    params = params_of(w=(6, 2), b=(3,))
    before = {name: value.clone() for name, value in params.items()}
    geometry = sm.Geometry.from_rules(params, {"w": sm.Stiefel()})
    projected = geometry.project(params)
    assert all(torch.equal(params[name], before[name]) for name in params)
    assert torch.equal(projected["b"], params["b"])
    best = (projected["w"] - params["w"]).norm()
    for seed in range(5):
        other = sm.Stiefel().random_point((6, 2), torch.Generator().manual_seed(seed), torch.float64)
        assert (other - params["w"]).norm() > best


def test_initialize_repeats_and_scales():
    geometry = sm.Geometry.from_rules({"w": torch.empty(6, 2), "v": torch.empty(500, 400)}, {"w": sm.Stiefel()})
    a, b, c = (geometry.initialize(torch.Generator().manual_seed(s), torch.float32) for s in (0, 0, 1))
    assert torch.equal(a["w"], b["w"])
    assert not torch.equal(a["w"], c["w"])
    assert a["w"].dtype == torch.float32
    assert float(a["v"].std()) == pytest.approx(400**-0.5, rel=0.05)


def test_violation_sees_what_float32_cannot():
    params = {"w": sm.Stiefel().random_point((6, 2), torch.Generator().manual_seed(0), torch.float64), "b": normal(3)}
    geometry = sm.Geometry.from_rules(params, {"w": sm.Stiefel()})
    assert geometry.violation(params)["w"] < 1e-14
    assert geometry.violation(params)["b"] == 0.0
    params["w"] = params["w"] * (1 + 1e-9)
    assert geometry.violation(params)["w"] == pytest.approx(2e-9, rel=1e-3)
    batch = torch.stack([params["w"], 2 * params["w"]])
    assert sm.Geometry.from_rules({"x": batch}, {"x": sm.Stiefel()}).violation({"x": batch})["x"] == pytest.approx(3.0)


def test_check_feasible_names_the_parameter():
    params = {"encoder.w": torch.eye(4, 2), "decoder.w": 2 * torch.eye(4, 2)}
    geometry = sm.Geometry.from_rules(params, {"*.w": sm.Stiefel()})
    message = r"parameter 'decoder.w' is not on Stiefel: constraint violation 3.00e\+00 is above 1e-03; start from geom"
    with pytest.raises(ValueError, match=message):
        geometry.check_feasible(params)
    geometry.check_feasible(params, tolerance=4.0)
    params["decoder.w"] = torch.full((4, 2), math.nan)
    with pytest.raises(ValueError, match=r"'decoder.w'.*nan"):
        geometry.check_feasible(params)


def test_check_names_what_does_not_fit():
    params = params_of(w=(6, 2), b=(3,))
    geometry = sm.Geometry.from_rules(params, {"w": sm.Stiefel()})
    geometry.check(params)
    with pytest.raises(ValueError, match=r"gradient names .*missing \['b'\], unknown \['c'\]; expected \['w', 'b'\]"):
        geometry.check({"w": params["w"], "c": params["b"]}, "gradient")
    with pytest.raises(ValueError, match=r"missing \[\], unknown \['c'\]"):
        geometry.check({**params, "c": params["b"]})
    with pytest.raises(ValueError, match=r"missing \['b'\], unknown \[\]"):
        geometry.check({"w": params["w"]})
    with pytest.raises(ValueError, match=r"parameter 'w' has shape \(2, 6\), the geometry says \(6, 2\)"):
        geometry.check({**params, "w": params["w"].T})
    with pytest.raises(ValueError, match=r"parameter 'b' has dtype torch.int64"):
        geometry.check({**params, "b": torch.arange(3)})


def test_summary_lists_every_parameter():
    params = params_of(conv_weight=(4, 2, 3, 3), conv_bias=(4,), head=(10, 3))
    text = sm.Geometry.from_rules(params, {"conv.weight": sm.Stiefel(), "head": sm.Grassmann()}).summary()
    lines = text.splitlines()
    assert len(lines) == 1 + 3 + 1
    assert all(line == line.rstrip() for line in lines)
    (convolution,) = [line for line in lines if "conv.weight" in line]
    for word in ("Stiefel", "4 x 2 x 3 x 3", "18 x 4", str(18 * 4 - 10)):
        assert word in convolution
    assert f"{18 * 4 - 10 + 4 + 21}" in lines[-1]
    assert "3 parameters in 3 groups" in lines[-1]


def test_equal_geometries_are_one_key():
    params = params_of(w=(6, 2), b=(3,))
    a, b = (sm.Geometry.from_rules(params, {"w": sm.Stiefel()}) for _ in range(2))
    assert a == b
    assert len({a, b}) == 1
    assert a != sm.Geometry.from_rules(params, {"w": sm.Grassmann()})


def test_project_cuts_the_graph():
    geometry = sm.Geometry.from_rules({"w": normal(4, 2)}, {"w": sm.Stiefel()})
    assert not geometry.project({"w": torch.nn.Parameter(normal(4, 2))})["w"].requires_grad


def test_bad_gradients_are_named():
    geometry = sm.Geometry.from_rules({"w": normal(4, 2), "b": normal(3)}, {"w": sm.Stiefel()})
    good = {"w": normal(4, 2), "b": normal(3)}
    geometry.check_gradients(good)
    spoiled = normal(4, 2)
    spoiled[1, 1] = torch.nan
    with pytest.raises(ValueError, match=r"gradient of 'w' has 1 non-finite entries of 8"):
        geometry.check_gradients({**good, "w": spoiled})
    with pytest.raises(ValueError, match=r"gradient names do not fit the geometry: missing \['b'\]"):
        geometry.check_gradients({"w": good["w"]})
    with pytest.raises(ValueError, match=r"gradient 'b' has shape \(4,\), the geometry says \(3,\)"):
        geometry.check_gradients({**good, "b": normal(4)})
