"""The torch.optim contract, for every optimizer: the shell adds names and lifetimes, and changes no number."""

import copy
import io
import pickle
from functools import partial

import optim_models
import pytest
import torch
from making import make_optimizer, normal
from optim_models import (
    INPUTS,
    LABELS,
    ROUNDING,
    RULES,
    assert_equal,
    learned_and_hand_made,
    loss_of,
    network,
    optimizers,
    shell,
    train,
    values,
    without_gradient,
)
from torch.nn import functional

import subspace_meta as sm
from subspace_meta.optim import ProjectionWarning, SubspaceMeta

NAN = torch.full((3, 2), torch.nan)


def functional_run(name, model, steps, lr=1e-2):
    """Return where the functional optimizer leads: what the shell has to give, to rounding."""
    params = {key: value for key, value in values(model).items() if key.endswith("weight")}
    others = {key: value for key, value in values(model).items() if key.endswith("bias")}
    geometry = sm.Geometry.from_rules(params, RULES)
    optimizer = make_optimizer(name, geometry, torch.float64, lr)
    state = optimizer.init(params)
    leaves = [torch.nn.Parameter(value) for value in others.values()]
    adamw = torch.optim.AdamW(leaves)
    for _ in range(steps):
        point = {
            key: value.clone(memory_format=torch.contiguous_format).requires_grad_() for key, value in params.items()
        }
        everything = {**point, **dict(zip(others, leaves, strict=True))}
        loss = functional.cross_entropy(torch.func.functional_call(model, everything, (INPUTS,)), LABELS)
        adamw.zero_grad()
        loss.backward()
        grads = {key: value.grad for key, value in point.items()}
        params, state = optimizer.update(grads, state, params, loss.detach())
        adamw.step()
    return {**params, **{key: leaf.detach() for key, leaf in zip(others, leaves, strict=True)}}


@optimizers
def test_trajectory_is_that_of_the_functional_optimizer(name):
    model = network()
    expected = functional_run(name, model, 7)
    train(shell(name, model), model, 7)
    assert_equal({key: values(model)[key] for key in expected}, expected, ROUNDING)


@optimizers
def test_saved_and_loaded_it_goes_on_as_if_nothing_had_been(name):
    model = network()
    optimizer = shell(name, model)
    train(optimizer, model, 3)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(optimizer, model, 4)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = network(seed=5)
    loaded = shell(name, again)
    again.load_state_dict(saved["model"])
    loaded.load_state_dict(saved["optimizer"])
    train(loaded, again, 4)
    assert_equal(values(again), values(model))


def test_a_saved_state_is_a_copy():
    model = network()
    optimizer = shell("RAdam", model)
    train(optimizer, model, 2)
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    train(optimizer, model, 2)
    assert before["state"].keys() == saved["state"].keys()
    for number, part in saved["state"].items():
        assert all(torch.equal(tensor, before["state"][number][key]) for key, tensor in part.items())


@learned_and_hand_made
def test_state_is_loaded_into_another_dtype(name):
    model = network()
    optimizer = shell(name, model)
    train(optimizer, model, 3)
    saved = optimizer.state_dict()
    short = copy.deepcopy(model).float()
    loaded = shell(name, short, dtype=torch.float32)
    loaded.load_state_dict(saved)
    train(loaded, short, 3)
    train(optimizer, model, 3)
    assert_equal({key: value.double() for key, value in values(short).items()}, values(model), 1e-4)


@learned_and_hand_made
def test_a_model_that_is_converted_after_a_step_is_named_with_the_way_out(name):
    model = network(dtype=torch.float32)
    optimizer = shell(name, model, dtype=torch.float32, others=partial(torch.optim.SGD, lr=0.1))
    train(optimizer, model, 1)
    model.double()
    before = values(model)
    with pytest.raises(ValueError, match=r"'0.weight' is torch.float64 now, and its state torch.float32: .*converted"):
        train(optimizer, model, 1)
    assert_equal(values(model), before)
    (cohort,) = optimizer._groups[0].cohorts
    elsewhere = {key: torch.empty_like(p, dtype=torch.float32, device="meta") for key, p in before.items()}
    with pytest.raises(ValueError, match=r"'0.weight' is meta now, and its state cpu: the model was converted"):
        cohort.check_kind(elsewhere)
    if name == "base":  # made for the dtype by its factory, not by the optimizer of these tests
        optimizer.load_state_dict(optimizer.state_dict())
        train(optimizer, model, 1)
    stateless = network(dtype=torch.float32)
    plain = sm.optim.Riemannian(stateless, RULES, sm.RSGD, lr=0.1, others=partial(torch.optim.SGD, lr=0.1))
    train(plain, stateless, 1)
    train(plain, stateless.double(), 1)


@learned_and_hand_made
def test_a_scheduler_changes_the_rates_of_all_groups(name):
    model, by_hand = network(), network()
    optimizer, other = shell(name, model), shell(name, by_hand)
    first = [group["lr"] for group in optimizer.param_groups]
    assert len(first) == 2
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for step in range(4):
        for group, lr in zip(other.param_groups, first, strict=True):
            group["lr"] = lr * 0.5**step
        train(optimizer, model, 1)
        scheduler.step()
        train(other, by_hand, 1)
    assert_equal(values(model), values(by_hand))
    steady = network()
    train(shell(name, steady), steady, 4)
    assert (steady[0].weight - model[0].weight).abs().max() > 1e-4
    assert (steady[0].bias - model[0].bias).abs().max() > 1e-4


@learned_and_hand_made
def test_a_rate_may_be_a_tensor_and_is_saved(name):
    model, other = network(), network()
    rate = torch.tensor(0.02, dtype=torch.float64)
    optimizer, plain = shell(name, model, lr=rate), shell(name, other, lr=0.02)
    train(optimizer, model, 3)
    train(plain, other, 3)
    assert_equal(values(model), values(other), 1e-12)
    loaded = shell(name, model)
    loaded.load_state_dict(optimizer.state_dict())
    assert loaded.param_groups[0]["lr"] == rate


@learned_and_hand_made
def test_rate_zero_stays_where_it_is(name):
    model = network()
    before = values(model)
    train(shell(name, model, lr=0.0), model, 3)
    for key in ("0.weight", "2.weight"):
        torch.testing.assert_close(values(model)[key], before[key], rtol=0, atol=1e-14)


@learned_and_hand_made
def test_accumulated_gradients_are_one_gradient(name):
    model, other = network(), network()
    optimizer, whole = shell(name, model), shell(name, other)
    for _ in range(3):
        optimizer.zero_grad(set_to_none=False)
        for share in (slice(0, 20), slice(20, 40)):
            (loss_of(model, share) / 2).backward()
        optimizer.step()
        train(whole, other, 1)
    assert_equal(values(model), values(other), 1e-9)


@learned_and_hand_made
def test_without_a_gradient_a_parameter_stays(name):
    model = network()
    optimizer = shell(name, model)
    optimizer.step()  # nothing has a gradient yet
    train(optimizer, model, 1)
    before = values(model)
    train(optimizer, model, 1, without_gradient(model[2].weight))
    after = values(model)
    assert torch.equal(after["2.weight"], before["2.weight"])
    assert not torch.equal(after["0.weight"], before["0.weight"])
    train(optimizer, model, 1)
    assert not torch.equal(values(model)["2.weight"], before["2.weight"])


@learned_and_hand_made
def test_a_parameter_whose_first_gradient_comes_late_starts_then(name):
    model = network()
    optimizer = shell(name, model)
    train(optimizer, model, 2, without_gradient(model[4].weight))
    train(optimizer, model, 2)
    optimizer.check()
    saved = optimizer.state_dict()
    assert [int(saved["state"][number]["cohort"]) for number in range(3)] == [0, 0, 1]
    again = shell(name, model)
    again.load_state_dict(saved)
    assert [int(again.state_dict()["state"][number]["cohort"]) for number in range(3)] == [0, 0, 1]


@learned_and_hand_made
def test_frozen_parameters_are_left_alone_and_taken_up_when_they_have_a_gradient(name):
    model = network()
    with torch.no_grad():
        model[0].weight.mul_(1.5).requires_grad_(False)
    before = values(model)
    optimizer = shell(name, model)  # no warning: frozen weights are not moved
    train(optimizer, model, 2)
    assert torch.equal(values(model)["0.weight"], before["0.weight"])
    assert not torch.equal(values(model)["2.weight"], before["2.weight"])
    model[0].weight.requires_grad_(True)
    with pytest.warns(ProjectionWarning, match=r"0\.weight") as caught:
        train(optimizer, model, 2)
    assert caught[0].filename == optim_models.__file__
    assert (values(model)["0.weight"] - before["0.weight"] / 1.5).abs().max() > 1e-4
    optimizer.check(1e-10)


def test_parameters_may_be_added_later():
    model = network()
    head = [("4.weight", model[4].weight)]
    optimizer = shell("RAdam", [(n, p) for n, p in model.named_parameters() if not n.startswith("4")])
    train(optimizer, model, 2)
    before = values(model)
    optimizer.add_param_group({"params": head, "lr": 0.5, "betas": (0.5, 0.9)})
    train(optimizer, model, 2)
    assert not torch.equal(values(model)["4.weight"], before["4.weight"])
    names = [group.get("param_names") for group in optimizer.param_groups]
    assert names == [["0.weight", "2.weight"], ["4.weight"], ["0.bias", "2.bias"]]
    assert optimizer.param_groups[1]["lr"] == 0.5
    assert optimizer.param_groups[1]["betas"] == (0.5, 0.9)
    optimizer.check()


def test_groups_have_rates_of_their_own():
    model = network()
    before = values(model)
    head = list(model[4].named_parameters(prefix="4"))
    body = [(n, p) for n, p in model.named_parameters() if not n.startswith("4")]
    optimizer = shell("RAdam", [{"params": body, "lr": 0.0}, {"params": head}])
    train(optimizer, model, 2)
    torch.testing.assert_close(values(model)["0.weight"], before["0.weight"], rtol=0, atol=1e-14)
    assert not torch.allclose(values(model)["4.weight"], before["4.weight"])


@learned_and_hand_made
def test_copies_and_pickles_go_on_alike(name):
    model = network()
    optimizer = shell(name, model)
    train(optimizer, model, 2)
    copies = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    train(optimizer, model, 3)
    for its_model, its_optimizer in copies:
        train(its_optimizer, its_model, 3)
        assert_equal(values(its_model), values(model))
        its_optimizer.param_groups[-1]["lr"] = 0.0
        assert its_optimizer.others.param_groups[-1]["lr"] == 0.0


@learned_and_hand_made
def test_a_copy_made_before_the_first_step_is_as_good(name):
    model = network()
    optimizer = shell(name, model)
    for its_model, its_optimizer in (
        copy.deepcopy((model, optimizer)),
        pickle.loads(pickle.dumps((model, optimizer))),
    ):
        assert its_optimizer.defaults == optimizer.defaults
        its_optimizer.load_state_dict(optimizer.state_dict())
        train(its_optimizer, its_model, 2)
        extra = torch.nn.Parameter(torch.eye(3, dtype=torch.float64))
        its_optimizer.add_param_group({"params": [("extra", extra)]})
    train(optimizer, model, 2)
    assert_equal(values(its_model), values(model))


@learned_and_hand_made
def test_gradients_clipped_by_their_global_norm(name):
    model = network()
    optimizer = shell(name, model)
    train(optimizer, model, 3, lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3))
    optimizer.check()


@pytest.mark.skipif(not hasattr(torch.amp, "GradScaler"), reason="torch 2.3 has a scaler for the CPU")
@learned_and_hand_made
def test_gradient_scaler(name):
    model, plain = network(), network()
    optimizer, other = shell(name, model), shell(name, plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=100)
    for step in range(4):
        optimizer.zero_grad()
        scaler.scale(loss_of(model)).backward()
        if step == 1:
            model[0].weight.grad[0, 0] = torch.inf  # the scaler skips this step
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 4.0
    train(other, plain, 3)
    assert_equal(values(model), values(plain), 1e-12)


@learned_and_hand_made
def test_a_closure_is_called_once_and_its_loss_returned(name):
    model, plain = network(), network()
    optimizer, other = shell(name, model), shell(name, plain)
    calls = []

    def closure():
        calls.append(1)
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    for step in range(3):
        expected = float(loss_of(model).detach())
        assert float(optimizer.step(closure).detach()) == expected
        assert len(calls) == step + 1
    train(other, plain, 3)
    assert_equal(values(model), values(plain))


def test_guarded_asks_for_the_loss():
    model = network()
    optimizer = shell("base", model, guarded=True)
    loss_of(model).backward()
    with pytest.raises(ValueError, match="loss"):
        optimizer.step()
    optimizer.step(loss=loss_of(model))
    saved = optimizer.state_dict()
    loaded = shell("base", model)
    loaded.load_state_dict(saved)  # options are saved, as by torch's optimizers
    with pytest.raises(ValueError, match="loss"):
        loaded.step()
    loaded.step(loss=loss_of(model))


def test_tied_weights_are_one_parameter():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = torch.nn.Linear(6, 3, bias=False)
            self.decoder = torch.nn.Linear(6, 3, bias=False)
            self.decoder.weight = self.encoder.weight

        def forward(self, x):
            return self.encoder(x) @ self.decoder.weight

    torch.manual_seed(0)
    model = Tied().double()
    torch.nn.init.orthogonal_(model.encoder.weight)
    optimizer = shell("RAdam", model)
    inputs = normal(20, 6)
    first = last = None
    for _ in range(40):
        optimizer.zero_grad()
        last = (model(inputs) - inputs).square().mean()
        first = first or last
        last.backward()
        optimizer.step()
    assert last < first
    assert model.encoder.weight is model.decoder.weight
    twice = list(model.named_parameters(remove_duplicate=False))
    with pytest.raises(ValueError, match="two names"):
        shell("RAdam", twice)


def test_hooks_run():
    model = network()
    optimizer = shell("RAdam", model)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.register_state_dict_pre_hook(lambda *_: seen.append("saving"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "mark": 1})
    optimizer.register_load_state_dict_pre_hook(lambda *_: seen.append("loading"))
    optimizer.register_load_state_dict_post_hook(lambda *_: seen.append("loaded"))
    train(optimizer, model, 1)
    saved = optimizer.state_dict()
    assert saved["mark"] == 1
    optimizer.load_state_dict(saved)
    assert seen == ["before", "after", "saving", "loading", "loaded"]


@pytest.mark.parametrize("name", ["base", "RAdam", "RSGD momentum"])
def test_a_compiled_step_gives_the_eager_result(name):
    model, plain = network(), network()
    optimizer, other = shell(name, model), shell(name, plain)
    step = torch.compile(optimizer.step, backend="aot_eager")
    for _ in range(4):
        optimizer.zero_grad()
        loss_of(model).backward()
        step()
    train(other, plain, 4)
    assert_equal(values(model), values(plain), 1e-7)  # AdamW of the biases counts its steps in float32 when compiled


def test_convolutions_and_wide_matrices_are_seen_as_tall_ones():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 5, 3), torch.nn.Flatten(), torch.nn.Linear(5 * 4, 30)).double()
    with pytest.warns(ProjectionWarning, match=r"0\.weight, 2\.weight"):
        optimizer = shell("base", model)
    optimizer.check(1e-10)
    model(normal(3, 2, 4, 4)).square().mean().backward()
    optimizer.step()
    kernel = model[0].weight.detach().reshape(5, -1)
    torch.testing.assert_close(kernel @ kernel.T, torch.eye(5, dtype=torch.float64))


def test_the_nearest_point_is_taken_or_the_start_refused():
    model = network()
    with torch.no_grad():
        model[0].weight += 0.1
    off = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match=r"'0\.weight' is not on"):
        shell("base", model, project=False)
    assert torch.equal(model[0].weight, off)
    with pytest.warns(ProjectionWarning, match=r"0\.weight") as caught:
        shell("base", model)
    assert caught[0].filename == optim_models.__file__
    left, _, right = torch.linalg.svd(off, full_matrices=False)
    torch.testing.assert_close(model[0].weight.detach(), left @ right)


def test_others_may_be_any_torch_optimizer_or_none():
    model = network()
    sgd = shell("base", model, others=partial(torch.optim.SGD, lr=0.1, weight_decay=1e-2))
    assert isinstance(sgd.others, torch.optim.SGD)
    everything = shell("base", network(), others=None)
    assert everything.others is None
    assert len(everything.param_groups) == 1
    assert len(everything.param_groups[0]["param_names"]) == 6
    before = values(model)
    train(sgd, model, 1)
    assert not torch.equal(values(model)["0.bias"], before["0.bias"])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_spoiled_gradient_is_named_and_changes_nothing(value):
    model = network()
    optimizer = shell("base", model)
    train(optimizer, model, 1)
    before = values(model)
    model[2].weight.grad[1, 1] = value
    with pytest.raises(ValueError, match=r"'2\.weight' are not finite"):
        optimizer.step()
    assert_equal(values(model), before)
    model[2].weight.grad = model[2].weight.grad.to_sparse()
    with pytest.raises(ValueError, match=r"'2\.weight' is sparse"):
        optimizer.step()
    assert_equal(values(model), before)


class Sharded(torch.Tensor):
    placements = ("Shard(0)",)


@pytest.mark.parametrize(
    ("params", "rules", "settings", "message"),
    [
        (lambda m: m.parameters(), RULES, {}, "rules need names"),
        (lambda m: [], RULES, {}, "no parameters"),
        (lambda m: m, {"*.wieght": sm.Stiefel()}, {}, "matches no parameter"),
        (lambda m: m, {}, {}, "no parameter is on a manifold"),
        (lambda m: m, {"*.weight": sm.SPD()}, {}, "0.weight"),
        (lambda m: [{"params": m, "weight_decay": 0.1}], RULES, {}, "no meaning on a manifold"),
        (lambda m: m.half(), RULES, {}, "too short"),
        (lambda m: m, RULES, {"lr": -1.0}, "not negative"),
        (lambda m: m, RULES, {"weights": {}}, "missing"),
        (lambda m: [("a.weight", torch.nn.Parameter(torch.eye(3).as_subclass(Sharded)))], RULES, {}, "is sharded"),
        (lambda m: [{"params": m}, {"params": m}], RULES, {}, "two groups"),
        (lambda m: [("0.weight", torch.nn.Parameter(NAN))], RULES, {}, "weight' are not finite"),
        (lambda m: torch.nn.Sequential(torch.nn.LazyLinear(3)), RULES, {}, "'0.weight' of a lazy module has no shape"),
        (lambda m: [{"params": []}, {"params": m}], RULES, {}, "group has no parameters"),
    ],
)
def test_what_is_wrong_is_said(params, rules, settings, message):
    with pytest.raises(ValueError, match=message):
        shell("base", params(network()), rules, **settings)


def changed_state(saved, number=0, **fields):
    return {**saved, "state": {**saved["state"], number: {**saved["state"][number], **fields}}}


def test_a_state_that_does_not_fit_is_refused_and_nothing_changed():
    model = network()
    optimizer = shell("base", model)
    train(optimizer, model, 2)
    saved = optimizer.state_dict()
    fewer = {**saved, "param_groups": saved["param_groups"][:1]}
    other_names = copy.deepcopy(saved)
    other_names["param_groups"][0]["param_names"][1] = "other.weight"
    swapped, regrouped = copy.deepcopy(saved), copy.deepcopy(saved)
    swapped["param_groups"][0]["param_names"][:2] = ["2.weight", "0.weight"]
    for key in ("params", "param_names"):
        regrouped["param_groups"][0][key].append(regrouped["param_groups"][1][key].pop(0))
    without_peak = {key: value for key, value in saved["state"][0].items() if key != "peak"}
    without_cohort = {key: value for key, value in saved["state"][0].items() if key != "cohort"}
    for wrong, message in (
        ({"state": [], "param_groups": [], "format": 1}, "an earlier layout"),
        (fewer, "of other parameters: it lacks '0.bias', '2.bias', '4.bias'$"),
        (other_names, r"of other parameters: it lacks '2.weight', and this optimizer does not have 'other\.weight'$"),
        (swapped, "of other parameters: they stand in another order, '2.weight' where '0.weight' is here$"),
        (regrouped, r"of other parameters: its groups are of \[4, 2\] parameters, here they are of \[3, 3\]$"),
        ({**saved, "state": {**saved["state"], 0: without_cohort}}, "'0.weight' is of another optimizer"),
        (
            changed_state(saved, momentum=torch.zeros(2, 2)),
            r"'0.weight' was saved for shape \(2, 2\), here .*\(5, 7\)$",
        ),
        (changed_state(saved, peak=torch.zeros(2)), r"other settings: 'peak' has shape \(2,\), here it is \(1,\)$"),
        (changed_state(saved, odd=torch.zeros(2)), "'0.weight' is .*: it has 'odd', which this one does not keep$"),
        ({**saved, "state": {**saved["state"], 0: without_peak}}, "'0.weight' is of another .*: it has no 'peak'$"),
        (changed_state(saved, step=torch.tensor(7.0, dtype=torch.float64)), "disagree about 'step'"),
        (torch.optim.AdamW(model.parameters()).state_dict(), "no param_names"),
        (shell("RAdam", network()).state_dict(), "another optimizer.*'betas'"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(wrong)
        kept = optimizer.state_dict()
        assert all(torch.equal(kept["state"][0][key], value) for key, value in saved["state"][0].items())
    with_sgd = shell("base", network(), others=partial(torch.optim.SGD, lr=0.1, momentum=0.9))
    with pytest.raises(ValueError, match="state is not of SGD: it has no option 'momentum'"):
        with_sgd.load_state_dict(saved)
    hand_made = shell("RAdam", network())
    with pytest.raises(ValueError, match="another optimizer"):
        hand_made.load_state_dict(saved)
    train(hand_made, network(), 1)


def test_float32_master_weights_take_the_shipped_weights():
    model = network(dtype=torch.float32)
    first = float(loss_of(model).detach())
    optimizer = SubspaceMeta(model, RULES)
    train(optimizer, model, 20)
    assert float(loss_of(model).detach()) < first
    assert max(optimizer.check(1e-5).values()) < 1e-5
