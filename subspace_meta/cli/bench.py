"""``subspace-meta bench``: this machine, side by side with other libraries."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
from subspace_kernels import native

from subspace_meta.adapter.base import BaseAdapter
from subspace_meta.benchmarks.geometry import bench_geometry
from subspace_meta.benchmarks.meta import bench_meta
from subspace_meta.benchmarks.predecessor import bench_predecessor
from subspace_meta.benchmarks.step import bench_step, kernel_traffic
from subspace_meta.checkpoint import load_weights
from subspace_meta.cli.common import WIDE, UsageError, print_table
from subspace_meta.evaluation import predecessor
from subspace_meta.evaluation.report import environment
from subspace_meta.weights import FOLDER, RELEASES


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
    print_table(title, *predecessor.table(records), ("task", "optimizer", "meta-training"), WIDE)


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
    print_table(title, header, cells, ("what", "peer"), WIDE)
