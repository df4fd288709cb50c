"""Every key of a parameter group is honoured or refused by name, at any time."""

import dataclasses
from functools import partial
from pathlib import Path

import pytest
import torch
from optim_models import ROUNDING, RULES, assert_equal, learned_and_hand_made, network, shell, train, values
from torch.optim import lr_scheduler

import subspace_meta as sm
from subspace_meta.optim import Riemannian, SubspaceMeta, options

# Each setting of each optimizer: another value than the default's.
OTHER = {
    sm.RSGD: {"momentum": 0.8},
    sm.RAdam: {"betas": (0.5, 0.9), "eps": 1e-2, "amsgrad": True},
    sm.RASA: {"variant": "L", "beta": 0.5, "decay": True, "eps": 1e-1},
    sm.CRMSProp: {"beta": 0.5, "eps": 1e-2},
    sm.Landing: {"attraction": 0.1, "epsilon": 1e-4},
    sm.POGO: {"momentum": 0.9, "epsilon": 1e-8, "base": "muon", "betas": (0.5, 0.9), "eps": 1.0, "muon_steps": 1},
    sm.RSDM: {"size": 2, "sampling": "orthogonal", "seed": 5},
    sm.SPEL: {"momentum": 0.1, "steps": 2},
    sm.ManifoldMuon: {"momentum": 0.5, "iterations": 1, "alpha": 1e-3, "relative": False, "steps": 2},
    sm.IntrinsicMuon: {"momentum": 0.5, "steps": 2},
}
NEED_A_STATE = [
    (sm.RSGD, "momentum"),
    (sm.RAdam, "amsgrad"),
    (sm.POGO, "momentum"),
    (sm.RASA, "eps"),
    (sm.RSDM, "seed"),
    (sm.ManifoldMuon, "momentum"),
    (sm.IntrinsicMuon, "momentum"),
]
# Of another base than the default's, or a bound for steps that are longer.
IDLE = [(sm.POGO, "betas"), (sm.POGO, "eps"), (sm.POGO, "muon_steps"), (sm.POGO, "epsilon"), (sm.Landing, "epsilon")]
REQUIRED = {sm.RSDM: {"size": 3}}
each_option = pytest.mark.parametrize(
    ("kind", "key"),
    [(kind, key) for kind, given in OTHER.items() for key in given],
    ids=lambda x: getattr(x, "__name__", x),
)


def split_model(seed=0):
    model = network(seed)
    body = [(name, p) for name, p in model.named_parameters() if not name.startswith("4")]
    return model, body, list(model[4].named_parameters(prefix="4"))


def made(kind, params, **settings):
    return Riemannian(params, RULES, kind, **{"lr": 0.05, **REQUIRED.get(kind, {}), **settings})


def test_the_table_has_every_setting():
    for kind, given in OTHER.items():
        fields = {field.name for field in dataclasses.fields(kind)} - {"geometry", "lr", "nesterov"}
        assert fields == given.keys()
        assert options(kind).keys() >= given.keys() | {"lr"}
    assert options(sm.SubspaceOptimizer).keys() == {"lr", "guarded", "steps", "averaging"}
    assert dataclasses.MISSING is options(sm.RAdam)["lr"]


@each_option
def test_an_option_of_a_group_is_that_of_an_optimizer_of_its_own(kind, key):
    model, body, head = split_model()
    optimizer = made(kind, [{"params": body}, {"params": head, key: OTHER[kind][key]}])
    assert [group[key] for group in optimizer.param_groups[:2]] == [
        {**options(kind), **REQUIRED.get(kind, {})}[key],
        OTHER[kind][key],
    ]
    train(optimizer, model, 1)
    if kind is sm.RSDM:
        return  # its draws depend on a matrix's place among the groups
    # After one step from one point each group is where an optimizer with its options leads.
    plain, changed = network(), network()
    train(made(kind, plain), plain, 1)
    train(made(kind, changed, **{key: OTHER[kind][key]}), changed, 1)
    torch.testing.assert_close(model[0].weight, plain[0].weight, rtol=ROUNDING, atol=ROUNDING)
    torch.testing.assert_close(model[4].weight, changed[4].weight, rtol=ROUNDING, atol=ROUNDING)


@each_option
def test_an_option_may_change_later(kind, key):
    if (kind, key) in NEED_A_STATE:
        pytest.skip("needs another state: see below")
    model, plain = network(), network()
    optimizer, other = made(kind, model), made(kind, plain)
    train(optimizer, model, 2)
    train(other, plain, 2)
    assert_equal(values(model), values(plain))
    optimizer.param_groups[0][key] = OTHER[kind][key]
    train(optimizer, model, 2)
    train(other, plain, 2)
    moved = (model[0].weight - plain[0].weight).abs().max()
    assert moved > 1e-9 or (kind, key) in IDLE


@pytest.mark.parametrize(("kind", "key"), NEED_A_STATE)
def test_an_option_that_needs_another_state_is_refused(kind, key):
    model, value = network(), OTHER[kind][key]
    optimizer = made(kind, model)
    train(optimizer, model, 1)
    before = values(model)
    optimizer.param_groups[0][key] = value
    with pytest.raises(ValueError, match=f"{key}={value!r} needs a state"):
        optimizer.step()
    assert_equal(values(model), before)
    with pytest.raises(ValueError, match="in \\[0, 1\\)"):
        made(sm.RSGD, [{"params": network(), "momentum": 1.5}])


@learned_and_hand_made
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("weight_decay", 0.1, "no meaning on a manifold"),
        ("maximize", True, "negate the loss"),
        ("rule", sm.Stiefel(), "rules are an argument"),
        ("nestrov", True, "'nestrov' is no option of .*there are .*lr"),
    ],
)
def test_unknown_keys_are_refused_at_construction_and_later(name, key, value, message):
    with pytest.raises(ValueError, match=message):
        shell(name, [{"params": network(), key: value}])
    model = network()
    optimizer = shell(name, model)
    train(optimizer, model, 1)
    before = values(model)
    optimizer.param_groups[0][key] = value
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert_equal(values(model), before)
    with pytest.raises(ValueError, match="'momentun' is no option of RSGD; there are"):
        Riemannian(network(), RULES, sm.RSGD, lr=0.1, momentun=0.9)


def test_options_reach_the_other_parameters_of_a_group():
    model, body, head = split_model()
    others = partial(torch.optim.AdamW, lr=1e-3)
    optimizer = made(sm.RAdam, [{"params": body}, {"params": head, "lr": 0.5, "betas": (0.1, 0.2)}], others=others)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.5, 1e-3, 0.5]
    assert [group["betas"] for group in optimizer.param_groups[1::2]] == [(0.1, 0.2)] * 2
    learned = SubspaceMeta([{"params": body}, {"params": head, "lr": 0.5}], RULES, others=others)
    # There it is a factor.
    assert [group["lr"] for group in learned.param_groups] == [1.0, 0.5, 1e-3, 5e-4]
    biases = [(name, p) for name, p in network().named_parameters() if name.endswith("bias")]
    rest = shell("RAdam", [{"params": [("0.weight", model[0].weight)]}, {"params": biases, "weight_decay": 0.3}])
    assert rest.param_groups[1]["weight_decay"] == 0.3
    with pytest.raises(ValueError, match=r"'variant' is no option of AdamW.*there are amsgrad, betas"):
        shell("RAdam", [{"params": [("0.weight", model[0].weight)]}, {"params": biases, "variant": "L"}])


@pytest.mark.parametrize(
    "schedule",
    [
        partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=5),
        partial(lr_scheduler.CyclicLR, base_lr=0.01, max_lr=0.1, cycle_momentum=False),
        partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=3),
        partial(lr_scheduler.ReduceLROnPlateau, patience=0),
        partial(torch.optim.swa_utils.SWALR, swa_lr=0.01),
    ],
    ids=lambda schedule: schedule.func.__name__,
)
def test_schedulers_may_keep_their_keys_in_groups(schedule):
    model = network()
    optimizer = made(sm.RAdam, model)
    scheduler = schedule(optimizer)
    for _ in range(4):
        train(optimizer, model, 1)
        scheduler.step(*[1.0] * isinstance(scheduler, lr_scheduler.ReduceLROnPlateau))
    assert optimizer.param_groups[0]["lr"] != 0.05
    again = made(sm.RAdam, network())
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


def test_a_rate_may_be_left_out_where_there_is_a_default():
    optimizer = Riemannian(network(), RULES, sm.RDoG)
    assert optimizer.param_groups[0]["lr"] == 1.0
    with pytest.raises(ValueError, match="RAdam has no learning rate of its own: give lr"):
        Riemannian(network(), RULES, sm.RAdam)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": "fast"}, r"lr must be a number or a scalar tensor, got 'fast'"),
        ({"lr": True}, r"lr must be a number or a scalar tensor, got True"),
        ({"lr": torch.ones(2)}, r"lr must be a number or a scalar tensor, got tensor"),
        ({"others": 5}, r"others must make a torch optimizer from a list of parameters, or be None, got 5"),
        (
            {"optimizer": torch.optim.Adam},
            r"optimizer must be a class of this library, sm.RAdam for instance, got Adam",
        ),
        ({"optimizer": "RAdam"}, r"optimizer must be a class of this library, sm.RAdam for instance, got 'RAdam'"),
        ({"rules": {torch.nn.Linear: sm.Stiefel()}}, r"rules go by names, not .*sm.rules_for\(model, ...\) makes them"),
        ({"rules": [sm.Stiefel()]}, r"rules must be a dict, glob pattern of names -> manifold, got \[Stiefel"),
    ],
)
def test_arguments_of_another_kind(settings, message):
    model = torch.nn.Linear(4, 3)
    with pytest.raises(ValueError, match=message):
        Riemannian(model, **{"rules": {"weight": sm.Stiefel()}, "optimizer": sm.RAdam, "lr": 1e-2, **settings})


def test_a_rate_of_another_kind_in_a_group():
    model = torch.nn.Linear(4, 3)
    rules, group = {"weight": sm.Stiefel()}, {"params": list(model.named_parameters()), "lr": "a"}
    with pytest.raises(ValueError, match="lr must be a number or a scalar tensor, got 'a'"):
        Riemannian([group], rules, sm.RAdam, lr=1e-2)
    with pytest.raises(ValueError, match="lr must be a number or a scalar tensor, got 'a'"):
        sm.optim.SubspaceMeta(model, rules, lr="a")
    with pytest.warns(sm.optim.ProjectionWarning):
        optimizer = Riemannian(model, rules, sm.RAdam, lr=1e-2)
    optimizer.param_groups[0]["lr"] = "a"
    model(torch.ones(2, 4)).sum().backward()
    with pytest.raises(ValueError, match="lr must be a number or a scalar tensor, got 'a'"):
        optimizer.step()


def test_a_key_of_the_other_optimizer_that_nobody_reads_is_refused_later_too():
    model = torch.nn.Linear(4, 3)
    with pytest.warns(sm.optim.ProjectionWarning):
        optimizer = Riemannian(model, {"weight": sm.Stiefel()}, sm.RAdam, lr=1e-2)
    optimizer.param_groups[1]["weight_dcay"] = 0.1
    model(torch.ones(2, 4)).sum().backward()
    with pytest.raises(ValueError, match=r"'weight_dcay' is no option of AdamW \(parameter group of 'bias'\)"):
        optimizer.step()


def test_meta_parameters_in_the_place_of_the_rate():
    with pytest.raises(ValueError, match=r"lr must be a number .*meta-parameters are the argument weights="):
        sm.optim.SubspaceMeta(torch.nn.Linear(4, 3), {"weight": sm.Stiefel()}, sm.pretrained("light"))


@pytest.mark.parametrize(
    ("weights", "got"),
    [
        ("x.safetensors", "got 'x.safetensors'"),
        (Path("x.safetensors"), r"got \w*Path\('x.safetensors'\)"),
        ((sm.pretrained("light"), sm.PRESETS["light"]), "got a tuple"),
    ],
)
def test_a_file_and_what_it_gives_are_no_weights(weights, got):
    model, rules = torch.nn.Linear(4, 3), {"weight": sm.Stiefel()}
    geometry = sm.Geometry.from_rules(dict(model.named_parameters()), rules)
    for make in (lambda: SubspaceMeta(model, rules, weights=weights), lambda: sm.SubspaceOptimizer(geometry, weights)):
        with pytest.raises(ValueError, match=f"weights is a dict of tensors, {got}; of a file: weights, preset = sm"):
            make()


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("weight_decay", ": it has no meaning on a manifold"),
        ("maximize", ": negate the loss"),
        ("momentum", "; there are "),
        ("initial_lr", "; there are "),
    ],
)
def test_arguments_of_other_optimizers(key, hint):
    model, rules = torch.nn.Linear(4, 3), {"weight": sm.Stiefel()}
    with pytest.raises(ValueError, match=f"'{key}' is no option of the learned optimizer{hint}") as raised:
        SubspaceMeta(model, rules, **{key: 1e-2})
    assert str(raised.value).endswith(
        "check_gradients, guarded, lr, non_finite, others, params, preset, project, rules, steps, weights"
    )
    with pytest.raises(ValueError, match=f"'{key}' is no option of RAdam{hint}"):
        Riemannian(model, rules, sm.RAdam, lr=1e-2, **{key: 1e-2})


def test_what_there_is_are_options():
    message = "'beta' is no option of RAdam; there are amsgrad, betas, eps, lr$"
    with pytest.raises(ValueError, match=message):
        Riemannian(torch.nn.Linear(4, 3), {"weight": sm.Stiefel()}, sm.RAdam, lr=1e-2, beta=0.9)


def test_biases_on_a_manifold_of_matrices_are_said_once():
    model = torch.nn.Linear(4, 3)
    torch.nn.init.orthogonal_(model.weight)
    torch.nn.init.constant_(model.bias, 3**-0.5)
    with pytest.warns(UserWarning, match=r"rule '\*' matches vectors, too: 'bias'; each") as warned:
        optimizer = SubspaceMeta(model, {"*": sm.Stiefel()})
    assert [w.filename for w in warned] == [__file__]
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()


def test_weights_that_are_not_to_be_moved_are_refused_at_the_start():
    with pytest.raises(ValueError, match="parameter 'weight' is not on Stiefel: constraint violation"):
        sm.optim.SubspaceMeta(torch.nn.Linear(4, 3), {"weight": sm.Stiefel()}, project=False)
