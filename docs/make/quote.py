"""The numbers of the pages, from the reports of ``subspace-meta evaluate`` on the shipped weights.

python docs/make/quote.py --measure FOLDER    evaluate the shipped weights into FOLDER, take over what is said of them
python docs/make/quote.py RESULTS.json ...    take over what these reports say
python docs/make/quote.py [--check]           write the pages anew, or only say where they differ

``docs/results.json`` keeps of each report what the pages quote. In a page a number or a table stands between marks that
no reader sees, ``<!-- numbers: NAME -->`` and ``<!-- /numbers -->``; :func:`pieces` says what belongs there.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import re
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from subspace_meta.checkpoint import write_atomically
from subspace_meta.evaluation.comparison import COMPARED, PEER
from subspace_meta.evaluation.protocol import BASELINES
from subspace_meta.tasks.data import DATA_VARIABLE
from subspace_meta.tasks.suite import evaluation_suite
from subspace_meta.weights import FOLDER, RELEASES

ROOT = Path(__file__).parents[2]
KEPT = "docs/results.json"
PICTURE = "docs/curves.svg"
PAGES = (
    "README.md",
    "docs/index.md",
    "docs/results.md",
    "docs/evaluation.md",
    "docs/how_it_works.svg",
    "subspace_meta/weights/MODEL_CARD.md",
)
MARKED = re.compile(r"<!-- numbers: (\S+) -->(.*?)<!-- /numbers -->", re.DOTALL)
MARK = re.compile(r"<!-- /?numbers")
# A comment that begins a line is a block of its own, and would end the paragraph.
BEGINS_A_LINE = re.compile(r"^[ \t]*(?:[*>-] +)?<!-- /?numbers[^>]*-->.", re.MULTILINE)

NAMES = {role: Path(file).stem for role, file in RELEASES.items()}
BASE = NAMES["base"]
AVERAGES = f"{BASE}, averages"
REPORTS = (*NAMES.values(), AVERAGES)
AXES = {
    "real data": "real data",
    "unseen task": "unseen task",
    "unseen size": "unseen size",
    "unseen manifold": "unseen manifold",
    "training distribution": "training distribution",
    "10x horizon": "ten times as many steps",
}
TRAINED_ON = ("training distribution", "10x horizon")
BEHIND = 8  # tasks that are named as those where most is lost

PCA, LONG_PCA = "synthetic PCA 64x8", "synthetic PCA 64x8, 4000 steps"
# Figures of single tasks: task, what is quoted, its name, after which steps.
QUOTED = (
    ("orthonormal classification of YaleB 1024x38", "metric", "test accuracy", (50, 100, 400)),
    ("Karcher means of Kylberg 20x5x5", "objective", "loss", (5, 20)),
    ("leading subspace 200x20", "ours", "log excess", (50, 100, 200)),
    (PCA, "ours", "log excess", (100, 400)),
    (LONG_PCA, "ours", "log excess", (1000, 4000)),
    (LONG_PCA, "told", "log excess, told the steps", (1000, 4000)),
)

Described = dict[str, Any]


# --- From a report to what is kept ---


def taken_over(kept: Described, reports: Sequence[Described]) -> Described:
    """Return what is kept, of the shipped weights alone, with what some reports say.

    Raises:
        ValueError: a report is of other weights, or not of the whole suite.
    """
    rows = {task.row for task in evaluation_suite()}
    found = dict(kept)
    for report in reports:
        name = report["optimizer"]
        if name not in REPORTS:
            raise ValueError(f"a report is of {name}; of what ships there are {'; '.join(REPORTS)}")
        if lacking := rows - {task["task"] for task in report["tasks"]}:
            raise ValueError(f"the report on {name} lacks {len(lacking)} of {len(rows)} tasks, {min(lacking)} for one")
        found[name] = condensed(report)
    return {name: found[name] for name in REPORTS if name in found}


def as_text(kept: Described) -> str:
    """Return JSON with a list on a line."""
    text = json.dumps(kept, indent=1)
    return re.sub(r"\[\s+([^][{]+?)\s+\]", lambda match: f"[{' '.join(match[1].split())}]", text) + "\n"


def condensed(report: Described) -> Described:
    """Return what the pages quote of a report; of others than that on ``base``'s iterates that is one line."""
    kept = {"environment": report["environment"], "all": _line(report["all"])}
    if report["optimizer"] != BASE:
        return kept
    tasks = {task["task"]: task for task in report["tasks"]}
    return {
        **kept,
        "tuned": report["tuned"],
        "manifolds": sorted({name for task in tasks.values() for name in task["manifolds"]}),
        "axes": {axis: _line(line, ("no_worse",)) for axis, line in report["axes"].items()},
        "largest_violation": _short(report["largest_violation"]),
        "share_finite": report["share_finite"],
        "tasks": {row: _quotable(tasks[row]) for row in dict.fromkeys(row for row, *_ in QUOTED)},
        "behind": sorted(map(_widest, tasks.values()), key=lambda lost: lost["best"] - lost["ours"])[:BEHIND],
    }


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _line(
    summary: Described, keys: Sequence[str] = ("no_worse", "no_worse_told", "no_worse_than_untuned")
) -> Described:
    """Return a line of the summary: on how many tasks no worse, step after step, and the speed-ups."""
    counts = {key: {str(step): summary[key][str(step)] for step in COMPARED} for key in keys}
    speeds = {key: [_short(value) for value in summary[key]] for key in ("speed_up_steps", "speed_up_cpu_seconds")}
    return {"tasks": summary["tasks"], **counts, **speeds}


def _quotable(task: Described) -> Described:
    """Return the figures of a task that are quoted, each by step."""
    best = [one["log_excess"] for one in task["best"]]
    by_step = {
        "ours": (task["compared"], task["log_excess"]),
        "told": (task["compared"], task["log_excess_told"]),
        "best": (task["compared"], best),
        "objective": (task["checkpoints"], task["objective"]),
        "metric": (task["checkpoints"], task["metric"]),
    }
    found: Described = {"minimum": _short(task["minimum"])}
    for row, key, _, steps in QUOTED:
        for name in (key, "best") if row == task["task"] else ():
            values = dict(zip(*by_step[name], strict=True))
            found.setdefault(name, {}).update({str(step): _short(values[step]) for step in steps if step in values})
    return found


def _widest(task: Described) -> Described:
    """Return where a task is furthest behind the best tuned baseline."""
    lost = [
        {"task": task["task"], "step": step, "ours": _short(ours), "best": _short(best["log_excess"])}
        | {"baseline": best["baseline"]}
        for step, ours, best in zip(task["compared"], task["log_excess"], task["best"], strict=True)
        if step in COMPARED
    ]
    return max(lost, key=lambda one: one["ours"] - one["best"])


# --- What the pages say ---


def pieces(kept: Described) -> dict[str, str]:
    """Return what stands between the marks, by name: single numbers, and tables.

    Raises:
        ValueError: there is no report on some of the weights that ship.
    """
    if lacking := set(REPORTS) - kept.keys():
        raise ValueError(f"{KEPT} has nothing on {'; '.join(sorted(lacking))}; make numbers")
    base = kept[BASE]
    trained_on = sum(base["axes"][axis]["tasks"] for axis in TRAINED_ON if axis in base["axes"])
    long = base["tasks"][LONG_PCA]
    return {
        "weights": f"`{BASE}`",  # a mark within code would be code
        "parameters": parameters("base"),
        "parameters-light": parameters("light"),
        "kilobytes": f"{(FOLDER / RELEASES['base']).stat().st_size / 1000:.0f}",
        "tasks": str(base["all"]["tasks"]),
        "manifolds": str(len(base["manifolds"])),
        "not-trained-on": str(base["all"]["tasks"] - trained_on),
        "tuned": str(len(base["tuned"])),
        "baselines": str(len(BASELINES)),
        "where": in_words(base["environment"]),
        "summary": summary(kept, tuple(AXES)),
        "summary-short": summary(kept, ("real data",)),
        "untuned": shares(base["all"], "no_worse_than_untuned"),
        "told": shares(base["all"], "no_worse_told"),
        "steps": " / ".join(map(str, COMPARED)),
        "long-told": f"{long['told']['4000']:.2f}",
        "long": f"{long['ours']['4000']:.2f}",
        "finite": f"{base['share_finite']:.3g}",
        "violation": f"{base['largest_violation']:.0e}".replace("e-0", "e-"),
        "card": card(kept),
        "figures": figures(base["tasks"]),
        "behind": behind(base["behind"]),
    }


def parameters(role: str) -> str:
    """Return how many numbers the shipped weights of a preset are."""
    with safe_open(FOLDER / RELEASES[role], "numpy") as file:
        return f"{sum(math.prod(file.get_slice(name).get_shape()) for name in list(file.keys())):,}"


def in_words(environment: Mapping[str, str]) -> str:
    """Return where and when a report was made: processor, threads, torch, date, commit."""
    _, *processor, threads = environment["machine"].split(", ")
    name = re.sub(r"\((?:R|TM)\)| (?:CPU|Processor)\b.*", "", ", ".join(processor))
    many = "one thread" if threads.startswith("1 ") else threads
    torch = environment["torch"].partition("+")[0]
    return f"{name}, {many}, torch {torch}, {environment['date']}, commit {environment['commit']}"


def shares(line: Described, key: str = "no_worse") -> str:
    """Return on how many tasks, step after step; and of how many, where that is not all."""
    counts = (line[key][str(step)] for step in COMPARED)
    return " / ".join(f"{count}" if of == line["tasks"] else f"{count} of {of}" for count, of in counts)


def speeds(line: Described) -> list[str]:
    """Return the speed-ups in steps and in CPU seconds, with their intervals."""
    return ["{:.2f} [{:.2f}, {:.2f}]".format(*line[key]) for key in ("speed_up_steps", "speed_up_cpu_seconds")]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as Markdown."""
    lines = [re.sub(r"\|  (?=\|)", "| ", f"| {' | '.join(cells)} |") for cells in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def summary(kept: Described, axes: Collection[str]) -> str:
    """Return the table that says most: all tasks together, iterates and averages, and by axis."""
    base = kept[BASE]
    lines = {"all": base["all"], "all, averages handed out": kept[AVERAGES]["all"]}
    lines |= {AXES[axis]: base["axes"][axis] for axis in axes if axis in base["axes"]}
    steps = " / ".join(map(str, COMPARED))
    no_worse = f"no worse than the best of {len(base['tuned'])} after {steps} steps"
    header = ["shipped weights, untuned", "tasks", no_worse, f"speed-up over tuned {PEER}, steps", "CPU seconds"]
    return table(header, [[name, str(line["tasks"]), shares(line), *speeds(line)] for name, line in lines.items()])


def card(kept: Described) -> str:
    """Return a line for each of the weights that ship."""
    rows = []
    for name in REPORTS:
        line = kept[name]["all"]
        rows.append(["`{}`{}{}".format(*name.partition(",")), shares(line), *speeds(line)])
        if name == BASE:
            rows.append([f"`{name}`, told the steps", shares(line, "no_worse_told"), "", ""])
    return table(["", f"no worse, of {kept[BASE]['all']['tasks']}", "speed-up, steps", "CPU seconds"], rows)


def figures(tasks: Described) -> str:
    """Return figures of single tasks, where it is a loss relative to the start beside the best tuned baseline's."""

    def joined(values: Mapping[str, float], steps: Sequence[int], form: str) -> str:
        return " / ".join(form.format(values[str(step)]) for step in steps)

    rows = []
    for row, key, what, steps in QUOTED:
        best = joined(tasks[row]["best"], steps, "{:.2f}") if key in ("ours", "told") else ""
        least = f", at least {tasks[row]['minimum']:.4g}" if key == "objective" else ""
        ours = joined(tasks[row][key], steps, {"metric": "{:.3f}", "objective": "{:.4g}"}.get(key, "{:.2f}"))
        rows.append([row, what + least, " / ".join(map(str, steps)), ours, best])
    return table(["task", "what", "steps", f"`{BASE}`", "best tuned"], rows)


def behind(lost: Sequence[Described]) -> str:
    """Return the tasks that are furthest behind the best tuned baseline, at the step where they are."""
    rows = [
        [one["task"], str(one["step"]), f"{one['ours']:.2f}", f"{one['best']:.2f}", one["baseline"]] for one in lost
    ]
    return table(["task", "step", f"`{BASE}`", "best tuned", "which is"], rows)


# --- Pages ---


def written(text: str, found: Mapping[str, str]) -> str:
    """Return a page with what belongs between its marks; a table has empty lines around it.

    Raises:
        ValueError: a mark is not closed, has a name that is not known, or begins a line of a paragraph.
    """

    def piece(match: re.Match[str]) -> str:
        name, old = match.groups()
        if name not in found:
            raise ValueError(f"nothing is called {name}; there are: {', '.join(found)}")
        new = f"\n\n{found[name]}\n\n" if "\n" in found[name] else found[name]
        return match.group().replace(f"-->{old}<!--", f"-->{new}<!--")

    done, count = MARKED.subn(piece, text)
    if len(MARK.findall(text)) != 2 * count:
        raise ValueError("a mark is not closed, or closed twice")
    if alone := BEGINS_A_LINE.search(done):
        raise ValueError(f"a mark begins a line, which ends the paragraph: {alone.group()}")
    return done


def differences(root: Path) -> dict[str, tuple[str, str]]:
    """Return the pages that differ from what ``docs/results.json`` says: what each is, and what it should be.

    Raises:
        ValueError: there is nothing on weights that ship, or a page has wrong marks.
    """
    found = pieces(json.loads((root / KEPT).read_text("utf-8")))
    pages = {}
    for page in PAGES:
        text = (root / page).read_text("utf-8")
        try:
            pages[page] = (text, written(text, found))
        except ValueError as error:
            raise ValueError(f"{page}: {error}") from error
    return {page: texts for page, texts in pages.items() if texts[0] != texts[1]}


def picture_is_old(root: Path) -> bool:
    """Return whether the README's picture was drawn with other weights."""
    return f"<dc:title>{RELEASES['base']}</dc:title>" not in (root / PICTURE).read_text("utf-8")


def diff(page: str, old: str, new: str) -> str:
    """Return the lines that differ."""
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), page, f"{page}, from {KEPT}", "", "", 0, "")
    return "\n".join(lines)


def measured(folder: Path) -> list[Path]:
    """Evaluate the weights that ship, ``base``'s averages too, some minutes each; return the reports.

    Raises:
        ValueError: the data of a task are not there.
    """
    if lacking := [task.row for task in evaluation_suite() if not task.available]:
        raise ValueError(f"{DATA_VARIABLE} has to name the folder with the data of {', '.join(lacking)}")
    command = [sys.executable, "-m", "subspace_meta", "evaluate", "--weights"]
    runs = {role: [str(FOLDER / file)] for role, file in RELEASES.items()}
    runs["averages"] = [*runs["base"], "--averages"]
    for role, options in runs.items():
        subprocess.run([*command, *options, "--out", str(folder / role)], check=True)
    return [folder / role / "results.json" for role in runs]


def main(root: Path, arguments: Sequence[str] | None = None) -> int:
    """Write or check the pages; return 1 where a check fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", nargs="*", type=Path, metavar="RESULTS.json")
    parser.add_argument("--measure", type=Path, metavar="FOLDER")
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args(arguments)
    if given.check and (given.reports or given.measure):
        parser.error("--check takes no report: it compares the pages with what is kept")
    try:
        reports = [*given.reports, *(measured(given.measure) if given.measure else [])]
        if reports:
            kept = json.loads((root / KEPT).read_text("utf-8")) if (root / KEPT).is_file() else {}
            now = taken_over(kept, [json.loads(report.read_text("utf-8")) for report in reports])
            write_atomically(root / KEPT, as_text(now).encode())
        found = differences(root)
    except ValueError as error:
        parser.error(str(error))
    for page, (old, new) in found.items():
        print(diff(page, old, new))
        if not given.check:
            write_atomically(root / page, new.encode())
    print(f"{len(found)} of {len(PAGES)} pages {'differ' if given.check else 'were written'}")
    if old_picture := picture_is_old(root):
        print(f"{PICTURE} was not drawn with {RELEASES['base']}: python docs/figures.py")
    return int(given.check and bool(found or old_picture))


if __name__ == "__main__":
    sys.exit(main(ROOT))
