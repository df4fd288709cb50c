"""The command line: ``subspace-meta train | evaluate | archive | weights | bench``.

Errors of the user are one line on stderr and exit code 2. Files are written atomically, so an error or Ctrl-C leaves
nothing half-written.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import importlib
import json
import math
import os
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
from subspace_kernels import native

from subspace_meta._version import __version__
from subspace_meta.checkpoint import CheckpointError, OtherRunError, load_weights, save_weights, write_atomically

try:
    import typer
    from rich.console import Console
    from rich.table import Table
except ImportError as error:  # the library itself does not need them
    raise SystemExit(f"subspace-meta: {error}; install the extra: pip install 'subspace-meta[train]'") from error

from subspace_meta import live
from subspace_meta.adapter import features
from subspace_meta.adapter.base import BaseAdapter
from subspace_meta.benchmarks import memory
from subspace_meta.benchmarks.geometry import bench_geometry
from subspace_meta.benchmarks.meta import bench_meta
from subspace_meta.benchmarks.predecessor import bench_predecessor
from subspace_meta.benchmarks.step import bench_step, kernel_traffic
from subspace_meta.evaluation import archive, predecessor
from subspace_meta.evaluation.comparison import QUICK, Comparison, TaskResult, compare, doubts
from subspace_meta.evaluation.page import gaps, markdown, page, summary, untuned
from subspace_meta.evaluation.plots import plot_curves, plot_training
from subspace_meta.evaluation.protocol import TIE
from subspace_meta.evaluation.report import LEARNED, Results, environment, evaluate_suite
from subspace_meta.meta.cost import available_bytes
from subspace_meta.meta.distributed import ProcessError, Processes
from subspace_meta.meta.trainer import Trainer, TrainingError
from subspace_meta.optimizers.subspace import PRESETS, Adapter, SubspaceOptimizer
from subspace_meta.presets import RUN_PRESETS, RunPreset
from subspace_meta.tasks.data import DATA_VARIABLE
from subspace_meta.tasks.suite import SuiteTask, evaluation_suite
from subspace_meta.weights import FOLDER, RELEASES

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Meta-train and evaluate a learned Riemannian optimizer.",
)
console = Console(stderr=True)

CHECKPOINT = "checkpoint.safetensors"
PREVIOUS = "checkpoint.previous.safetensors"
WIDE = 200  # columns that tables of the suite need not to wrap


class UsageError(Exception):
    """The user asked for something that cannot be; the message says what would be right."""


def _run_preset(name: str) -> RunPreset:
    if name not in RUN_PRESETS:
        raise UsageError(f"unknown preset {name!r}; there are: {', '.join(RUN_PRESETS)}")
    return RUN_PRESETS[name]()


def _no_compiler() -> str:
    """Return why inner loops cannot be compiled here; empty if they can."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")):
        return "no C++ compiler found"
    if any(character.isspace() for character in torch.__file__):
        return "torch.compile cannot link below a path with a space, and torch lies there"
    return ""


def _print_table(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[str], width: int | None = None
) -> None:
    """Print a table, the columns ``left`` flush left; ``width`` is for piped output, which has none of its own."""
    table = Table(title=title)
    for column in header:
        table.add_column(column, justify="left" if column in left else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else width).print(table)


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


def _evaluate(preset: RunPreset, weights: Any, adapter: Adapter, quiet: bool) -> Results:
    results: Results | None = None
    with live.progress(console, quiet) as progress:
        bar = progress.add_task("evaluating", total=4 * len(preset.evaluation), note="")
        runs = evaluate_suite(
            preset.evaluation, lambda g: SubspaceOptimizer(g, weights, adapter), preset.seeds, preset.horizon
        )
        for label, results in runs:  # noqa: B007 (the last results are what is wanted)
            progress.update(bar, advance=1, note=label[:44])
    assert results is not None
    return results


@app.command()
def train(
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
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what it will cost in memory and work; train nothing.")
    ] = False,
) -> None:
    """Meta-train an optimizer, then compare it with tuned baselines; writes runs/NAME/.

    Several processes: torchrun --nproc-per-node 4 -m subspace_meta train ... splits the tasks of each stream over them.
    """
    torch.set_num_threads(threads)
    processes = Processes.join()
    first = processes.rank == 0
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
        "eager": eager or None,
    }
    if resume:
        config = _config_to_resume(folder, given)
    elif processes.any(first and _holds_something(folder)):
        raise UsageError(f"{folder} exists; choose another --name, or add --resume to go on with it")
    else:
        defaults = {"run_preset": "quick", "preset": "base", "seed": 0, "outer_steps": None, "eager": False}
        config = {key: default if given[key] is None else given[key] for key, default in defaults.items()}
    if config["preset"] not in PRESETS:
        raise UsageError(f"unknown optimizer preset {config['preset']!r}; there are: {', '.join(PRESETS)}")
    preset, optimizer, eager = config["run_preset"], config["preset"], config["eager"]
    chosen = _run_preset(preset)
    if not eager and (why := _no_compiler()):
        console.print(f"{why}: the inner loops run eagerly, about three times slower")
        eager = True
    settings = dataclasses.replace(
        chosen.train,
        seed=config["seed"],
        preset=optimizer,
        outer_steps=config["outer_steps"] or chosen.train.outer_steps,
        streams=tuple(dataclasses.replace(s, compiled=s.compiled and not eager) for s in chosen.train.streams),
    )
    try:
        trainer = Trainer(settings, processes)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if dry_run:
        if first:
            _print_costs(trainer, as_json)
        return
    records: list[dict[str, Any]] = []
    checkpoint = folder / (PREVIOUS if previous else CHECKPOINT)
    if resume and (checkpoint.exists() or previous):  # without one the run was stopped before its first
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
        config = {"run_preset": preset, "eager": eager, **trainer.describe(), "environment": environment()}
        write_atomically(folder / "config.json", json.dumps(config, indent=2).encode())
    began = time.perf_counter()
    _train(trainer, records, folder, quiet or not first, checkpoint_seconds)
    processes.leave()
    if not first:
        return  # its part is done; the first process judges and writes
    trained_for = time.perf_counter() - began
    adapter = PRESETS[optimizer]
    notes = {
        "run_preset": preset,
        "outer_steps": settings.outer_steps,
        "seed": settings.seed,
        "skipped": trainer.skipped,
        "normalisation": {"floor": features.FLOOR, "tiny": features.TINY},
    }
    save_weights(folder / "weights.safetensors", trainer.theta, adapter, notes)
    results = _evaluate(chosen, trainer.theta, adapter, quiet)
    text = (
        f"Optimizer preset `{optimizer}`, {sum(v.numel() for v in trainer.theta.values()):,} meta-parameters, "
        f"{settings.outer_steps} outer steps, seed {settings.seed}; trained for {trained_for:.0f} s (compilation "
        f"included) in this sitting; {trainer.skipped} non-finite meta-gradients were skipped."
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


def _print_costs(trainer: Trainer, as_json: bool) -> None:
    """Print the predicted memory and work of each stream; warn where memory does not suffice."""
    costs = trainer.costs()
    free = available_bytes()
    if as_json:
        streams = {name: {**dataclasses.asdict(c), "peak_bytes": c.peak_bytes} for name, c in costs.items()}
        typer.echo(json.dumps({"available_bytes": free, "streams": streams}))
    else:
        header = ["stream", "tasks", "steps", "carry MB", "residuals MB a step", "peak MB", "Mflop a task-step"]
        rows = []
        for name, c in costs.items():
            megabytes = [f"{value / 1e6:,.2f}" for value in (c.carry_bytes, c.residual_bytes, c.peak_bytes)]
            rows.append([name, str(c.tasks), str(c.steps), *megabytes, f"{c.flops / 1e6:,.2f}"])
        _print_table("predicted cost of one outer step, by stream", header, rows, ("stream",))
    worst = max(costs, key=lambda name: costs[name].peak_bytes)
    if free is not None and costs[worst].peak_bytes > free:
        console.print(
            f"warning: {worst!r} needs {costs[worst].peak_bytes / 1e9:,.1f} GB, {free / 1e9:,.1f} GB are free; take "
            "fewer tasks, a shorter segment, or a checkpoint interval"
        )


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
        if value is not None and value != config[key]:
            raise UsageError(f"{folder} was begun with {key} {config[key]!r}, not {value!r}; leave that option out")
    return config


def _read_records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _train(trainer: Trainer, records: list[dict[str, Any]], folder: Path, quiet: bool, seconds: float) -> None:
    """Run the outer loop with a progress bar, a log, and a checkpoint every so many seconds and on Ctrl-C."""

    processes = trainer.processes

    def save() -> None:
        if processes.rank == 0:
            # The log first: a crash in between leaves a log that is longer than the checkpoint, which resuming cuts.
            write_atomically(folder / "metrics.jsonl", "".join(json.dumps(r) + "\n" for r in records).encode())
        trainer.save(folder / CHECKPOINT, folder / PREVIOUS)

    saved = time.perf_counter()
    curves = (
        live.tensorboard(folder / "tensorboard", trainer.outer_step) if processes.rank == 0 else nullcontext(_ignore)
    )
    with _deferred_interrupt() as interrupted, live.progress(console, quiet) as progress, curves as draw:
        note = "compiling the inner loops ..." if any(s.compiled for s in trainer.settings.streams) else ""
        total = trainer.settings.outer_steps
        bar = progress.add_task("training", total=total, completed=trainer.outer_step, note=note)
        smooth: float | None = None
        for figures in trainer.run():
            records.append(figures)
            draw(figures)
            smooth = figures["outer_loss"] if smooth is None else 0.95 * smooth + 0.05 * figures["outer_loss"]
            progress.update(bar, completed=trainer.outer_step, note=f"outer loss {smooth:6.2f}")
            # What one process sees, all do: a checkpoint has a part of each.
            if processes.any(interrupted()):
                save()
                raise KeyboardInterrupt
            if processes.any(time.perf_counter() - saved > seconds):
                save()
                saved = time.perf_counter()
    save()


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


@app.command()
def evaluate(
    weights: Annotated[
        Path | None, typer.Option(help="A weights file of the learned optimizer.  [default: the shipped one]")
    ] = None,
    optimizer: Annotated[
        str, typer.Option(help="Instead: package.module:factory, a function of a Geometry that returns an optimizer.")
    ] = "",
    suite: Annotated[str, typer.Option(help="full: all tasks of the suite; quick: ten small ones.")] = "full",
    tasks: Annotated[str, typer.Option(help="Only tasks whose name matches this pattern, *PCA* for instance.")] = "*",
    own: Annotated[
        str, typer.Option(help="package.module:tasks, a sequence of your own SuiteTask, instead of the suite.")
    ] = "",
    folder: Annotated[
        Path,
        typer.Option("--archive", help="Folder of tuned baselines.  [default: the one that ships]", show_default=False),
    ] = archive.FOLDER,
    out: Annotated[Path | None, typer.Option(help="Folder for report.md, report.html and results.json.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
    threads: Annotated[int, typer.Option(help="Threads of a tensor operation.", min=1)] = 1,
) -> None:
    """Compare an untuned optimizer with the archive of tuned baselines."""
    torch.set_num_threads(threads)
    if weights is not None and optimizer:
        raise UsageError("give --weights or --optimizer, not both")
    name, make = _chosen_optimizer(weights or FOLDER / RELEASES["base"], optimizer)
    chosen = _chosen_tasks(suite, tasks, own)
    if out is not None:
        if out.exists() and not out.is_dir():
            raise UsageError(f"--out is a folder; {out} is a file")
        out.mkdir(parents=True, exist_ok=True)  # an unwritable place is said now, not after minutes
    results: list[TaskResult] = []
    reasons: list[str] = []
    with live.progress(console, quiet) as progress:
        bar = progress.add_task("evaluating", total=len(chosen), note=chosen[0].row[:44])
        for done, (task, result) in enumerate(compare(name, make, chosen, folder), start=1):
            reasons.append(f"{task.row}: {result}") if isinstance(result, str) else results.append(result)
            progress.update(bar, advance=1, note=chosen[min(done, len(chosen) - 1)].row[:44])
    if not results:
        raise UsageError(f"there is nothing to report. {'; '.join(reasons[:3])}")
    notes = [*doubts(results), *(f"left out, {reason}" for reason in reasons)]
    for note in notes:
        console.print(note)
    found = Comparison(name, tuple(results), tuple(notes))
    described = finite_or_null(found.to_json())
    if out is not None:
        write_atomically(out / "results.json", json.dumps(described, indent=1).encode())
        write_atomically(out / "report.md", markdown(found).encode())
        write_atomically(out / "report.html", page(found).encode())
        console.print(f"wrote {out}/report.html, report.md and results.json")
    if as_json:
        typer.echo(json.dumps(described))
    else:
        for title, make_table in (("summary", summary), ("nothing tuned", untuned), ("beside the best tuned", gaps)):
            header, rows = make_table(found)
            _print_table(title, header, rows, header[:1], WIDE)
    if reasons:
        raise typer.Exit(1)


def finite_or_null(value: Any) -> Any:
    """Return JSON-ready content with ``None`` for every number that JSON does not have."""
    if isinstance(value, dict):
        return {key: finite_or_null(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_null(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _imported(path: str, what: str) -> Any:
    """Return the object that ``package.module:name`` names."""
    module, _, attribute = path.partition(":")
    if not module or not attribute:
        raise UsageError(f"--{what} is package.module:name, got {path!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # for good: worker processes import it again
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"--{what} {path}: {error}") from error


def _chosen_optimizer(weights: Path, optimizer: str) -> tuple[str, Any]:
    """Return name and factory of what is evaluated."""
    if optimizer:
        return optimizer, _imported(optimizer, "optimizer")
    theta, adapter = load_weights(weights)
    return weights.stem, lambda geometry: SubspaceOptimizer(geometry, theta, adapter)


def _own_tasks(path: str) -> list[SuiteTask]:
    """Return the tasks that a user named, after a look at what they are."""
    tasks = _imported(path, "own")
    if not isinstance(tasks, list | tuple) or not all(isinstance(task, SuiteTask) for task in tasks) or not tasks:
        raise UsageError(f"--own {path} must be a list or tuple of SuiteTask, got {tasks!r:.200}")
    files = [archive.path_of(task.row).name for task in tasks]
    if twice := [task.row for task, file in zip(tasks, files, strict=True) if files.count(file) > 1]:
        raise UsageError(
            f"--own {path}: these tasks would share a file of the archive, rename them: {', '.join(twice)}"
        )
    return list(tasks)


def _chosen_tasks(suite: str, pattern: str, own: str) -> list[SuiteTask]:
    """Return the tasks that the options mean, those without their data left out with a word."""
    if suite not in ("full", "quick"):
        raise UsageError(f"there is no suite {suite!r}; there are: full, quick")
    tasks = _own_tasks(own) if own else list(evaluation_suite())
    named = [task for task in tasks if own or suite == "full" or task.row in QUICK]
    exact = [task for task in named if task.row.lower() == pattern.lower()]  # a name may hold what patterns are made of
    matching = exact or [task for task in named if fnmatch.fnmatch(task.row.lower(), pattern.lower())]
    if not matching:
        raise UsageError(f"no task matches {pattern!r}; there are: {'; '.join(task.row for task in named)}")
    available = [task for task in matching if task.available]
    if len(available) < len(matching):
        console.print(
            f"left out, the folder that {DATA_VARIABLE} names does not hold their data: "
            + "; ".join(task.row for task in matching if not task.available)
        )
    if not available:
        raise UsageError(f"the data of these tasks are not there; set {DATA_VARIABLE} to their folder")
    return available


@app.command("archive")
def make_archive(
    tasks: Annotated[str, typer.Option(help="Only tasks whose name matches this pattern.")] = "*",
    baselines: Annotated[str, typer.Option(help="Only baselines whose name matches this pattern.")] = "*",
    own: Annotated[
        str, typer.Option(help="package.module:tasks, a sequence of your own SuiteTask, instead of the suite.")
    ] = "",
    folder: Annotated[
        Path,
        typer.Option("--archive", "--folder", help="Where it lies.  [default: the one that ships]", show_default=False),
    ] = archive.FOLDER,
    jobs: Annotated[int, typer.Option(help="Processes side by side.", min=1)] = 1,
    again: Annotated[
        bool, typer.Option("--again", help="Tune stale ones anew, without looking whether their numbers still hold.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what is missing or stale.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Tune every baseline on every task, where that is missing or was done by other code; hours, goes on if stopped.

    What other code has tuned is first run for 50 steps, and kept if these are what was measured.
    """
    chosen = [b for b in archive.KEPT if fnmatch.fnmatch(b.name.lower(), baselines.lower())]
    if not chosen:
        raise UsageError(f"no baseline matches {baselines!r}; there are: {', '.join(b.name for b in archive.KEPT)}")
    try:
        todo = archive.missing(_chosen_tasks("full", tasks, own), chosen, folder)
    except ValueError as error:
        raise UsageError(str(error)) from error
    typer.echo(f"missing or stale: {len(todo)}")
    if dry_run or not todo:
        for task, baseline in todo:
            typer.echo(f"{task.row}: {baseline.name}")
        return
    folder.mkdir(parents=True, exist_ok=True)
    with live.progress(console, quiet) as progress:
        bar = progress.add_task("tuning", total=len(todo), note="")
        kept = 0
        for task, baseline, _, confirmed in archive.regenerate(todo, jobs, folder, not again):
            kept += confirmed
            progress.update(bar, advance=1, note=f"{task.row[:30]}: {baseline.name}")
    typer.echo(f"tuned: {len(todo) - kept}, found as they were: {kept}")


@app.command("memory")
def memory_command(
    model: Annotated[str, typer.Option(help=f"{', '.join(memory.MODELS)}.")] = "resnet50",
    layers: Annotated[bool, typer.Option("--layers", help="Also the state of every layer.")] = False,
    measure: Annotated[
        bool, typer.Option(" /--no-measure", help="Only count; do not run three steps of each.", show_default=False)
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON, with the layers.")] = False,
) -> None:
    """What optimizers remember about a model's matrices: meta-parameters, state, measured peak. Under a minute."""
    try:
        records = memory.memory(model, measure)
    except ValueError as error:
        raise UsageError(str(error)) from error
    others = memory.MODELS[model].others
    if as_json:
        described = {"model": model, "other_parameters": others, "records": records}
        typer.echo(json.dumps({"environment": environment(), **described}))
        return
    header = ["optimizer", "matrices", "meta-parameters", "their bytes", "state, bytes", "measured peak, bytes"]
    rows = [
        [
            r["optimizer"],
            str(r["matrices"]),
            f"{r['meta_parameters']:,}",
            f"{4 * r['meta_parameters']:,}",
            f"{r['state_bytes']:,}",
            "" if r["peak_bytes"] is None else f"{r['peak_bytes']:,}",
        ]
        for r in records
    ]
    _print_table(f"{model}, float32", header, rows, header[:1], WIDE)
    typer.echo(
        f"The other {others:,} parameters (biases, normalisations, head) are Euclidean: {8 * others:,} bytes of AdamW "
        "state. The matrix LSTM constrains the matrices with out <= in only."
    )
    if layers:
        columns = ["matrix", *(r["optimizer"] for r in records if r["matrices"] == records[0]["matrices"])]
        shown = [r["layers"] for r in records if r["matrices"] == records[0]["matrices"]]
        lines = [
            [f"{parts[0]['d']} x {parts[0]['p']}", *(f"{part['state_bytes']:,}" for part in parts)]
            for parts in zip(*shown, strict=True)
        ]
        _print_table("state of each layer, bytes", columns, lines, (), WIDE)


@app.command("weights")
def show_weights(
    file: Annotated[Path, typer.Argument(help="A weights file; by default the shipped one.")] = FOLDER
    / RELEASES["base"],
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Show what a weights file holds."""
    theta, adapter = load_weights(file)
    described = {
        "file": str(file),
        "preset": adapter.name,
        "settings": dataclasses.asdict(adapter),
        "meta_parameters": sum(value.numel() for value in theta.values()),
        "bytes": file.stat().st_size,
        "tensors": {name: list(value.shape) for name, value in theta.items()},
    }
    if as_json:
        typer.echo(json.dumps(described))
        return
    for key, value in described.items():
        typer.echo(f"{key:16} {value}")


bench = typer.Typer(rich_markup_mode=None, help="Measure this machine, side by side with other libraries.")
app.add_typer(bench, name="bench")


@bench.command("geometry")
def bench_geometry_command(
    rounds: Annotated[int, typer.Option(help="Rounds; the least time counts.", min=1)] = 9,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """One step on ResNet-50's convolutions, on 256 small matrices, and with the canonical metric; CPU seconds."""
    records = bench_geometry(rounds)
    if as_json:
        typer.echo(json.dumps({"environment": environment(), "records": records}))
        return
    _print_times("CPU seconds of one step, one thread, least of several", records)


@bench.command("step")
def bench_step_command(
    rounds: Annotated[int, typer.Option(help="Rounds; the least time counts.", min=1)] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """The learned step on ResNet-50 and on a transformer: against the least traffic, and Adam. About a minute."""
    _, adapter = load_weights(FOLDER / RELEASES["base"])
    assert isinstance(adapter, BaseAdapter)
    records, kernels = bench_step(adapter, rounds), kernel_traffic(adapter)
    if as_json:
        described = {**environment(), "cpu_kernels": "native" if native.library() else "torch"}
        typer.echo(json.dumps({"environment": described, "records": records, "kernels": kernels}))
        return
    _print_times("CPU seconds of one learned step without retraction, one thread, least of several", records)
    for record in kernels:
        typer.echo(
            f"{record['what']}: on a GPU {record['bytes'] / 1e6:.1f} MB a step, {record['ratio']:.3f} of the least; "
            f"{record['launches']} launches (2 a bucket, {record['buckets']} in use, and 3)"
        )


@bench.command("predecessor")
def bench_predecessor_command(
    minutes: Annotated[float, typer.Option(help="CPU minutes of meta-training, for each optimizer and task.")] = 4.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON, with the curves.")] = False,
) -> None:
    """The matrix LSTM and the subspace optimizer, meta-trained for the same CPU time on YaleB and on Kylberg."""
    if not minutes > 0.0:
        raise UsageError(f"--minutes must be positive, got {minutes}")
    try:
        records = bench_predecessor(minutes)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if as_json:
        typer.echo(json.dumps({"environment": environment(), "records": records}))
        return
    title = f"{minutes:g} CPU minutes of meta-training on the task itself; mean log excess"
    _print_table(title, *predecessor.table(records), ("task", "optimizer", "meta-training"), WIDE)


@bench.command("meta")
def bench_meta_command(
    rounds: Annotated[int, typer.Option(help="Rounds; the least time counts.", min=1)] = 10,
    block: Annotated[int, typer.Option(help="Steps in one compiled block.", min=1)] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Meta-gradients: speed against JAX and TorchOpt, seconds to compile, memory of 1,000 steps. About ten minutes."""
    try:
        records = bench_meta(rounds, block)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if as_json:
        typer.echo(json.dumps({"environment": environment(), "records": records}))
        return
    rows = [
        (r["what"], f"{r['ours']:,.4g}", r.get("peer", ""), r.get("theirs"), ",.4g", r.get("ratio")) for r in records
    ]
    _print_comparison("meta-gradients through unrolled inner loops; one thread, compilation on all cores", "", rows)


def _print_times(title: str, records: Sequence[Mapping[str, Any]]) -> None:
    """Print records of seconds against a peer's."""
    rows = [(r["what"], f"{r['seconds']:.4f}", r["peer"], r["peer_seconds"], ".4f", r["ratio"]) for r in records]
    _print_comparison(title, "s", rows)


def _print_comparison(
    title: str, unit: str, rows: Sequence[tuple[str, str, str, float | None, str, float | None]]
) -> None:
    """Print rows of (what, ours, peer, theirs, format, ratio)."""
    cells = []
    for what, ours, peer, theirs, form, ratio in rows:
        shown = "" if not peer else "not installed" if theirs is None else format(theirs, form)
        cells.append([what, ours, peer, shown, "" if ratio is None else f"{ratio:.3f}"])
    header = [column.strip() for column in ("what", f"ours {unit}", "peer", f"theirs {unit}", "ratio")]
    _print_table(title, header, cells, ("what", "peer"), WIDE)


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        typer.echo(__version__)
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


AFTER_STOP = {
    "train": "; a run that had begun goes on with: train --name NAME --resume",
    "archive": "; finished cells are kept, the same command goes on",
}


def main() -> None:
    """Run the command line; errors of the user are one line on stderr and exit code 2."""
    # torch's own compiler calls what torch has deprecated; the user can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.")
    try:
        code = app(standalone_mode=False)
    except typer.TyperException as error:
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        code = _complain(f"{message} (see subspace-meta --help)")
    except (UsageError, CheckpointError, TrainingError, ProcessError, ImportError, OSError) as error:
        code = _complain(str(error))
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    finally:
        Processes.leave()  # gloo's threads, left running, may abort the interpreter as it ends
    if code == 130:  # what typer, too, makes of Ctrl-C
        _complain(f"stopped{AFTER_STOP.get(next(iter(sys.argv[1:]), ''), '')}")
    sys.exit(code if isinstance(code, int) else 0)


def _complain(message: str) -> int:
    typer.echo("subspace-meta: " + " ".join(message.split()), err=True)
    return 2


if __name__ == "__main__":
    main()
