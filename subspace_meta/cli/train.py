"""``subspace-meta train``: meta-training that can be stopped and resumed, and the report at its end."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from subspace_meta import live
from subspace_meta.adapter import features
from subspace_meta.adapter.network import Weights
from subspace_meta.checkpoint import CheckpointError, OtherRunError, load_weights, save_weights, write_atomically
from subspace_meta.cli.common import UsageError, console, device_named, print_table, why_no_compiling
from subspace_meta.evaluation.plots import plot_curves, plot_training
from subspace_meta.evaluation.protocol import TIE
from subspace_meta.evaluation.report import LEARNED, Results, environment, evaluate_suite
from subspace_meta.meta.cost import available_bytes
from subspace_meta.meta.distributed import Processes
from subspace_meta.meta.trainer import Trainer, climbing
from subspace_meta.optimizers.subspace import PRESETS, Adapter, SubspaceOptimizer
from subspace_meta.presets import RUN_PRESETS, RunPreset
from subspace_meta.weights import RELEASES, located

CHECKPOINT = "checkpoint.safetensors"


PREVIOUS = "checkpoint.previous.safetensors"


def train_command(
    preset: Annotated[
        str | None, typer.Option(help=f"What to train: {', '.join(RUN_PRESETS)}.  [default: quick]")
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option(help=f"Optimizer preset: {', '.join(PRESETS)}.  [default: base]")
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the run; by default preset and time.")] = "",
    runs: Annotated[Path, typer.Option(help="Folder of all runs.")] = Path("runs"),
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.  [default: 0]", min=0)] = None,
    outer_steps: Annotated[int | None, typer.Option(help="Outer steps.  [default: the preset's]", min=1)] = None,
    seconds: Annotated[
        float | None,
        typer.Option(help="How long the run lasts instead, sittings added up; its schedules follow the time.", min=1.0),
    ] = None,
    stop_after: Annotated[
        float | None, typer.Option(help="End this sitting after so many seconds; --resume goes on.", min=1.0)
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            help=f"Meta-parameters to begin with: a weights file, or {' or '.join(RELEASES)}, which ship.  "
            "[default: drawn by the seed]"
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run called --name, with the settings that it has.")
    ] = False,
    previous: Annotated[
        bool, typer.Option("--previous", help="With --resume: from the checkpoint before the last one.")
    ] = False,
    checkpoint_seconds: Annotated[float, typer.Option(help="Seconds between checkpoints.", min=0.0)] = 30.0,
    eager: Annotated[bool, typer.Option("--eager", help="Do not compile the inner loops.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
    threads: Annotated[int, typer.Option(help="Threads of a tensor operation.", min=1)] = 1,
    device: Annotated[
        str | None,
        typer.Option(
            help="cpu, cuda, cuda:1; with --resume it may be another one than before.  [default: cuda for --preset "
            "release where there is one, otherwise cpu; with --resume as before]"
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what it will cost in memory and work; train nothing.")
    ] = False,
) -> None:
    """Meta-train an optimizer, then compare it with tuned baselines; writes runs/NAME/.

    Several processes: torchrun --nproc-per-node 4 -m subspace_meta train ... splits the tasks of each stream over them;
    with --device cuda each has a device of its own.
    """
    torch.set_num_threads(threads)
    if resume and not name:
        raise UsageError("--resume needs --name, the run to go on with")
    if previous and not resume:
        raise UsageError("--previous goes with --resume")
    folder = runs / (name or f"{preset or 'quick'}-{time.strftime('%Y%m%d-%H%M%S')}")
    given = {
        "run_preset": preset,
        "preset": optimizer,
        "seed": seed,
        "outer_steps": outer_steps,
        "seconds": seconds,
        "start": start,
        "eager": eager or None,
    }
    if resume:
        config = _config_to_resume(folder, given)
    else:
        defaults = {
            "run_preset": "quick",
            "preset": "base",
            "seed": 0,
            "outer_steps": None,
            "seconds": None,
            "start": None,
            "eager": False,
        }
        config = {key: default if given[key] is None else given[key] for key, default in defaults.items()}
    where = device_named(device or _usual_device(config, resume))
    processes = Processes.join(where)
    first = processes.rank == 0
    if not resume and processes.any(first and _holds_something(folder)):
        raise UsageError(f"{folder} exists; choose another --name, or add --resume to go on with it")
    if config["preset"] not in PRESETS:
        raise UsageError(f"unknown optimizer preset {config['preset']!r}; there are: {', '.join(PRESETS)}")
    preset, optimizer, eager = config["run_preset"], config["preset"], config["eager"]
    chosen = _run_preset(preset)
    if not eager and (why := why_no_compiling()):
        console.print(f"{why}: the inner loops run eagerly, about three times slower")
        eager = True
    settings = dataclasses.replace(
        chosen.train,
        seed=config["seed"],
        preset=optimizer,
        outer_steps=config["outer_steps"] or chosen.train.outer_steps,
        seconds=config.get("seconds"),
        streams=tuple(dataclasses.replace(s, compiled=s.compiled and not eager) for s in chosen.train.streams),
    )
    checkpoint = folder / (PREVIOUS if previous else CHECKPOINT)
    goes_on = resume and (checkpoint.exists() or previous)  # without one the run was stopped before its first
    begin = None if goes_on else _start(config.get("start"), optimizer)
    try:
        trainer = Trainer(settings, processes, where, begin)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if dry_run:
        if first:
            _print_costs(trainer, as_json)
        return
    records: list[dict[str, Any]] = []
    if goes_on:
        try:
            trainer.load(checkpoint)
        except OtherRunError:
            raise
        except CheckpointError as error:
            other = "" if previous or not (folder / PREVIOUS).exists() else "; --previous takes the one before it"
            raise CheckpointError(f"{error}{other}") from error
        records = _read_records(folder / "metrics.jsonl")[: trainer.outer_step]
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "run_preset": preset,
            "eager": eager,
            "device": where.type,
            "start": config.get("start"),
            **trainer.describe(),
            "environment": environment(),
        }
        write_atomically(folder / "config.json", json.dumps(config, indent=2).encode())
    began = time.perf_counter()
    done = _train(trainer, records, folder, quiet or not first, checkpoint_seconds, stop_after)
    processes.leave()
    if not first:
        return  # its part is done; the first process judges and writes
    if not done:
        console.print(f"stopped after {trainer.outer_step} outer steps; train --name {folder.name} --resume goes on")
        return
    trained_for = time.perf_counter() - began
    if (said := climbing(records)) is not None:
        console.print(said)
    adapter = PRESETS[optimizer]
    notes = {
        "run_preset": preset,
        "outer_steps": trainer.outer_step,
        "start": config["start"],
        "seed": settings.seed,
        "skipped": trainer.skipped,
        "normalisation": {"floor": features.FLOOR, "tiny": features.TINY},
    }
    save_weights(folder / "weights.safetensors", trainer.theta, adapter, notes)
    results = _evaluate(chosen, trainer.theta, adapter, quiet, where)
    text = (
        f"Optimizer preset `{optimizer}`, {sum(v.numel() for v in trainer.theta.values()):,} meta-parameters, "
        f"{trainer.outer_step} outer steps, seed {settings.seed}; trained for {trained_for:.0f} s (compilation "
        f"included) on {_in_words(where)} in this sitting; {trainer.skipped} non-finite meta-gradients were skipped."
        "\n\n![outer loss](training.png)"
    )
    plot_curves(results, folder / "curves.png")
    plot_training(records, folder / "training.png")
    write_atomically(folder / "results.json", json.dumps(results.to_json(), indent=2).encode())
    write_atomically(folder / "report.md", _report(results, f"Run {folder.name}", text).encode())
    _print_results(results, as_json)
    console.print(
        f"wrote {folder}/weights.safetensors, report.md, curves.png, training.png, metrics.jsonl, config.json"
    )


def _run_preset(name: str) -> RunPreset:
    if name not in RUN_PRESETS:
        raise UsageError(f"unknown preset {name!r}; there are: {', '.join(RUN_PRESETS)}")
    return RUN_PRESETS[name]()


def _start(name: str | None, preset: str) -> Weights | None:
    """Return the meta-parameters that ``--start`` names, ``None`` where it is not given."""
    if name is None:
        return None
    path = located(name)
    if not path.exists():
        raise UsageError(f"--start {name}: there is no such file, and the weights that ship are {', '.join(RELEASES)}")
    weights, adapter = load_weights(path)
    if adapter != PRESETS[preset]:
        raise UsageError(f"--start {name}: these are weights of {adapter}, the run is of preset {preset!r}")
    return weights


def _usual_device(config: dict[str, Any], resume: bool) -> str:
    """Return the device of a run that names none; a stopped run that had one goes on without where there is none."""
    usual = "cuda" if config["run_preset"] == "release" else "cpu"
    wanted: str = config.get("device", "cpu") if resume else usual
    enough = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) <= torch.cuda.device_count()  # one a process
    return wanted if torch.cuda.is_available() and enough else "cpu"


def _in_words(device: torch.device) -> str:
    return "the CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)


def _holds_something(folder: Path) -> bool:
    if not folder.is_dir():
        return folder.exists()
    return any(not path.name.endswith(".part") for path in folder.iterdir())


def _config_to_resume(folder: Path, given: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a stopped run; options that were given again must say the same."""
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder}: no checkpoint to go on from; start the run without --resume")
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    for key, value in given.items():
        if value is not None and value != config.get(key):
            raise UsageError(f"{folder} was begun with {key} {config.get(key)!r}, not {value!r}; leave that option out")
    return config


def _read_records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _print_costs(trainer: Trainer, as_json: bool) -> None:
    """Print the predicted memory and work of each stream; warn where memory does not suffice."""
    costs = trainer.costs()
    free = available_bytes(trainer.device)
    if as_json:
        streams = {name: {**dataclasses.asdict(c), "peak_bytes": c.peak_bytes} for name, c in costs.items()}
        typer.echo(json.dumps({"available_bytes": free, "streams": streams}))
    else:
        header = ["stream", "tasks", "steps", "carry MB", "residuals MB a step", "peak MB", "Mflop a task-step"]
        rows = []
        for name, c in costs.items():
            megabytes = [f"{value / 1e6:,.2f}" for value in (c.carry_bytes, c.residual_bytes, c.peak_bytes)]
            rows.append([name, str(c.tasks), str(c.steps), *megabytes, f"{c.flops / 1e6:,.2f}"])
        print_table("predicted cost of one outer step, by stream", header, rows, ("stream",))
    worst = max(costs, key=lambda name: costs[name].peak_bytes)
    if free is not None and costs[worst].peak_bytes > free:
        console.print(
            f"warning: {worst!r} needs {costs[worst].peak_bytes / 1e9:,.1f} GB, {free / 1e9:,.1f} GB are free; take "
            "fewer tasks, a shorter segment, or a checkpoint interval"
        )


def _train(
    trainer: Trainer,
    records: list[dict[str, Any]],
    folder: Path,
    quiet: bool,
    seconds: float,
    stop_after: float | None,
) -> bool:
    """Run the outer loop with a progress bar, a log, and a checkpoint every so many seconds and on Ctrl-C.

    Returns:
        Whether the run is at its end, or only this sitting.
    """
    processes = trainer.processes

    def save() -> None:
        if processes.rank == 0:
            # The log first: a crash in between leaves a log that is longer than the checkpoint, which resuming cuts.
            write_atomically(folder / "metrics.jsonl", "".join(json.dumps(r) + "\n" for r in records).encode())
        trainer.save(folder / CHECKPOINT, folder / PREVIOUS)

    began = saved = time.perf_counter()
    curves = (
        live.tensorboard(folder / "tensorboard", trainer.outer_step) if processes.rank == 0 else nullcontext(_ignore)
    )
    with _deferred_interrupt() as interrupted, live.progress(console, quiet) as progress, curves as draw:
        note = "compiling the inner loops ..." if any(s.compiled for s in trainer.settings.streams) else ""
        total = trainer.settings.outer_steps
        bar = progress.add_task("training", total=total, completed=trainer.position, note=note)
        smooth: float | None = None

        def compiling(family: str) -> None:
            if not quiet:
                line = f"compiling the inner loop of {family!r}; about a minute, less where that was done before"
                console.print(line, markup=False, highlight=False, soft_wrap=True)

        for figures in trainer.run(compiling):
            records.append(figures)
            draw(figures)
            smooth = figures["outer_loss"] if smooth is None else 0.95 * smooth + 0.05 * figures["outer_loss"]
            progress.update(bar, completed=trainer.position, note=f"outer loss {smooth:6.2f}")
            # What one process sees, all do: a checkpoint has a part of each.
            if processes.any(interrupted()):
                save()
                raise KeyboardInterrupt
            if processes.any(time.perf_counter() - saved > seconds):
                save()
                saved = time.perf_counter()
            if stop_after is not None and processes.any(time.perf_counter() - began > stop_after):
                break
    save()
    return trainer.position >= total


def _ignore(figures: Mapping[str, Any]) -> None:
    """Draw nothing: another process does."""


@contextmanager
def _deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C wait for the end of the outer step, where a checkpoint is exact; a second one stops at once."""
    received: list[int] = []

    def note(number: int, frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        console.print("finishing this outer step; Ctrl-C again to stop at the last checkpoint")

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGINT, before)


def _evaluate(preset: RunPreset, weights: Any, adapter: Adapter, quiet: bool, device: torch.device) -> Results:
    results: Results | None = None
    with live.progress(console, quiet) as progress:
        bar = progress.add_task("evaluating", total=4 * len(preset.evaluation), note="")
        runs = evaluate_suite(
            preset.evaluation, lambda g: SubspaceOptimizer(g, weights, adapter), preset.seeds, preset.horizon, device
        )
        for label, results in runs:  # noqa: B007 (the last results are what is wanted)
            progress.update(bar, advance=1, note=label[:44])
    assert results is not None
    return results


def _print_results(results: Results, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(results.to_json()))
        return
    header, rows = results.table()
    table = Table(title="mean log relative excess loss, lower is better; baselines at their best learning rate (@)")
    for name in header:
        table.add_column(name, justify="left" if name in ("problem", "against the best") else "right")
    for i, cells in enumerate(rows):
        style = {"better": "bold green", "tie": "", "worse": "red"}[cells[-1]]
        marked = {header.index(LEARNED), len(header) - 1} if style else set()
        shown = [f"[{style}]{cell}[/]" if j in marked else cell for j, cell in enumerate(cells)]
        table.add_row(*shown, end_section=i + 1 < len(rows) and bool(rows[i + 1][0]))
    terminal = Console()
    # Piped output has no width of its own; the table needs this much not to wrap.
    Console(width=None if terminal.is_terminal else 150).print(table)


def _report(results: Results, title: str, notes: str) -> str:
    where = environment()
    return "\n".join(
        [
            f"# {title}",
            "",
            notes,
            "",
            "Mean log((f - f*)/(f0 - f*)) over seeds and instances, lower is better (f* = 0 where it is not known). "
            "Each baseline at its best learning rate per checkpoint and instance; the learned optimizer has none.",
            "",
            results.markdown(),
            "",
            "The curves show each baseline at the one rate that is best at step 50, so at other steps it may lie "
            "above its table entry; bands reach from the lowest to the highest of all seeds and instances. "
            f"Natural logarithm; a difference of at most {TIE} is a tie; {results.seeds} seeds an instance.",
            "",
            f"Largest constraint violation of the learned optimizer: {results.largest_violation():.1e}. "
            f"Runs without a non-finite value: {100 * results.share_finite():.0f} %.",
            "",
            "![loss curves](curves.png)",
            "",
            "Measured " + ", ".join(f"{key} {value}" for key, value in where.items()) + ".",
            "",
        ]
    )
