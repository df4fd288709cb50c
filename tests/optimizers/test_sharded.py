"""Sharded models (fully_shard on gloo processes): the numbers of one process, states at owners, checkpoints, errors."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import sharded_job as job
import torch
from processes import ended, start
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

import subspace_meta as sm
from subspace_meta.benchmarks.geometry import tall
from subspace_meta.benchmarks.memory import MODELS
from subspace_meta.optim import sharding
from subspace_meta.optimizers.subspace import PRESETS

RANKS = range(4)
# AdamW divides by roots of squares that begin at rounding; sums over parts of a batch are other sums.
ROUNDING = 1e-9


def assert_close(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=ROUNDING, atol=ROUNDING, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the four processes have saved; the last one ends before the others."""
    folder = tmp_path_factory.mktemp("sharded")
    for name, scale in job.SCALES.items():
        model = job.network()
        optimizer = job.shell(name, model)
        job.train(optimizer, model, None, range(3), scale)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch says that one process saves
            job.save(folder / f"{name}-one", model, optimizer, name == "RAdam")
    for code, _, error in ended(start(folder, job.__file__, str(folder), count=4)):
        assert code == 0, error
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[Any, Any]]:
    return [torch.load(folder / f"found{rank}.pt", weights_only=False) for rank in RANKS]


def of_one(name: str, steps: int, scale: float = 1.0) -> tuple[torch.nn.Module, Any]:
    model = job.network()
    optimizer = job.shell(name, model)
    job.train(optimizer, model, None, range(steps), scale)
    return model, optimizer


@pytest.mark.parametrize("ranks", ["two", "four"])
@pytest.mark.parametrize("name", job.NAMES)
def test_ranks_find_what_one_process_finds(found: list, name: str, ranks: str) -> None:
    model = job.network()
    before = job.values(model)
    optimizer = job.shell(name, model)
    begin = job.values(model)
    assert not torch.equal(begin["3.weight"], before["3.weight"])  # moved to its manifold
    job.train(optimizer, model, None, range(5))
    for rank in RANKS:
        assert_close(found[rank][name, ranks]["start"], begin)
        assert_close(found[rank][name, ranks]["averages"], job.averages(model, optimizer))
        assert_close(found[rank][name, ranks]["end"], job.values(model))
        assert found[rank][name, ranks]["scalars"] == pytest.approx(job.scalars(optimizer), rel=ROUNDING)
        assert found[rank][name, ranks]["violation"].keys() == optimizer.check().keys()
    assert float((begin["3.weight"] - model[3].weight).detach().abs().max()) > 1e-3
    assert all(
        torch.equal(value, found[rank][name, ranks]["end"][key])
        for rank in RANKS
        for key, value in found[0][name, ranks]["end"].items()
    )


def test_replicas_of_parts_find_the_same(found: list) -> None:
    model, _ = of_one("base", 5)
    for rank in RANKS:
        assert_close(found[rank]["base", "replicated"]["end"], job.values(model))


def test_a_matrix_out_of_sharding_stays_equal_on_all_ranks(found: list) -> None:
    for rank in RANKS:
        assert_close(found[rank]["mixed"], job.mixed(None))
        assert all(torch.equal(value, found[0]["mixed"][key]) for key, value in found[rank]["mixed"].items())


@pytest.mark.parametrize(("ranks", "count"), [("two", 2), ("four", 4)])
@pytest.mark.parametrize("name", ["base", "RAdam"])
def test_a_state_is_where_its_owner_is(found: list, name: str, ranks: str, count: int) -> None:
    _, optimizer = of_one(name, 5)
    matrices = optimizer.param_groups[0]
    whole = {
        key: sum(t.numel() for t in optimizer.state[p].values() if t.ndim)
        for key, p in zip(matrices["param_names"], matrices["params"], strict=True)
    }
    held = [found[rank][name, ranks]["state"] for rank in range(count)]
    for key, size in whole.items():
        assert sorted(part[key] for part in held) == [0] * (count - 1) + [size]
    assert all(sum(part.values()) > 0 for part in held)


def test_four_ranks_have_three_tenths_of_the_state_of_resnet50_each() -> None:
    points = {str(i): torch.empty(shape, device="meta") for i, shape in enumerate(tall(MODELS["resnet50"].matrices))}
    geometry = sm.Geometry.from_rules(points, {"*": sm.Stiefel()})
    owners = sharding.owners({p.name: sharding.cost(p) for p in geometry.parameters}, 4)

    def size(names: list[str]) -> int:
        """Count the bytes of the learned optimizer's state without making it."""
        some = sm.Geometry.from_rules({name: points[name] for name in names}, {"*": sm.Stiefel()})
        optimizer = sm.SubspaceOptimizer(some, PRESETS["base"].init_weights(torch.Generator().manual_seed(0)))
        gathered = some.gather(points)
        state = optimizer.adapter.init(optimizer.layout, gathered)
        return sum(t.numel() * t.element_size() for t in torch.utils._pytree.tree_leaves(state))

    whole = size(list(points))
    shares = [size([name for name in points if owners[name] == rank]) / whole for rank in RANKS]
    assert max(shares) <= 0.3
    assert sum(shares) == pytest.approx(1.0, abs=1e-3)
    flops = [
        sum(p.matrix_shape[0] * p.matrix_shape[1] ** 2 for p in geometry.parameters if owners[p.name] == r)
        for r in RANKS
    ]
    assert max(flops) <= 0.3 * sum(flops)


def test_owners_depend_on_costs_and_order_alone() -> None:
    assert sharding.owners({"a": 3, "b": 5, "c": 3, "d": 2}, 2) == {"b": 0, "a": 1, "c": 1, "d": 0}
    assert sharding.owners({"a": 3}, 2, [1, 0]) == {"a": 1}


@pytest.mark.parametrize(("change", "steps"), [("2 to 4", 5), ("1 to 4", 5), ("4 to 2", 7)])
@pytest.mark.parametrize("name", job.SCALES)
def test_a_checkpoint_goes_on_with_another_number_of_ranks(found: list, name: str, change: str, steps: int) -> None:
    model, _ = of_one(name, steps, job.SCALES[name])
    for rank in RANKS:
        assert_close(found[rank]["checkpoints"][name, change], job.values(model))


@pytest.mark.parametrize("name", job.SCALES)
def test_a_checkpoint_of_four_goes_on_in_one_process(folder: Path, name: str) -> None:
    expected, _ = of_one(name, 7, job.SCALES[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        _, model = job.resumed(name, folder / f"{name}-four", None, range(5, 7), None)
    assert_close(job.values(model), job.values(expected))


@pytest.mark.parametrize("name", job.SCALES)
def test_a_full_state_is_that_of_one_process(found: list, name: str) -> None:
    model, _ = of_one(name, 5, job.SCALES[name])
    expected, _ = of_one(name, 7, job.SCALES[name])
    optimizer = job.shell(name, model)
    optimizer.zero_grad()  # torch starts a state only where there is no gradient
    saved = found[0]["checkpoints"][name, "full"]
    set_optimizer_state_dict(model, optimizer, saved, options=StateDictOptions(full_state_dict=True))
    job.train(optimizer, model, None, range(5, 7), job.SCALES[name])
    assert_close(job.values(model), job.values(expected))


MESSAGES = {
    "nan": "ValueError: the gradients of '3.weight' are not finite; nothing was changed",
    "elsewhere": "ValueError: the gradients of '3.bias' are not finite; nothing was changed",
    "overflow": "ValueError: the step of '3.weight' would not be finite",
    "missing": "ValueError: '3.weight' have gradients on some ranks only",
    "refused": "RuntimeError: KeyError on rank 1: 'of the second'",
}


@pytest.mark.parametrize("policy", ["raise", "skip"])
@pytest.mark.parametrize("kind", MESSAGES)
def test_an_error_of_one_rank_is_one_of_all_and_changes_nothing(found: list, kind: str, policy: str) -> None:
    skips = policy == "skip" and kind in ("nan", "elsewhere", "overflow")
    for rank in RANKS:
        case = found[rank]["errors"][kind, policy]
        assert case["said"] == found[0]["errors"][kind, policy]["said"]
        assert case["said"].startswith("" if skips else MESSAGES[kind])
        assert (case["said"] == "") == skips
        assert case["skipped"] == skips
        if kind != "refused":  # the other optimizers of other ranks have stepped
            assert case["unchanged"]
            assert case["moved"] == len(job.values(job.network()))


def test_construction_is_refused_on_all_ranks(found: list) -> None:
    for rank in RANKS:
        assert found[rank]["errors"]["off"].startswith("ValueError: parameter '3.weight' is not on Stiefel")
        assert "RDoG depend on all matrices" in found[rank]["errors"]["all"]


def test_a_matrix_may_be_split_over_one_dimension_of_a_mesh(found: list) -> None:
    for rank in RANKS:
        case = found[rank]["placements"]
        for kind in ("replicated", "rows", "columns"):
            torch.testing.assert_close(case[kind], case["plain"], rtol=ROUNDING, atol=ROUNDING)
        assert "parameter 'w' is sharded as (Shard(dim=0), Shard(dim=1)) over a mesh of (2, 2)" in case["both"]
        assert "Replicate" in case["both"]


def test_a_rank_that_ends_ends_the_others(found: list) -> None:
    for rank in RANKS[:3]:
        left = found[rank]["left"]
        assert left["said"].startswith(f"RuntimeError: rank {rank} of 4 cannot go on: another one has ended"), left
        assert left["seconds"] < 60
