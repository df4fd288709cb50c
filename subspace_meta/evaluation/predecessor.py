"""What ``subspace-meta bench predecessor --json`` measured, as it ships: a section of the report.

The file beside this one is that command's output, on the machine that it names.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from subspace_meta.evaluation.report import in_words

FILE = Path(__file__).with_name("predecessor.json")

Record = dict[str, Any]


@functools.cache
def content() -> dict[str, Any]:
    """Return the whole file; empty if there is none."""
    return json.loads(FILE.read_text()) if FILE.is_file() else {"environment": {}, "records": []}


def recorded(rows: Collection[str]) -> list[Record]:
    """Return the records of those tasks among ``rows`` that were measured; see ``benchmarks.predecessor``."""
    return [record for record in content()["records"] if record["task"] in rows]


def where() -> str:
    """Return machine, versions and date of the measurement."""
    return in_words(content()["environment"])


def table(records: list[Record]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows: losses and figure of merit at the checkpoints, before and after meta-training."""
    checkpoints = records[0]["checkpoints"]
    last = checkpoints[-1]
    header = ["task", "optimizer", "meta-training", "meta-parameters", "outer steps", "CPU s a step"]
    header += [*(f"@{step}" for step in checkpoints), f"figure @{last}"]
    rows = []
    for record in records:
        scores = [record["log_excess"][record["steps"].index(step)] for step in checkpoints]
        rows.append(
            [
                record["task"],
                record["optimizer"],
                record["training"],
                f"{record['meta_parameters']:,}",
                str(record["outer_steps"]) if record["training"] == "after" else "0",
                f"{record['cpu_seconds_a_step']:.2g}",
                *(f"{score:.2f}" for score in scores),
                f"{record['metric'][-1]:.4g}",
            ]
        )
    return header, rows
