"""A comparison as a page: Markdown, and self-contained HTML with the plots inside."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Callable, Mapping, Sequence

from subspace_meta.evaluation import predecessor
from subspace_meta.evaluation.comparison import COMPARED, PEER, Comparison, TaskResult
from subspace_meta.evaluation.plots import plot_predecessor, plot_profile, plot_tasks
from subspace_meta.evaluation.protocol import BASELINES, SCHEDULED, UNTUNED
from subspace_meta.evaluation.report import environment, in_words

Table = tuple[list[str], list[list[str]]]

MARKS = {"+": "better", "=": "tie", "-": "worse"}  # how a cell ends that compares with the best baseline
BESIDE = re.compile(r"(\S+) \((.*)\)(?: ([+=-]))?")  # a cell with another optimizer's figure in brackets

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1700px; margin: 2em auto; padding: 0 1em; }
body { color: #222; background: white; }
h2 { margin: 2em 0 0.4em; } p { max-width: 60em; margin: 0.6em 0; }
table { border-collapse: collapse; margin: 0.8em 0; font-size: 13px; }
th, td { padding: 3px 8px; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th { border-bottom: 2px solid #888; white-space: normal; vertical-align: bottom; }
.left { text-align: left; } td small { color: #555; }
.wide { overflow-x: auto; } .wide img { min-width: 900px; } img { max-width: 100%; }
th:first-child, td:first-child { position: sticky; left: 0; background: white; white-space: normal; min-width: 12em; }
.better { background: #d9f0e3; } .worse { background: #fbe3d6; }
@media (max-width: 600px) {
  body { margin: 1em auto; padding: 0 0.7em; } h1 { font-size: 1.5em; } th, td { padding: 3px 5px; }
  th:first-child, td:first-child { min-width: 8.5em; max-width: 8.5em; }
  .left { white-space: normal; }
}
"""


def summary(comparison: Comparison) -> Table:
    """Return what the suite says, all tasks together and by axis of generalisation."""
    steps = sorted({step for result in comparison.results for step in result.compared})
    header = ["axis", "tasks", "speed-up, steps", "speed-up, CPU seconds", *(f"@{step}" for step in steps)]

    def line(name: str, results: Sequence[TaskResult]) -> list[str]:
        shares = []
        for step in steps:
            shares.append(_share(*comparison.no_worse(step, results)))
        return [name, str(len(results)), *(_interval(comparison.speed(s, results)) for s in (False, True)), *shares]

    rows = [line("all", comparison.results)]
    rows += [line(axis, results) for axis, results in comparison.by_axis().items()]
    return header, rows


def _interval(values: tuple[float, float, float]) -> str:
    return "{:.2f} [{:.2f}, {:.2f}]".format(*values)


def losses(comparison: Comparison) -> Table:
    """Return the losses of every task at every step, beside the best baseline's."""
    steps = sorted({step for result in comparison.results for step in result.compared})
    header = ["task", "on", "axis", *(f"@{step}" for step in steps), "speed-up", "violation"]
    rows = []
    for result in comparison.results:
        cells = []
        for step in steps:
            if step not in result.compared:
                cells.append("")
                continue
            name, best = result.best(step)
            mark = {"better": "+", "tie": "=", "worse": "-"}[result.verdict(step)]
            cells.append(f"{result.score(step):.2f} ({best:.2f} {name}) {mark}")
        speed, censored = result.speed_ups()
        rows.append(
            [
                result.task.row,
                " x ".join(result.task.manifolds),
                result.task.axis,
                *cells,
                f"{'>= ' if censored else ''}{float(speed.mean()):.2f}",
                f"{result.violation:.0e}",
            ]
        )
    return header, rows


def untuned(comparison: Comparison) -> Table:
    """Return on how many tasks the optimizer is no worse than each method at its published default."""
    known = [b for b in BASELINES + UNTUNED if b.default is not None]
    rows = {b.name: (f"{b.default:g}", b.source) for b in known}
    return _beside(comparison, ["nothing tuned", "rate", "from"], rows, comparison.beside_untuned)


def scheduled(comparison: Comparison) -> Table:
    """Return on how many tasks the optimizer is no worse than each method whose schedule ends at the step."""
    rivals: dict[str, tuple[str, ...]] = {b.name: () for b in SCHEDULED}
    header, rows = _beside(comparison, ["told the steps, peak rate tuned"], rivals, comparison.beside_scheduled)
    not_told = [_share(*comparison.no_worse(int(step[1:]), told=True)) for step in header[1:]]
    return header, [*rows, ["the best tuned one on each task, not told", *not_told]]


def _beside(
    comparison: Comparison,
    header: list[str],
    rivals: Mapping[str, tuple[str, ...]],
    count: Callable[[str, int], tuple[int, int]],
) -> Table:
    """Return a row for every rival that there is, and one for the best; ``rivals`` says what else it shows."""
    steps = sorted({step for result in comparison.results for step in result.compared})

    def shares(name: str) -> list[str]:
        return [_share(*count(name, step)) for step in steps]

    there = {name for result in comparison.results for name in result.cells}
    rows = [[name, *cells, *shares(name)] for name, cells in rivals.items() if name in there]
    last = [["the best of them on each task", *("" for _ in header[1:]), *shares("")]] if rows else []
    return [*header, *(f"@{step}" for step in steps)], [*rows, *last]


def _share(count: int, of: int) -> str:
    return f"{count}/{of}" if of else ""


def gaps(comparison: Comparison) -> Table:
    """Return how far each task is from the best tuned baseline, the widest gap first."""
    header = ["log excess less the best tuned", *(f"@{step}" for step in COMPARED), "most to"]

    def widest(result: TaskResult) -> tuple[float, str]:
        steps = [step for step in COMPARED if step in result.compared]
        return max((result.score(step) - result.best(step)[1], result.best(step)[0]) for step in steps)

    rows = [
        [
            result.task.row,
            *(
                f"{result.score(step) - result.best(step)[1]:+.2f}" if step in result.compared else ""
                for step in COMPARED
            ),
            widest(result)[1],
        ]
        for result in sorted(comparison.results, key=lambda result: -widest(result)[0])
    ]
    return header, rows


def figures(comparison: Comparison) -> Table:
    """Return each task's own figure of merit, beside that of the baseline that is best in loss at that step."""
    steps = (50, 100, 200, 400)

    def cell(result: TaskResult, step: int) -> str:
        name, _ = result.best(step)
        best = result.cells[name]
        theirs = best.metric[best.best(step), :, best.checkpoints.index(step)].mean()
        ours = result.curves.metric[0, :, result.curves.checkpoints.index(step)].mean()
        return f"{float(ours):.3g} ({float(theirs):.3g} {name})"

    rows = [
        [
            result.task.row,
            result.task.metric,
            *(cell(result, step) if step in result.compared else "" for step in steps),
        ]
        for result in comparison.results
    ]
    return ["task", "figure", *(f"@{step}" for step in steps)], rows


def preamble(comparison: Comparison) -> list[str]:
    """Return how to read the tables, and what was measured where."""
    return [
        f"One untuned run a seed, no learning rate, against {len(comparison.tuned)} hand-made optimizers at their best "
        "learning rate of a grid of 15 half-decades, chosen anew at every step count (from the archive). Losses are "
        "means over five seeds of log((f - f*)/(f0 - f*)), the log excess; lower is better. @50: after 50 steps.",
        f"Speed-up: how many times more steps (CPU seconds) {PEER} with the best learning rate at each moment needs to "
        "reach the same loss; interquartile mean over all runs with a 95 % stratified bootstrap interval. Where it "
        "never gets there the length of its run counts (>=).",
        f"Largest violation of a constraint {comparison.largest_violation:.0e}; share of finite runs "
        f"{comparison.share_finite:.3f}. Measured: {in_words(environment())}.",
        *(f"Note: {note}." for note in comparison.notes),
    ]


# Title, how to read it, what makes it.
SECTIONS = (
    (
        "Summary",
        "On how many tasks it is no worse than the best tuned baseline, better or within 0.02, of how many; all "
        "together, and by how the tasks differ from what the shipped weights are trained on.",
        summary,
    ),
    (
        "Nothing tuned",
        "On how many tasks it is no worse than methods that nobody tuned either: at the default rate that was "
        "published, or without one (1: as published).",
        untuned,
    ),
    (
        "The number of steps known",
        "On how many tasks it is no worse where it is told how many steps there will be, if it takes that: beside "
        "methods whose rate follows a cosine to the last step, the peak rate tuned for each number of steps, and "
        "beside the best tuned one of the summary.",
        scheduled,
    ),
    (
        "Where most is lost",
        "Log excess less that of the best tuned baseline: above 0 it is behind. The widest gap first; the last column "
        "is the baseline that it is to.",
        gaps,
    ),
    (
        "Losses",
        "Log excess, and in brackets that of the best tuned baseline: better than it (+), worse (-), or a tie (=), "
        "within 0.02 or both in the last digits of float32. Speed-up: the mean over seeds. Violation: of a constraint, "
        "the largest.",
        losses,
    ),
    (
        "Figures of merit",
        "What each task is solved for, and in brackets that of the baseline that is best in loss. Of accuracy, purity "
        "and shares more is better, of all others less.",
        figures,
    ),
)


PREDECESSOR = "Beside the matrix LSTM"


def _about_the_predecessor(records: Sequence[predecessor.Record]) -> str:
    return (
        f"Matrix LSTM and subspace optimizer, each meta-trained for {records[0]['minutes']:g} CPU minutes on the very "
        "task that it is judged on, as the published comparisons do; losses as above. Not part of this run: "
        f"subspace-meta bench predecessor, {predecessor.where()}."
    )


def _recorded(comparison: Comparison) -> list[predecessor.Record]:
    return predecessor.recorded({result.task.row for result in comparison.results})


def markdown(comparison: Comparison) -> str:
    """Return the report as Markdown."""
    parts = [f"# {comparison.name} on {len(comparison.results)} tasks", *preamble(comparison)]
    for title, text, make in SECTIONS:
        parts += [f"## {title}", text, _pipes(*make(comparison))]
    if records := _recorded(comparison):
        parts += [f"## {PREDECESSOR}", _about_the_predecessor(records), _pipes(*predecessor.table(records))]
    return "\n\n".join(parts) + "\n"


def _pipes(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def page(comparison: Comparison) -> str:
    """Return the report as one HTML file that needs nothing else."""
    title = html.escape(f"{comparison.name} on {len(comparison.results)} tasks")
    parts = [f"<h1>{title}</h1>", *(f"<p>{html.escape(text)}</p>" for text in preamble(comparison))]
    for name, text, make in SECTIONS:
        parts += [f"<h2>{name}</h2>", f"<p>{html.escape(text)}</p>", _table(*make(comparison))]
        if name == "Summary":
            parts.append(_image(plot_profile(comparison), "performance profile"))
    parts += ["<h2>Curves</h2>", "<p>Mean of the seeds, and the band from the lowest to the highest.</p>"]
    parts.append(f'<div class="wide">{_image(plot_tasks(comparison), "loss curves of every task")}</div>')
    if records := _recorded(comparison):
        parts += [f"<h2>{PREDECESSOR}</h2>", f"<p>{html.escape(_about_the_predecessor(records))}</p>"]
        parts += [_table(*predecessor.table(records)), _image(plot_predecessor(records), "loss curves of both")]
    screen = '<meta name="viewport" content="width=device-width, initial-scale=1">'  # else phones show it tiny
    head = f'<meta charset="utf-8">{screen}<title>{title}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def _table(header: list[str], rows: list[list[str]]) -> str:
    """Return a table as HTML: columns of words flush left, in a box of its own that scrolls where it is too wide."""
    columns = zip(header, *rows, strict=True)
    left = [i == 0 or any(text[:1].isalpha() for text in column[1:]) for i, column in enumerate(columns)]

    def cell(tag: str, i: int, text: str) -> str:
        kinds, content = ["left"] if left[i] else [], html.escape(text)
        if beside := BESIDE.fullmatch(text):  # the other's figure goes below, in small, the mark as a word
            ours, theirs, mark = beside.groups()
            kinds += [MARKS[mark]] if mark else []
            words = html.escape(f"({theirs}) {MARKS.get(mark, '')}".strip())
            content = f"{html.escape(ours)}<br><small>{words}</small>"
        return f'<{tag} class="{" ".join(kinds)}">{content}</{tag}>' if kinds else f"<{tag}>{content}</{tag}>"

    lines = [("th", header), *(("td", row) for row in rows)]
    body = "".join(f"<tr>{''.join(cell(tag, i, text) for i, text in enumerate(row))}</tr>" for tag, row in lines)
    return f'<div class="wide"><table>{body}</table></div>'


def _image(png: bytes, what: str) -> str:
    return f'<img alt="{what}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
