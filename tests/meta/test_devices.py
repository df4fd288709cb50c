"""Everything is made on the device on which it is used, as far as that can be seen without a GPU."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from devices import META, ROOMS, MetaGenerator, MixedDevicesError, NamedDevices, OneDevice, UnnamedDeviceError
from distributed_settings import LAST_SPOILED
from making import OPTIMIZERS, ORTHONORMAL_OPTIMIZERS, PARAMETER_FREE_OPTIMIZERS, make_optimizer
from torch import distributed

import subspace_meta as sm
from subspace_meta.cli import common, train
from subspace_meta.evaluation.protocol import EvaluationTask, evaluate_rates, placed
from subspace_meta.meta.distributed import Processes
from subspace_meta.meta.distribution import training_streams
from subspace_meta.meta.trainer import PresetOptimizer, StreamSettings, Trainer, TrainSettings
from subspace_meta.meta.unroll import InnerLoop, pull_back, run
from subspace_meta.optimizers.subspace import PRESETS
from subspace_meta.tasks import OrthonormalClassification, SampledPCA, SyntheticPCA, TaskFamily
from subspace_meta.tasks.placement import OnDevice, moved

FAMILY = SyntheticPCA(8, 2, batch_size=8)
SETTINGS = TrainSettings(
    (StreamSettings((FAMILY,), tasks=2, compiled=False),), outer_steps=8, segment=2, horizon=(2, 8), told=0.5
)
MANIFOLDS = {
    "Stiefel": (sm.Stiefel(), (6, 3)),
    "Stiefel, Newton-Schulz": (sm.Stiefel(retraction=sm.PolarNewtonSchulz()), (6, 3)),
    "canonical Stiefel": (sm.StiefelCanonical(), (6, 3)),
    "Grassmann": (sm.Grassmann(), (6, 3)),
    "orthogonal": (sm.Orthogonal(), (4, 4)),
    "rotations": (sm.Rotations(), (4, 4)),
    "SPD": (sm.SPD(), (4, 4)),
    "SPD, exponential": (sm.SPD(sm.SPDExponential()), (4, 4)),
    "sphere": (sm.Sphere(), (6,)),
    "oblique": (sm.Oblique(), (6, 3)),
    "Euclidean": (sm.Euclidean(), (6, 3)),
    "product": (sm.Product((sm.Stiefel(), sm.Euclidean()), sizes=(5, 4)), (9, 3)),
}


@functools.cache
def of_every_kind() -> tuple[tuple[TaskFamily, bool], ...]:
    """Return families of the training distribution, without those that differ in size or data set alone.

    And whether inner gradients are constants to them.
    """
    found: dict[object, tuple[TaskFamily, bool]] = {}
    for stream in training_streams():
        for family in stream.families:
            manifolds = frozenset(type(parameter.manifold) for parameter in family.problem.geometry.parameters)
            ways = getattr(family, "rotate", None), getattr(family, "batch_size", 1) > 0
            found.setdefault((type(family), manifolds, ways), (family, stream.first_order))
    return tuple(found.values())


# --- Where tensors are made ---


def test_a_tensor_without_a_device_is_seen() -> None:
    made = {what: compile(f"torch.{what}", f"{ROOMS[0]}/made.py", "eval") for what in ("ones(2)", "tensor(1.0)")}
    named = compile("torch.ones(2, device='cpu')", f"{ROOMS[0]}/named.py", "eval")
    with NamedDevices():
        torch.ones(2)  # not the library's
        eval(named)
        for code in made.values():
            with pytest.raises(UnnamedDeviceError, match=r"made\.py:1: .* names no device"):
                eval(code)


def test_training_names_the_device_of_every_tensor() -> None:
    with NamedDevices():
        for family, first_order in of_every_kind():
            stream = StreamSettings((family,), tasks=2, compiled=False, first_order=first_order)
            list(Trainer(TrainSettings((stream,), outer_steps=1, segment=1, horizon=(1, 2), told=1.0)).run())


def test_so_do_spoiled_tasks_checkpoints_and_predictions(tmp_path: Path) -> None:
    with NamedDevices():
        trainer = Trainer(LAST_SPOILED)
        while not trainer.spoiled_tasks:
            trainer.step()
        trainer.save(tmp_path / "c")
        Trainer(LAST_SPOILED).load(tmp_path / "c")
        trainer.costs()


@pytest.mark.parametrize("manifold", MANIFOLDS)
def test_optimizers_work_beside_the_cpu_and_name_devices(manifold: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On ``META``, where a tensor of the CPU would be met; what looks at values is left out."""
    monkeypatch.setattr(sm.Geometry, "check_feasible", lambda self, params: None)
    where, shape = MANIFOLDS[manifold]
    geometry = sm.Geometry.from_rules({"x": torch.empty(shape, device="meta")}, {"x": where})
    orthonormal = ORTHONORMAL_OPTIMIZERS if manifold == "Stiefel" else ()
    for name in (*OPTIMIZERS, *PARAMETER_FREE_OPTIMIZERS, *orthonormal):
        with NamedDevices(), OneDevice():
            optimizer = make_optimizer(name, geometry, torch.float32)
            if hasattr(optimizer, "weights"):
                optimizer = replace(optimizer, weights=moved(optimizer.weights, META))
            params = geometry.initialize(MetaGenerator(), device=META)
            state = optimizer.init(params)
            grads = {"x": torch.ones_like(params["x"])}
            params, state = optimizer.update(grads, state, params, params["x"].sum())
        leaves = torch.utils._pytree.tree_leaves((params, state))
        assert all(leaf.device == META for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim()), name


def meta_gradient(family: TaskFamily, first_order: bool, theta: dict) -> dict:
    """Return the meta-gradient of one inner step, all of it on ``META`` but the drawing of tasks."""
    if isinstance(family, OrthonormalClassification):
        family = replace(family, load_test=family.load)  # a split counts samples
    there, generator = OnDevice(family, META), torch.Generator().manual_seed(0)
    data = there.draw(generator, 2)
    params = moved(family.init(data, generator), META)
    batches, measured = there.sample(data, MetaGenerator(), 1), there.measured(data)
    loop = InnerLoop(family.problem, PresetOptimizer(), compiled=False, bounded=True, first_order=first_order)
    trace = run(loop, theta, loop.start(theta, params), batches, measured)
    return pull_back(loop, theta, trace, batches, measured, torch.ones_like(trace.objectives)).theta


def test_inner_loops_are_all_on_their_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sm.Geometry, "check_feasible", lambda self, params: None)
    theta = PRESETS["base"].init_weights(torch.Generator().manual_seed(0))
    with OneDevice():
        for family, first_order in of_every_kind():
            found = meta_gradient(family, first_order, moved(theta, META))
            assert all(value.device == META for value in found.values()), family.name
        with pytest.raises(MixedDevicesError, match="met tensors of cpu, meta"):
            meta_gradient(FAMILY, False, theta)


# --- Tasks ---


def test_a_task_is_the_same_on_every_device() -> None:
    here, there = FAMILY, OnDevice(FAMILY, META)
    first, second = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    data, elsewhere = here.draw(first, 3), there.draw(second, 3)
    assert all(value.device == META and value.shape == data[name].shape for name, value in elsewhere.items())
    # As many numbers were drawn.
    assert torch.equal(first.get_state(), second.get_state())
    cpu = OnDevice(FAMILY, torch.device("cpu"))
    first, second = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    for drawn in (lambda f, g: f.draw(g, 3), lambda f, g: f.init(data, g), lambda f, g: f.sample(data, g, 2)):
        left, right = drawn(here, first), drawn(cpu, second)
        assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_data_set_is_moved_once() -> None:
    calls = []

    def load() -> torch.Tensor:
        calls.append(1)
        return torch.ones(40, 6)

    family = SampledPCA("ones", load, 2, batch_size=4)
    there = OnDevice(family, META)
    data = moved(family.draw(torch.Generator(), 2), META)
    before = len(calls)
    for _ in range(3):
        assert there.sample(data, MetaGenerator(), 5)["z"].device == META
    assert len(calls) == before + 1


# --- The outer loop ---


class WithSampler(Trainer):
    """A trainer that has a second generator, as on a device."""

    def _sampler_from(self, outer_step: int) -> torch.Generator:
        return torch.Generator().manual_seed(1000 + outer_step)


def records(trainer: Trainer) -> list[dict]:
    return [{key: value for key, value in record.items() if key != "seconds"} for record in trainer.run()]


def test_mini_batches_come_from_the_generator_of_the_device() -> None:
    one, two = WithSampler(SETTINGS), WithSampler(SETTINGS)
    before = one.sampler.get_state()
    two.sampler.manual_seed(5)
    first, second = one.step(), two.step()
    assert first["outer_loss"] != second["outer_loss"]
    assert torch.equal(one.generator.get_state(), two.generator.get_state())
    assert not torch.equal(one.sampler.get_state(), before)


@pytest.mark.parametrize(
    ("before", "after"), [(WithSampler, WithSampler), (WithSampler, Trainer), (Trainer, WithSampler)]
)
def test_a_checkpoint_goes_on_on_another_device(before: type[Trainer], after: type[Trainer], tmp_path: Path) -> None:
    whole = before(SETTINGS)
    for _ in range(4):
        whole.step()
    whole.save(tmp_path / "c")
    resumed = [after(SETTINGS) for _ in range(2)]
    for trainer in resumed:
        trainer.load(tmp_path / "c")
        assert all(torch.equal(trainer.theta[name], value) for name, value in whole.theta.items())
    left, right = map(records, resumed)
    assert left == right
    assert (left == records(whole)) == (before is after)
    assert [record["family"] for record in left] == [FAMILY.name] * 4


# --- Which device ---


def test_processes_on_gpus_are_connected_by_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed, "init_process_group", lambda backend, **_: used.append(backend))
    monkeypatch.setattr(distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    there = torch.device("cuda", 1)
    assert Processes.join(there) == Processes(1, 2, there)
    assert used == [there, "nccl"]
    assert Processes.join() == Processes(1, 2)
    assert used[2:] == ["gloo"]


def test_a_device_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert common.device_named("cpu") == torch.device("cpu")
    for name in ("meta", "gpu", "cuda:x"):
        with pytest.raises(common.UsageError, match="--device is cpu, cuda, or cuda:1"):
            common.device_named(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(common.UsageError, match="no CUDA device here; torch sees none"):
        common.device_named("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert common.device_named("cuda") == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert common.device_named("cuda") == torch.device("cuda", 1)
    with pytest.raises(common.UsageError, match="no CUDA device 3; there are 2, counted from 0"):
        common.device_named("cuda:3")


def test_the_device_of_a_run_that_names_none(monkeypatch: pytest.MonkeyPatch) -> None:
    release, quick, begun = (
        {"run_preset": "release"},
        {"run_preset": "quick"},
        {"run_preset": "quick", "device": "cuda"},
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert [train._usual_device(*of) for of in ((release, False), (begun, True))] == ["cpu", "cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    chosen = [train._usual_device(*of) for of in ((release, False), (release, True), (quick, False), (begun, True))]
    assert chosen == ["cuda", "cpu", "cpu", "cuda"]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert train._usual_device(release, False) == "cpu"


# --- With a GPU ---


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_training_on_a_gpu(tmp_path: Path) -> None:
    """It repeats itself, resumes exactly, starts like the CPU, and goes on on either from the other's checkpoint."""
    whole, first = Trainer(SETTINGS, device="cuda"), Trainer(SETTINGS, device="cuda")
    log = records(whole)
    assert all(value.is_cuda for value in whole.theta.values())
    for _ in range(4):
        first.step()
    first.save(tmp_path / "gpu")
    second = Trainer(SETTINGS, device="cuda")
    second.load(tmp_path / "gpu")
    assert records(second) == log[4:]
    cpu = Trainer(SETTINGS)
    figures = [cpu.step()[key] for key in ("family", "horizon")]
    assert figures == [log[0][key] for key in ("family", "horizon")]
    cpu.save(tmp_path / "cpu")
    for path, device in (("gpu", "cpu"), ("cpu", "cuda")):
        other = Trainer(SETTINGS, device=device)
        other.load(tmp_path / path)
        assert all(torch.isfinite(torch.tensor(record["outer_loss"])) for record in records(other))
    curves = [
        evaluate_rates(placed(EvaluationTask("", FAMILY), device), sm.RSGD, (0.1, 1.0), 2, 20)
        for device in ("cpu", "cuda")
    ]
    torch.testing.assert_close(curves[0].log_excess, curves[1].on_cpu().log_excess, rtol=1e-3, atol=1e-3)
