"""The outer loop: truncated back-propagation through inner loops of random length, on tasks drawn at random.

Each *stream* keeps one set of inner loops of one family running. An outer step takes the next stream by its weight,
advances its inner loops by one truncation segment, and moves the meta-parameters along the segment's meta-gradient
(Adam, cosine decay, clipped by norm). When a stream reaches its horizon (log-uniform), new tasks are drawn. So all ages
of inner loops are mixed. Truncation: Werbos 1990; for learned optimizers Andrychowicz et al. 2016 and Metz et al. 2019.

The outer loss is the mean over tasks and steps of log((f - f*)/(f_0 - f*) + floor): every decade of progress counts the
same, whatever the scale of the problem.

Everything random comes from one generator, on a device mini-batches from a second one that draws there
(``subspace_meta.tasks.placement``). So training is reproducible on the same machine, and a checkpoint holds all that is
needed to go on exactly. Several processes split the tasks of each stream (``subspace_meta.meta.distributed``).
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from subspace_meta.adapter.base import BaseAdapter
from subspace_meta.adapter.network import Weights
from subspace_meta.checkpoint import OtherRunError, keep_previous, load_tensors, save_tensors
from subspace_meta.geometry import Geometry
from subspace_meta.meta.cost import Cost, entries, predict
from subspace_meta.meta.distributed import CPU, Processes
from subspace_meta.meta.isolation import segment_gradient
from subspace_meta.meta.unroll import Carry, InnerLoop
from subspace_meta.optimizers.subspace import PRESETS, SubspaceOptimizer, check_weights
from subspace_meta.tasks.base import Data, TaskFamily, describe
from subspace_meta.tasks.placement import moved, on_device

LOSS_FLOOR = 1e-7
CLIMBED = 1e3  # by this factor the norms of meta-gradients grow where inner loops become chaotic
MOST_SKIPPED = 20  # in a row: then something is wrong that waiting does not mend


class TrainingError(RuntimeError):
    """Meta-training cannot go on; the message says why."""


@dataclass(frozen=True)
class PresetOptimizer:
    """Makes the learned optimizer of a preset; equal ones share compiled inner loops."""

    preset: str = "base"
    averaging: bool = False

    def __call__(self, geometry: Geometry, theta: Weights) -> SubspaceOptimizer:
        """Return the optimizer with the meta-parameters ``theta``."""
        return SubspaceOptimizer(geometry, theta, self.preset, averaging=self.averaging)


@dataclass(frozen=True)
class StreamSettings:
    """One stream of inner loops.

    Attributes:
        families: task families; a set of inner loops uses one, drawn at random.
        tasks: inner loops that run side by side.
        weight: share of outer steps, relative to the other streams.
        segment: length of all truncation segments, at any age; ``None``: as ``TrainSettings`` says. Where no inner loop
            is longer nothing is truncated. Truncation prefers steps that are good for the losses of the same segment;
            where noise limits progress those are too short for later ones (Wu, Ren, Liao, Grosse, "Understanding
            short-horizon bias in stochastic meta-optimization", ICLR 2018). Where inner loops are chaotic a derivative
            through many steps says nothing.
        compiled: compile this stream's inner loops, one for each problem.
        first_order: treat inner gradients as constants.
    """

    families: tuple[TaskFamily, ...]
    tasks: int = 16
    weight: float = 1.0
    segment: int | None = None
    compiled: bool = True
    first_order: bool = False

    def __post_init__(self) -> None:
        if not self.families:
            raise ValueError("a stream needs at least one task family")
        if self.segment is not None and self.segment < 1:
            raise ValueError(f"a segment has at least one step, got {self.segment}")


@dataclass(frozen=True)
class TrainSettings:
    """Settings of a meta-training run.

    Attributes:
        streams: what is trained on.
        preset: name of the optimizer preset.
        outer_steps: number of updates of the meta-parameters.
        seconds: how long the run lasts instead, in seconds of outer steps, sittings added up. The schedules then follow
            the time: after a third of it they are where they would be after a third of ``outer_steps``. Such a run
            cannot be repeated exactly. ``None``: it lasts ``outer_steps``.
        segment: inner steps of the first truncation segment of an inner loop.
        longest: inner steps of the longest segment, ``segment`` times a power of 2. A segment is as long as its inner
            loop is old, from ``segment`` up to a bound that doubles in equal parts of the training (before
            ``restart``) until it is ``longest``: what is decided late in an inner loop shows later, and a derivative
            through many steps is of use only once the optimizer is stable. ``None``: all have the length ``segment``.
        horizon: shortest and longest inner loop, in steps; drawn log-uniformly.
        told: share of inner loops whose optimizer is told their number of steps, and whose outer loss counts mostly at
            the end: half of it as ever, half in proportion to (t / steps)^7.
        averaged: share of inner loops whose optimizer hands out averages, which then count in the outer loss.
        lr: outer learning rate at its peak; cosine decay to zero after a linear warm-up.
        restart: outer step at which the learning rate starts again, at half its peak, to decay to zero a second time
            (Loshchilov and Hutter, "SGDR", ICLR 2017); ``None``: never.
        warmup: outer steps of warm-up.
        clip: largest norm of the meta-gradient.
        seed: of everything random.
    """

    streams: tuple[StreamSettings, ...]
    preset: str = "base"
    outer_steps: int = 400
    seconds: float | None = None
    segment: int = 20
    longest: int | None = None
    horizon: tuple[int, int] = (40, 400)
    told: float = 0.0
    averaged: float = 0.0
    lr: float = 3e-3
    restart: int | None = None
    warmup: int = 10
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        low, high = self.horizon
        if not 0 < self.segment <= low <= high:
            raise ValueError(
                f"need 0 < segment <= shortest <= longest horizon, got {self.segment} and {self.horizon}; inner loops "
                f"of {high} steps without truncation are segment={high}, horizon=({high}, {high})"
            )
        if self.segment * 2**self.doublings != self.longest_segment:
            raise ValueError(f"the longest segment must be {self.segment} steps times a power of 2, got {self.longest}")
        if self.restart is not None and not 0 < self.restart < self.outer_steps:
            raise ValueError(f"the restart must be one of {self.outer_steps} outer steps, got {self.restart}")
        if self.seconds is not None and not 0.0 < self.seconds < math.inf:
            raise ValueError(f"seconds must be positive and finite, or None, got {self.seconds}")
        for name, share in (("told", self.told), ("averaged", self.averaged)):
            if not 0.0 <= share <= 1.0:
                raise ValueError(f"{name} is a share, from 0 to 1, got {share}")
        if self.preset not in PRESETS:
            raise ValueError(f"preset {self.preset!r} is unknown; there are {', '.join(PRESETS)}")
        if self.told and not isinstance(PRESETS[self.preset], BaseAdapter):
            raise ValueError(f"preset {self.preset!r} plans for no number of steps; told must be 0, got {self.told}")
        if self.averaged and not isinstance(PRESETS[self.preset], BaseAdapter):
            raise ValueError(f"preset {self.preset!r} makes no averages; averaged must be 0, got {self.averaged}")

    @property
    def longest_segment(self) -> int:
        """The length of the longest segment."""
        return self.segment if self.longest is None else self.longest

    @property
    def doublings(self) -> int:
        """How often the bound on the length of segments doubles."""
        return max(0, (self.longest_segment // self.segment).bit_length() - 1)

    def segment_at(self, outer_step: int, age: int, horizon: int) -> int:
        """Return the length of the segment that follows ``age`` steps of an inner loop of ``horizon`` steps."""
        part = (self.doublings + 1) * outer_step // (self.restart or self.outer_steps)
        return min(max(self.segment, age), self.segment * 2 ** min(part, self.doublings), horizon - age)

    def learning_rate(self, outer_step: int) -> float:
        """Return the outer learning rate at a step counted from 0."""
        warm = min(1.0, (outer_step + 1) / max(1, self.warmup))
        first = self.restart or self.outer_steps
        if outer_step < first:
            peak, done = self.lr * warm, outer_step / first
        else:
            peak, done = 0.5 * self.lr, (outer_step - first) / (self.outer_steps - first)
        return peak * 0.5 * (1 + math.cos(math.pi * done))


@dataclass
class _Stream:
    """The running inner loops of one stream; ``data`` and ``initial`` are those of all processes."""

    settings: StreamSettings
    families: tuple[TaskFamily, ...]  # those of the settings, on the device
    part: slice  # this process's tasks
    loops: tuple[InnerLoop, ...]  # one a family
    averaging_loops: tuple[InnerLoop, ...]  # the same with an optimizer that hands out averages
    index: int = 0  # of the family that is running
    horizon: int = 0
    told: bool = False
    averaging: bool = False
    age: int = 0
    data: Data | None = None
    carry: Carry | None = None
    initial: Tensor | None = None

    @property
    def loop(self) -> InnerLoop:
        return (self.averaging_loops if self.averaging else self.loops)[self.index]

    @property
    def family(self) -> TaskFamily:
        return self.families[self.index]


def relative_log_loss(objectives: Tensor, initial: Tensor, reference: Tensor) -> Tensor:
    """Return log((f - f*)/(f_0 - f*) + floor); all of broadcastable shapes, ``(steps, tasks)`` and ``(tasks,)``."""
    excess = (objectives - reference).clamp(min=0.0) / (initial - reference)
    return torch.log(excess + LOSS_FLOOR)


class Trainer:
    """Meta-training that can be stopped after each outer step and resumed exactly.

    Args:
        settings: the run's settings.
        processes: which part of the tasks is this process's; all call the same methods in the same order.
        device: where inner loops run and meta-parameters lie; with several processes each may have its own.
        start: the meta-parameters to begin with; ``None``: those that :meth:`init_weights` of the preset draws.

    Raises:
        ValueError: a stream has fewer tasks than there are processes, or ``start`` is not of the preset.

    Attributes:
        settings: the run's settings.
        device: where everything lies.
        theta: the meta-parameters.
        outer_step: updates attempted so far.
        elapsed: seconds that outer steps have taken, sittings added up; the mean over all processes.
        skipped: updates that were skipped because no task of the segment was finite.
        spoiled_tasks: tasks that were left out of their segment's meta-gradient because they were not finite.
    """

    def __init__(
        self,
        settings: TrainSettings,
        processes: Processes | None = None,
        device: torch.device | str = "cpu",
        start: Weights | None = None,
    ) -> None:
        self.settings = settings
        self.processes = processes or Processes()
        self.device = torch.device(device)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.sampler = self._sampler_from(0)
        adapter = PRESETS[settings.preset]
        drawn = adapter.init_weights(self.generator)
        if start is not None:
            check_weights(adapter, start)
        self.theta: Weights = moved(drawn if start is None else {name: start[name] for name in drawn}, self.device)
        self.first_moment = {name: torch.zeros_like(value) for name, value in self.theta.items()}
        self.second_moment = {name: torch.zeros_like(value) for name, value in self.theta.items()}
        self.outer_step = 0
        self.elapsed = 0.0
        self.updates = 0
        self.skipped = 0
        self.skipped_in_a_row = 0
        self.spoiled_tasks = 0
        self._begun: set[InnerLoop] = set()  # compiled ones; equal ones share their code
        self.streams = [
            _Stream(
                s,
                tuple(on_device(family, self.device) for family in s.families),
                self.processes.part(s.tasks),
                tuple(self._loop(s, family) for family in s.families),
                tuple(self._loop(s, family, averaging=True) for family in s.families),
            )
            for s in settings.streams
        ]

    def _sampler_from(self, outer_step: int) -> torch.Generator:
        """Return the generator of mini-batches: on the CPU that of everything, on a device one that is seeded anew."""
        if self.device.type == "cpu":
            return self.generator
        return torch.Generator(self.device).manual_seed((self.settings.seed * 2**32 + outer_step) % 2**63)

    def _loop(self, stream: StreamSettings, family: TaskFamily, averaging: bool = False) -> InnerLoop:
        return InnerLoop(
            family.problem,
            PresetOptimizer(self.settings.preset, averaging),
            # Segments are short: all their residuals fit, and nothing is run twice.
            interval=self.settings.segment,
            kept=-(-self._longest(stream) // self.settings.segment),
            bounded=True,
            compiled=stream.compiled,
            first_order=stream.first_order,
        )

    def _longest(self, stream: StreamSettings) -> int:
        """Return the length of the longest segment of a stream."""
        return stream.segment or self.settings.longest_segment

    def _restart(self, stream: _Stream, saved: Mapping[str, Any] | None = None) -> None:
        """Draw a family and whether averages count, unless they are given, new tasks, starting points and a horizon."""
        if saved is None:
            stream.index = int(
                torch.randint(len(stream.loops), (), generator=self.generator, device=self.generator.device)
            )
            stream.averaging = bool(self.settings.averaged) and self._chance() < self.settings.averaged
        else:
            stream.index, stream.averaging = saved["family"], saved["averaging"]
        family = stream.family
        low, high = self.settings.horizon
        drawn = low * (high / low) ** self._chance()
        stream.horizon = self.settings.segment * max(1, round(drawn / self.settings.segment))
        stream.age = 0
        stream.data = family.draw(self.generator, stream.settings.tasks)
        params = family.init(stream.data, self.generator)
        stream.carry = stream.loop.start(self.theta, {name: value[stream.part] for name, value in params.items()})
        stream.initial = stream.loop.objective(params, family.measured(stream.data))
        adapter = PRESETS[self.settings.preset]
        if self.settings.told and isinstance(adapter, BaseAdapter):
            stream.told = self._chance() < self.settings.told
            if stream.told:
                stream.carry = stream.carry._replace(state=adapter.with_budget(stream.carry.state, stream.horizon))

    def _chance(self) -> float:
        """Draw a number from 0 to 1."""
        return float(torch.rand((), generator=self.generator, device=self.generator.device))

    @property
    def position(self) -> int:
        """Where the schedules are, from 0 to the number of outer steps, where the run ends."""
        settings = self.settings
        if settings.seconds is None:
            return self.outer_step
        return min(settings.outer_steps, int(settings.outer_steps * self.elapsed / settings.seconds))

    def step(self, compiling: Callable[[str], object] | None = None) -> dict[str, Any]:
        """Take one outer step and return its figures.

        Args:
            compiling: called with the name of the family before the first step of an inner loop that is compiled, which
                may take minutes.
        """
        began = time.perf_counter()
        weights = torch.tensor([s.settings.weight for s in self.streams], device=self.generator.device)
        index = int(torch.multinomial(weights, 1, generator=self.generator))
        stream = self.streams[index]
        if stream.carry is None or stream.age >= stream.horizon:
            self._restart(stream)
        assert stream.carry is not None
        assert stream.data is not None
        assert stream.initial is not None
        family = stream.family
        if stream.settings.compiled and stream.loop not in self._begun:
            self._begun.add(stream.loop)
            if compiling is not None:
                compiling(family.name)
        part = stream.part
        measured = {name: value[part] for name, value in family.measured(stream.data).items()}
        if stream.settings.segment is None:
            length = self.settings.segment_at(self.position, stream.age, stream.horizon)
        else:
            length = min(stream.settings.segment, stream.horizon - stream.age)
        batches = family.sample(stream.data, self.sampler, length)
        batches = {name: value[:, part] for name, value in batches.items()}
        initial, reference = stream.initial[part], stream.data["reference"][part]

        # Of one on average over a whole inner loop.
        times = torch.arange(stream.age + 1, stream.age + length + 1, device=self.device) / stream.horizon
        weight = 0.5 + 4.0 * times**7 if stream.told else torch.ones_like(times)

        def outer_loss(objectives: Tensor) -> Tensor:
            return (weight[:, None] * relative_log_loss(objectives, initial, reference)).mean(dim=0)

        total = self.processes.total
        found = segment_gradient(stream.loop, self.theta, stream.carry, batches, measured, outer_loss, total)
        norm = torch.stack([g.square().sum() for g in found.theta.values()]).sum().sqrt()
        finite = bool(torch.isfinite(norm))
        spoiled = int(total(found.spoiled.sum()))
        self.spoiled_tasks += spoiled
        final = torch.where(found.spoiled, 0.0, relative_log_loss(found.objectives[-1], initial, reference)).sum()
        stream.age += length
        if finite:
            self.skipped_in_a_row = 0
            stream.carry = found.carry
            if spoiled:
                # From here on the copies stand for the spoiled tasks, with all that belongs to them.
                source = torch.zeros(stream.settings.tasks, dtype=found.source.dtype, device=self.device)
                source[part] = found.source + part.start
                source = total(source)
                stream.data = {name: value[source] for name, value in stream.data.items()}
                stream.initial = stream.initial[source]
            self._descend(found.theta, norm)
        else:
            # No task is left. Never silently zeroed: the update is skipped and counted, and the stream starts over.
            self.skipped += 1
            self.skipped_in_a_row += 1
            stream.carry = None
            if self.skipped_in_a_row >= MOST_SKIPPED:
                raise TrainingError(
                    f"{MOST_SKIPPED} meta-gradients in a row are not finite (the last from {family.name!r}); check "
                    "that its loss and gradients are finite, or lower the outer learning rate"
                )
        figures = {
            "outer_step": self.outer_step,
            "family": family.name,
            "inner_step": stream.age,
            "horizon": stream.horizon,
            "outer_loss": float(found.loss),
            "final_log_excess": float(total(final) / (stream.settings.tasks - spoiled)),
            "gradient_norm": float(norm),
            "learning_rate": self.settings.learning_rate(self.position),
            "skipped": self.skipped,
            "spoiled_tasks": self.spoiled_tasks,
            "seconds": time.perf_counter() - began,
        }
        self.outer_step += 1
        spent = torch.tensor(figures["seconds"], dtype=torch.float64, device=CPU)
        self.elapsed += float(total(spent)) / self.processes.count
        return figures

    def _descend(self, gradient: Weights, norm: Tensor) -> None:
        """Move the meta-parameters by Adam (Kingma and Ba 2015) along the clipped meta-gradient."""
        self.updates += 1
        lr = self.settings.learning_rate(self.position)
        clip = (self.settings.clip / (norm + 1e-12)).clamp(max=1.0)
        for name, value in gradient.items():
            g = clip * value
            self.first_moment[name] = 0.9 * self.first_moment[name] + 0.1 * g
            self.second_moment[name] = 0.99 * self.second_moment[name] + 0.01 * g * g
            first = self.first_moment[name] / (1 - 0.9**self.updates)
            second = self.second_moment[name] / (1 - 0.99**self.updates)
            self.theta[name] = self.theta[name] - lr * first / (second.sqrt() + 1e-8)

    def costs(self) -> dict[str, Cost]:
        """Predict the cost of one outer step of each stream, by the name of its largest family; changes nothing."""
        costs = {}
        for i, stream in enumerate(self.streams):
            pairs = zip(stream.families, stream.loops, strict=True)
            family, loop = max(pairs, key=lambda pair: entries(pair[0].problem))
            generator = torch.Generator().manual_seed(0)
            data = family.draw(generator, stream.settings.tasks)
            carry = loop.start(self.theta, family.init(data, generator))
            batch = family.sample(data, generator, 1)
            costs[f"{i}: {family.name}"] = predict(
                loop,
                self.theta,
                carry,
                batch,
                family.measured(data),
                self._longest(stream.settings),
            )
        return costs

    def run(self, compiling: Callable[[str], object] | None = None) -> Iterator[dict[str, Any]]:
        """Take the outer steps that are left, yielding the figures of each; ``compiling`` as in :meth:`step`."""
        while self.position < self.settings.outer_steps:
            yield self.step(compiling)

    def save(self, path: Path, previous: Path | None = None) -> None:
        """Write a checkpoint from which :meth:`load` goes on exactly; of several processes the first one writes it.

        What ``path`` held before is then at ``previous``.
        """
        carries = self.processes.collect([pytree.tree_flatten(moved(stream.carry, CPU))[0] for stream in self.streams])
        if self.processes.rank:
            return
        tensors: dict[str, Tensor] = {"generator": self.generator.get_state()}
        if self.sampler is not self.generator:
            tensors["sampler"] = self.sampler.get_state()
        for kind, group in (("theta", self.theta), ("first", self.first_moment), ("second", self.second_moment)):
            tensors.update({f"{kind}/{name}": value for name, value in group.items()})
        streams = []
        for i, stream in enumerate(self.streams):
            running = stream.carry is not None
            streams.append(
                {
                    "family": stream.index,
                    "horizon": stream.horizon,
                    "age": stream.age,
                    "told": stream.told,
                    "averaging": stream.averaging,
                    "running": running,
                }
            )
            if running:
                leaves = pytree.tree_flatten((stream.data, stream.initial))[0]
                tensors.update({f"stream{i}/{j}": leaf for j, leaf in enumerate(leaves)})
                for rank, carry in enumerate(carries):
                    tensors.update({f"stream{i}/rank{rank}/{j}": leaf for j, leaf in enumerate(carry[i])})
        content = {
            "settings": self.describe(),
            "processes": self.processes.count,
            "outer_step": self.outer_step,
            "elapsed": self.elapsed,
            "updates": self.updates,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "spoiled_tasks": self.spoiled_tasks,
            "streams": streams,
        }
        if previous is not None:
            keep_previous(path, previous)
        save_tensors(path, "training checkpoint", tensors, content)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint of a run with the same settings, exactly on a device of the kind that wrote it.

        On another kind weights, moments, running inner loops and the generator of tasks are the same; rounding and
        mini-batches are not. A device's own generator, of which a checkpoint of the CPU knows nothing, is then seeded
        by the run's seed and the outer step.

        Raises:
            CheckpointError: the file cannot be used.
            OtherRunError: the settings or the number of processes differ.
        """
        tensors, content = load_tensors(path, "training checkpoint")
        mine = json.loads(json.dumps(self.describe()))
        if content["settings"] != mine:
            differing = [key for key in mine if content["settings"].get(key) != mine[key]]
            raise OtherRunError(f"{path}: was written by a run with other settings; these differ: {differing}")
        if content.get("processes") != self.processes.count:
            raise OtherRunError(
                f"{path}: was written by {content.get('processes', 'an unknown number of')} processes, and the inner "
                f"loops are split over them; go on with as many, not with {self.processes.count}"
            )
        for kind, group in (("theta", self.theta), ("first", self.first_moment), ("second", self.second_moment)):
            for name in group:
                group[name] = tensors[f"{kind}/{name}"].to(self.device)
        for i, (stream, saved) in enumerate(zip(self.streams, content["streams"], strict=True)):
            if not saved["running"]:
                continue
            # A fresh start gives the structure of the trees; its numbers are replaced.
            self._restart(stream, saved)
            shared, own = f"stream{i}", f"stream{i}/rank{self.processes.rank}"
            stream.data, stream.initial = _restored((stream.data, stream.initial), tensors, shared)
            stream.carry = _restored(stream.carry, tensors, own)
            stream.horizon, stream.age, stream.told = saved["horizon"], saved["age"], saved["told"]
        for counter in ("outer_step", "elapsed", "updates", "skipped", "skipped_in_a_row", "spoiled_tasks"):
            setattr(self, counter, content[counter])
        self.generator.set_state(tensors["generator"])
        if self.sampler is not self.generator:
            self.sampler = self._sampler_from(self.outer_step)
            if "sampler" in tensors:  # not in a checkpoint of the CPU
                self.sampler.set_state(tensors["sampler"])

    def describe(self) -> dict[str, Any]:
        """Return the settings as JSON-ready values, families by their descriptions."""
        settings = self.settings
        return {
            "preset": settings.preset,
            "outer_steps": settings.outer_steps,
            "seconds": settings.seconds,
            "segment": settings.segment,
            "longest": settings.longest,
            "horizon": list(settings.horizon),
            "told": settings.told,
            "averaged": settings.averaged,
            "lr": settings.lr,
            "restart": settings.restart,
            "warmup": settings.warmup,
            "clip": settings.clip,
            "seed": settings.seed,
            "streams": [
                {
                    "families": [describe(family) for family in s.families],
                    "tasks": s.tasks,
                    "weight": s.weight,
                    "segment": s.segment,
                    "compiled": s.compiled,
                    "first_order": s.first_order,
                }
                for s in settings.streams
            ],
        }


def climbing(figures: Sequence[Mapping[str, Any]]) -> str | None:
    """Return a sentence where the meta-gradients of a run have climbed, ``None`` where they have not.

    Compared are the medians of the norms in the first and in the last third of a family's outer steps, of which there
    have to be nine: families differ by decades among themselves.

    Args:
        figures: what :meth:`Trainer.step` returned, in order.
    """
    norms: dict[str, list[float]] = {}
    for one in figures:
        norm = float(one["gradient_norm"])
        norms.setdefault(one["family"], []).append(math.inf if math.isnan(norm) else norm)
    worst, climbed = "", CLIMBED
    for family, found in norms.items():
        third = len(found) // 3
        if third >= 3:
            first, last = statistics.median(found[:third]), statistics.median(found[-third:])
            if last > climbed * first:
                worst, climbed = f"{family}: from {first:.1e} to {last:.1e}", last / max(first, 1e-30)
    if not worst:
        return None
    return (
        f"meta-gradients climb ({worst}): derivatives through so many steps say little there; a lower outer learning "
        "rate, shorter segments or fewer of its inner steps keep them small"
    )


def _restored(tree: Any, tensors: Mapping[str, Tensor], prefix: str) -> Any:
    """Return a tree of the same structure, on the same device, with leaves from a checkpoint."""
    leaves, structure = pytree.tree_flatten(tree)
    return pytree.tree_unflatten([tensors[f"{prefix}/{j}"].to(x.device) for j, x in enumerate(leaves)], structure)
