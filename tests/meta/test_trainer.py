"""The outer loop: exact resumption, skipped meta-gradients, its loss, and that it learns."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import subspace_meta as sm
from subspace_meta.checkpoint import OtherRunError
from subspace_meta.meta import unroll
from subspace_meta.meta.trainer import (
    LOSS_FLOOR,
    MOST_SKIPPED,
    StreamSettings,
    Trainer,
    TrainingError,
    TrainSettings,
    climbing,
    relative_log_loss,
)
from subspace_meta.tasks import SyntheticPCA
from subspace_meta.tasks.planted import PlantedLeastSquares

FAMILY = SyntheticPCA(10, 2, batch_size=8)
SETTINGS = TrainSettings(
    (StreamSettings((FAMILY,), tasks=3, compiled=False), StreamSettings((SyntheticPCA(6, 3, 8),), 2, compiled=False)),
    outer_steps=12,
    segment=4,
    horizon=(4, 16),
)


def without_time(records: list[dict]) -> list[dict]:
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


@pytest.mark.parametrize(("told", "averaged"), [(0.0, 0.0), (0.5, 0.0), (0.5, 0.5)])
def test_a_resumed_run_is_the_same_run(told: float, averaged: float, tmp_path: Path) -> None:
    settings = replace(SETTINGS, told=told, averaged=averaged)
    whole = Trainer(settings)
    records = without_time(list(whole.run()))
    for cut in (1, 5, 11):
        first = Trainer(settings)
        for _ in range(cut):
            first.step()
        first.save(tmp_path / "checkpoint.safetensors")
        second = Trainer(settings)
        second.load(tmp_path / "checkpoint.safetensors")
        assert without_time(list(second.run())) == records[cut:]
        assert all(torch.equal(second.theta[name], whole.theta[name]) for name in whole.theta)


def test_the_first_step_of_a_compiled_loop_is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unroll, "compile_block", lambda block: block)
    unroll.block_of.cache_clear()
    compiled, eager = SyntheticPCA(9, 2, batch_size=8), SyntheticPCA(7, 2, batch_size=8)
    streams = (
        StreamSettings((compiled, FAMILY), tasks=2),
        StreamSettings((compiled,), tasks=2),
        StreamSettings((eager,), tasks=2, compiled=False),
    )
    trainer = Trainer(replace(SETTINGS, streams=streams, horizon=(4, 4)))
    said: list[str] = []
    stepped = [figures["family"] for figures in trainer.run(said.append)]
    assert said == [name for name in dict.fromkeys(stepped) if name != eager.name]
    assert set(said) == {compiled.name, FAMILY.name}
    assert len(list(Trainer(replace(SETTINGS, streams=streams, outer_steps=2)).run())) == 2
    unroll.block_of.cache_clear()


def test_other_settings_are_refused(tmp_path: Path) -> None:
    trainer = Trainer(SETTINGS)
    trainer.step()
    trainer.save(tmp_path / "c.safetensors")
    with pytest.raises(sm.CheckpointError, match=r"other settings; these differ: \['lr', 'seed'\]"):
        Trainer(replace(SETTINGS, lr=1e-2, seed=4)).load(tmp_path / "c.safetensors")


def test_inner_loops_that_are_told_their_length() -> None:
    trainer = Trainer(replace(SETTINGS, told=0.5, outer_steps=40))
    seen = set()
    for _ in trainer.run():
        for stream in trainer.streams:
            if stream.carry is not None:
                assert float(stream.carry.state.budget) == (stream.horizon if stream.told else 0)
                seen.add(stream.told)
    assert seen == {True, False}
    # Without being told, nothing is learned about the end.
    learned = []
    for told in (1.0, 0.0):
        trainer = Trainer(replace(SETTINGS, told=told))
        trainer.step()
        learned.append(float(trainer.first_moment["length.gauge"][5]))
    assert learned[0] != 0 == learned[1]


def test_inner_loops_that_hand_out_averages() -> None:
    trainer = Trainer(replace(SETTINGS, averaged=0.5, outer_steps=40))
    seen = set()
    for _ in trainer.run():
        for stream in trainer.streams:
            if stream.carry is not None:
                assert bool(stream.carry.state.average) == stream.averaging
                seen.add(stream.averaging)
    assert seen == {True, False}
    # The outer loss is that of the averages.
    figures = [Trainer(replace(SETTINGS, averaged=averaged)).step() for averaged in (1.0, 0.0)]
    assert figures[0]["horizon"] == figures[1]["horizon"]
    assert figures[0]["final_log_excess"] != figures[1]["final_log_excess"]


def test_seeds_matter_and_repeat() -> None:
    def theta(seed: int) -> Tensor:
        trainer = Trainer(replace(SETTINGS, seed=seed, outer_steps=3))
        list(trainer.run())
        return torch.cat([value.flatten() for value in trainer.theta.values()])

    assert torch.equal(theta(0), theta(0))
    assert not torch.equal(theta(0), theta(1))


@dataclass(frozen=True)
class Spoiled(SyntheticPCA):
    """A family whose draws are NaN with the given probability."""

    probability: float = 1.0

    def sample(self, data: dict[str, Tensor], generator: torch.Generator, steps: int) -> dict[str, Tensor]:
        batch = super().sample(data, generator, steps)
        if float(torch.rand((), generator=generator)) < self.probability:
            batch["z"] = batch["z"] * math.nan
        return batch


def spoiled(probability: float, outer_steps: int) -> Trainer:
    stream = StreamSettings((Spoiled(6, 2, 8, probability=probability),), tasks=2, compiled=False)
    return Trainer(replace(SETTINGS, streams=(stream,), outer_steps=outer_steps))


def test_non_finite_meta_gradients_are_skipped_and_counted() -> None:
    trainer = spoiled(0.5, 12)
    before = {name: value.clone() for name, value in trainer.theta.items()}
    for figures in trainer.run():
        good = math.isfinite(figures["outer_loss"])
        changed = any(not torch.equal(before[name], trainer.theta[name]) for name in before)
        assert changed == good
        before = {name: value.clone() for name, value in trainer.theta.items()}
    assert 0 < trainer.skipped < 12
    assert trainer.updates == 12 - trainer.skipped
    assert figures["skipped"] == trainer.skipped
    assert all(torch.isfinite(value).all() for value in trainer.theta.values())


def test_a_hopeless_run_stops_and_says_where() -> None:
    trainer = spoiled(1.0, 100)
    with pytest.raises(TrainingError, match=f"{MOST_SKIPPED} meta-gradients in a row.*synthetic PCA 6x2"):
        list(trainer.run())


def test_the_outer_loss() -> None:
    objectives = torch.tensor([[11.0, 2.0], [1.0, 1.5]])
    values = relative_log_loss(objectives, torch.tensor([11.0, 2.0]), torch.tensor([1.0, 1.0]))
    assert values[0].tolist() == pytest.approx([0.0, 0.0], abs=1e-5)
    assert values[1].tolist() == pytest.approx([math.log(LOSS_FLOOR), math.log(0.5)], abs=1e-5)


def test_meta_gradients_that_climb_are_named() -> None:
    """Family by family: those of one are larger than those of another all along."""
    calm = [{"family": "calm", "gradient_norm": 1e6 * (1 + t % 3)} for t in range(12)]
    wild = [{"family": "wild", "gradient_norm": 10.0 ** (t / 2)} for t in range(12)]
    mixed = [one for pair in zip(calm, wild, strict=True) for one in pair]
    assert climbing(calm) is None
    assert climbing(wild[:6]) is None
    said = climbing(mixed)
    assert said is not None
    assert said.startswith("meta-gradients climb (wild: from 6.6e+00 to 6.6e+04)")
    assert "calm" not in said
    assert climbing([{**one, "gradient_norm": math.nan if t > 8 else 1.0} for t, one in enumerate(calm)]) is not None


def test_the_learning_rate_warms_up_and_decays() -> None:
    settings = replace(SETTINGS, outer_steps=100, warmup=10, lr=1.0)
    rates = [settings.learning_rate(t) for t in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9]
    assert rates[50] == pytest.approx(0.5)
    assert rates[-1] < 1e-3


def test_the_learning_rate_starts_again_at_half() -> None:
    settings = replace(SETTINGS, outer_steps=150, restart=100, warmup=10, lr=1.0)
    once = replace(SETTINGS, outer_steps=100, warmup=10, lr=1.0)
    rates = [settings.learning_rate(t) for t in range(150)]
    assert rates[:100] == [once.learning_rate(t) for t in range(100)]
    assert rates[100] == 0.5
    assert rates[125] == pytest.approx(0.25)
    assert rates[-1] < 1e-3


def test_segments_grow_with_the_age_and_with_the_training() -> None:
    settings = replace(SETTINGS, outer_steps=80, restart=40, segment=5, longest=20, horizon=(5, 100))
    # Thirds of what precedes the restart: 13 1/3 steps each.
    assert [settings.segment_at(t, 50, 100) for t in (0, 13, 14, 26, 27, 40, 79)] == [5, 5, 10, 10, 20, 20, 20]
    assert [settings.segment_at(79, age, 100) for age in (0, 5, 10, 20, 40, 95)] == [5, 5, 10, 20, 20, 5]
    assert [replace(settings, longest=None).segment_at(t, 50, 100) for t in (0, 79)] == [5, 5]


def test_a_stream_with_segments_of_its_own(tmp_path: Path) -> None:
    stream = replace(SETTINGS.streams[0], segment=16)  # inner loops that are not longer are one segment each
    settings = replace(SETTINGS, streams=(stream,), horizon=(8, 24))
    records = list(Trainer(settings).run())
    horizons = [record["horizon"] for record in records]
    assert min(horizons) <= 16 < max(horizons)
    assert all(record["inner_step"] in (min(16, record["horizon"]), record["horizon"]) for record in records)
    Trainer(settings).save(tmp_path / "checkpoint.safetensors")
    with pytest.raises(OtherRunError, match="streams"):
        Trainer(replace(settings, streams=SETTINGS.streams[:1])).load(tmp_path / "checkpoint.safetensors")
    with pytest.raises(ValueError, match="at least one step, got 0"):
        replace(stream, segment=0)


def test_a_start_is_where_training_begins() -> None:
    other = Trainer(replace(SETTINGS, seed=9)).theta
    trainer = Trainer(SETTINGS, start=other)
    assert all(torch.equal(trainer.theta[name], value) for name, value in other.items())
    # The tasks are those of a run without it.
    assert trainer.generator.get_state().equal(Trainer(SETTINGS).generator.get_state())
    with pytest.raises(ValueError, match="lstm"):
        Trainer(SETTINGS, start={name: value for name, value in other.items() if name != "lstm.weight"})


def test_a_run_of_given_seconds_follows_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr("subspace_meta.meta.trainer.time.perf_counter", lambda: float(next(ticks)))  # a step takes 1 s
    settings = replace(SETTINGS, streams=SETTINGS.streams[:1], outer_steps=12, seconds=4.0)
    records = list(Trainer(settings).run())
    assert [record["learning_rate"] for record in records] == [settings.learning_rate(t) for t in (0, 3, 6, 9)]
    first, second = Trainer(settings), Trainer(settings)
    first.step()
    first.save(tmp_path / "checkpoint.safetensors")
    second.load(tmp_path / "checkpoint.safetensors")
    assert list(second.run()) == records[1:]
    with pytest.raises(ValueError, match="seconds must be positive and finite"):
        replace(SETTINGS, seconds=0.0)


def test_training_with_growing_segments_resumes_exactly(tmp_path: Path) -> None:
    settings = replace(SETTINGS, streams=SETTINGS.streams[:1], restart=6, longest=16, horizon=(80, 80))
    whole = Trainer(settings)
    records = without_time(list(whole.run()))
    # Half of the way with growing bounds; a new inner loop begins after 80 steps.
    assert [record["inner_step"] for record in records] == [4, 8, 16, 24, 40, 56, 72, 80, 4, 8, 16, 32]
    first, second = Trainer(settings), Trainer(settings)
    for _ in range(7):
        first.step()
    first.save(tmp_path / "checkpoint.safetensors")
    second.load(tmp_path / "checkpoint.safetensors")
    assert without_time(list(second.run())) == records[7:]
    assert all(torch.equal(second.theta[name], value) for name, value in whole.theta.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"horizon": (2, 8)},
            r"need 0 < segment .* of 8 steps without truncation are segment=8, horizon=\(8, 8\)$",
        ),
        ({"preset": "large"}, "'large' is unknown; there are base, light, paper"),
        ({"longest": 12}, "4 steps times a power of 2, got 12"),
        ({"restart": 0}, "the restart must be one of"),
        ({"told": 1.5}, "told is a share, from 0 to 1, got 1.5"),
        ({"told": 0.5, "preset": "paper"}, "preset 'paper' plans for no number of steps; told must be 0"),
        ({"averaged": -0.1}, "averaged is a share, from 0 to 1, got -0.1"),
        ({"averaged": 0.5, "preset": "paper"}, "preset 'paper' makes no averages; averaged must be 0"),
    ],
)
def test_settings_that_cannot_be(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **change)


def test_a_stream_of_several_problems(tmp_path: Path) -> None:
    """Each set of inner loops uses one of them; a resumed run goes on with the one that was running."""
    families = (FAMILY, SyntheticPCA(6, 3, 8), PlantedLeastSquares(5, 2, sm.Euclidean(), 8))
    settings = replace(
        SETTINGS, streams=(StreamSettings(families, tasks=2, compiled=False),), horizon=(4, 8), outer_steps=24
    )
    whole = Trainer(settings)
    records = without_time(list(whole.run()))
    assert {record["family"] for record in records} == {family.name for family in families}
    for cut in (3, 8):
        first, second = Trainer(settings), Trainer(settings)
        for _ in range(cut):
            first.step()
        first.save(tmp_path / "checkpoint.safetensors")
        second.load(tmp_path / "checkpoint.safetensors")
        assert without_time(list(second.run())) == records[cut:]


def test_a_first_order_stream_has_another_gradient() -> None:
    """Inner gradients are constants there; the losses of the first segment are the same."""
    gradients = []
    for first_order in (False, True):
        streams = (StreamSettings((FAMILY,), tasks=2, compiled=False, first_order=first_order),)
        record = Trainer(replace(SETTINGS, streams=streams)).step()
        gradients.append((record["outer_loss"], record["gradient_norm"]))
    assert gradients[0][0] == pytest.approx(gradients[1][0], rel=1e-6)
    assert gradients[0][1] != pytest.approx(gradients[1][1], rel=1e-3)


def test_the_largest_family_stands_for_its_stream() -> None:
    families = (SyntheticPCA(6, 3, 8), FAMILY, SyntheticPCA(5, 2, 8))
    trainer = Trainer(replace(SETTINGS, streams=(StreamSettings(families, tasks=2, compiled=False),)))
    assert list(trainer.costs()) == [f"0: {FAMILY.name}"]


def test_streams_are_not_empty() -> None:
    with pytest.raises(ValueError, match="at least one"):
        StreamSettings(())


@pytest.mark.parametrize("preset", ["base", "paper"])
def test_training_lowers_the_outer_loss(preset: str) -> None:
    # A loss scale at which the features of preset "paper" are not saturated.
    stream = StreamSettings((SyntheticPCA(10, 2, 8, log10_scale=(1.5, 1.5)),), tasks=8, compiled=False)
    trainer = Trainer(
        replace(SETTINGS, streams=(stream,), preset=preset, outer_steps=60, segment=10, horizon=(10, 10), lr=1e-2)
    )
    losses = [figures["outer_loss"] for figures in trainer.run()]
    assert sum(losses[-15:]) / 15 < sum(losses[:15]) / 15 - 0.1
