"""``subspace-meta weights`` and ``memory``: what a file holds, and what optimizers remember."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

from subspace_meta.benchmarks import memory
from subspace_meta.checkpoint import load_notes, load_weights
from subspace_meta.cli.common import WIDE, UsageError, print_table
from subspace_meta.evaluation.report import environment
from subspace_meta.weights import RELEASES, located


def memory_command(
    model: Annotated[str, typer.Option(help=f"{', '.join(memory.MODELS)}.")] = "resnet50",
    layers: Annotated[bool, typer.Option("--layers", help="Also the state of every layer.")] = False,
    only_count: Annotated[
        bool, typer.Option("--no-measure", help="Only count; do not run three steps of each.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON, with the layers.")] = False,
) -> None:
    """What optimizers remember about a model's matrices: meta-parameters, state, measured peak. Under a minute."""
    try:
        records = memory.memory(model, not only_count)
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
    print_table(f"{model}, float32", header, rows, header[:1], WIDE)
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
        print_table("state of each layer, bytes", columns, lines, (), WIDE)


def weights_command(
    file: Annotated[str, typer.Argument(help=f"A weights file, or {' or '.join(RELEASES)}, which ship.")] = "base",
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Show what a weights file holds, and the notes that were written with it."""
    path = located(file)
    if not path.exists():
        raise UsageError(f"{file}: no such file, and the weights that ship are {', '.join(RELEASES)}")
    theta, adapter = load_weights(path)
    described = {
        "file": str(path),
        "preset": adapter.name,
        "settings": dataclasses.asdict(adapter),
        "meta_parameters": sum(value.numel() for value in theta.values()),
        "bytes": path.stat().st_size,
        "tensors": {name: list(value.shape) for name, value in theta.items()},
    }
    notes = load_notes(path)
    if as_json:
        typer.echo(json.dumps({**described, "notes": notes}))
        return
    for key, value in described.items():
        typer.echo(f"{key:16} {value}")
    if notes:
        typer.echo("notes")
    for key, value in notes.items():
        typer.echo(f"  {key:14} {value}")
