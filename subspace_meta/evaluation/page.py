"""A comparison as a page: Markdown, and self-contained HTML with the plots inside."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Mapping, Sequence

from subspace_meta.evaluation import predecessor
from subspace_meta.evaluation.comparison import COMPARED, PEER, Comparison, TaskResult
from subspace_meta.evaluation.plots import plot_predecessor, plot_profile, plot_tasks
from subspace_meta.evaluation.protocol import BASELINES, SCHEDULED, UNTUNED
from subspace_meta.evaluation.report import environment, in_words

Table = tuple[list[str], list[list[str]]]

MARKS = {" +": "better", " =": "tie", " -": "worse"}  # how a cell ends that compares with the best baseline

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1700px; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; font-size: 13px; }
th, td { padding: 3px 8px; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th { border-bottom: 2px solid #888; white-space: normal; } td:first-child, th:first-child { text-align: left; }
.wide { overflow-x: auto; }
th:first-child, td:first-child { position: sticky; left: 0; background: white; white-space: normal; min-width: 12em; }
p { max-width: 60em; } td small { color: #777; }
.better { background: #d9f0e3; } .worse { background: #fbe3d6; } img { max-width: 100%; }
"""


def summary(comparison: Comparison) -> Table:
    """Return what the suite says, all tasks together and by axis of generalisation."""
    steps = sorted({step for result in comparison.results for step in result.compared})
    header = ["", "tasks", "speed-up, steps", "speed-up, CPU seconds", *(f"no worse @{step}" for step in steps)]

    def line(name: str, results: Sequence[TaskResult]) -> list[str]:
        shares = []
        for step in steps:
            count, of = comparison.no_worse(step, results)
            shares.append(f"{count}/{of}" if of else "")
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
    rows: dict[str, tuple[str, ...]] = {b.name: () for b in SCHEDULED}
    return _beside(comparison, ["told the steps, peak rate tuned"], rows, comparison.beside_scheduled)


def _beside(
    comparison: Comparison,
    header: list[str],
    rivals: Mapping[str, tuple[str, ...]],
    count: Callable[[str, int], tuple[int, int]],
) -> Table:
    """Return a row for every rival that there is, and one for the best of them; ``rivals`` says what else it shows."""
    steps = sorted({step for result in comparison.results for step in result.compared})

    def shares(name: str) -> list[str]:
        return [f"{no_worse}/{of}" if of else "" for no_worse, of in (count(name, step) for step in steps)]

    there = {name for result in comparison.results for name in result.cells}
    rows = [[name, *cells, *shares(name)] for name, cells in rivals.items() if name in there]
    last = ["the best of them on each task", *("" for _ in header[1:]), *shares("")]
    return [*header, *(f"no worse @{step}" for step in steps)], [*rows, last]


def gaps(comparison: Comparison) -> Table:
    """Return how far each task is from the best tuned baseline, the widest gap first: a row that fits a console."""
    header = ["log excess less the best tuned", *(f"@{step}" for step in COMPARED), "most to"]

    def widest(result: TaskResult) -> tuple[float, str]:
        steps = [step for step in COMPARED if step in result.compared]
        return max((result.score(step) - result.best(step)[1], result.best(step)[0]) for step in steps)

    rows = [
        [
            result.task.row[:44],
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
    """Return each task's own figure of merit, beside that of the baseline that is best in loss at the last step."""
    header = ["task", "figure", "steps", "this optimizer", "best baseline in loss", "its figure"]
    rows = []
    for result in comparison.results:
        for step in (step for step in (50, 100, 200, 400) if step in result.compared):
            index = result.curves.checkpoints.index(step)
            name, _ = result.best(step)
            cell = result.cells[name]
            theirs = cell.metric[cell.best(step), :, cell.checkpoints.index(step)].mean()
            ours = result.curves.metric[0, :, index].mean()
            first = step == 50
            rows.append(
                [
                    result.task.row if first else "",
                    result.task.metric if first else "",
                    str(step),
                    f"{float(ours):.4g}",
                    name,
                    f"{float(theirs):.4g}",
                ]
            )
    return header, rows


def preamble(comparison: Comparison) -> list[str]:
    """Return how to read the tables, and what was measured where."""
    return [
        "One untuned run a seed, no learning rate, against hand-made optimizers at their best learning rate of a grid "
        "of 15 half-decades, chosen anew at every step count (from the archive). Losses are means over five seeds of "
        "log((f - f*)/(f0 - f*)); lower is better. +, =, - : better than the best baseline, within 0.02 of it, worse.",
        f"Speed-up: how many times more steps (CPU seconds) {PEER} with the best learning rate at each moment needs to "
        "reach the same loss; interquartile mean over all runs with a 95 % stratified bootstrap interval. Where it "
        "never gets there the length of its run counts (>=).",
        f"Largest violation of a constraint {comparison.largest_violation:.0e}; share of finite runs "
        f"{comparison.share_finite:.3f}. {in_words(environment())}.",
        *(f"Note: {note}." for note in comparison.notes),
    ]


SECTIONS = (
    ("Summary", summary),
    ("Nothing tuned", untuned),
    ("The number of steps known", scheduled),
    ("Where most is lost", gaps),
    ("Losses", losses),
    ("Figures of merit", figures),
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
    for title, make in SECTIONS:
        parts += [f"## {title}", _pipes(*make(comparison))]
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
    for name, make in SECTIONS:
        parts += [f"<h2>{name}</h2>", _table(*make(comparison))]
        if name == "Summary":
            parts.append(_image(plot_profile(comparison), "performance profile"))
    parts += ["<h2>Curves</h2>", _image(plot_tasks(comparison), "loss curves of every task")]
    if records := _recorded(comparison):
        parts += [f"<h2>{PREDECESSOR}</h2>", f"<p>{html.escape(_about_the_predecessor(records))}</p>"]
        parts += [_table(*predecessor.table(records)), _image(plot_predecessor(records), "loss curves of both")]
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    return f"<!doctype html><html><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def _table(header: list[str], rows: list[list[str]]) -> str:
    def cell(text: str) -> str:
        if text[-2:] not in MARKS:
            return f"<td>{html.escape(text)}</td>"
        kind = MARKS[text[-2:]]
        score, _, best = html.escape(text).partition(" (")  # the peer goes below, in small
        return f'<td class="{kind}">{score}<br><small>({best}</small></td>'

    top = "".join(f"<th>{html.escape(text)}</th>" for text in header)
    body = "".join(f"<tr>{''.join(cell(text) for text in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{top}</tr>{body}</table></div>'


def _image(png: bytes, what: str) -> str:
    return f'<img alt="{what}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
