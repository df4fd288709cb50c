"""The numbers of the pages are those of the reports on the shipped weights; one that was changed is seen."""

import json
import re
import shutil
from pathlib import Path

import pytest
from loading import module_at

from subspace_meta.evaluation import archive
from subspace_meta.evaluation.comparison import PEER, Comparison, TaskResult
from subspace_meta.evaluation.protocol import BASELINES, Curves
from subspace_meta.tasks.suite import evaluation_suite

ROOT = Path(__file__).parents[1]
quote = module_at(ROOT / "docs" / "make" / "quote.py")


@pytest.fixture
def copied(tmp_path):
    """The files that the script reads and writes, elsewhere."""
    for name in (*quote.PAGES, quote.KEPT, quote.PICTURE):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def as_optimizer(cell):
    """What a baseline did at the rate that is best after 50 steps, as if it were the optimizer that is judged."""
    rate = cell.best(50)
    curve = cell.curves[cell.checkpoints.index(50)]
    numbers_of_rate = {"metric": cell.metric[rate][None], "violation": cell.violation[rate].reshape(1, 1)}
    return Curves(
        cell.steps,
        curve.reshape(1, 1, -1),
        **numbers_of_rate,
        rates=(0.0,),
        initial=cell.initial,
        reference=cell.reference,
        seconds=0.0,
    )


@pytest.fixture(scope="module")
def report():
    """A report as ``subspace-meta evaluate`` writes it, on tuned RAdam under the name of the shipped weights."""
    results = []
    for task in evaluation_suite():
        cells = archive.load(task.row)
        if not task.available:  # without its data nobody can say which of the missing baselines are defined on it
            cells = {**{baseline.name: cells[PEER] for baseline in BASELINES}, **cells}
        ours = as_optimizer(cells[PEER])
        results.append(TaskResult(task, ours, cells, (2.0, 1.0), ours))
    return json.loads(json.dumps(Comparison(quote.BASE, tuple(results)).to_json()))


def test_the_pages_say_what_the_reports_say(capsys):
    assert quote.main(ROOT, ["--check"]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("page", quote.PAGES)
def test_a_number_that_was_changed_is_seen_and_mended(copied, page, capsys):
    path = copied / page
    right = path.read_text("utf-8")
    first = quote.MARKED.search(right)
    digit = re.compile(r"\d").search(right, first.start(2)).start()
    path.write_text(f"{right[:digit]}{(int(right[digit]) + 1) % 10}{right[digit + 1 :]}", "utf-8")
    assert quote.main(copied, ["--check"]) == 1
    assert f"--- {page}\n" in capsys.readouterr().out
    assert quote.main(copied, []) == 0
    assert path.read_text("utf-8") == right


def test_a_picture_of_other_weights_is_seen(copied, capsys):
    path = copied / quote.PICTURE
    path.write_text(path.read_text("utf-8").replace(">base-", ">other-"), "utf-8")
    assert quote.main(copied, ["--check"]) == 1
    assert "python docs/figures.py" in capsys.readouterr().out


def test_a_report_is_taken_over(copied, report, tmp_path, capsys):
    """Every count and speed-up of the README's table is the report's, and the check then passes."""
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert quote.main(copied, [str(tmp_path / "report.json")]) == 0
    assert quote.main(copied, ["--check"]) == 0
    table = (copied / "README.md").read_text("utf-8").partition("<!-- numbers: summary-short -->")[2].split("\n")
    everything = next(line for line in table if line.startswith("| all |")).split(" | ")
    assert everything[1:3] == [
        "35",
        " / ".join(str(report["all"]["no_worse"][str(s)][0]) for s in (20, 50, 100, 200, 400)),
    ]
    assert everything[3].startswith(f"{report['all']['speed_up_steps'][0]:.2f} [")
    assert float(everything[4].split()[0]) == pytest.approx(report["all"]["speed_up_steps"][0] / 2, abs=0.011)
    assert f"best of {len(report['tuned'])} after" in table[2]


def test_what_is_furthest_behind_is_named(report):
    named = quote.condensed(report)["behind"]
    lost = {
        task["task"]: max(
            ours - best["log_excess"] for ours, best in list(zip(task["log_excess"], task["best"], strict=True))[:5]
        )
        for task in report["tasks"]
    }
    assert [one["task"] for one in named] == sorted(lost, key=lambda row: -lost[row])[: len(named)]
    for one in named:
        assert one["ours"] - one["best"] == pytest.approx(lost[one["task"]], abs=2e-2)


def test_reports_that_the_pages_cannot_be_of(report):
    kept = json.loads((ROOT / quote.KEPT).read_text("utf-8"))
    with pytest.raises(ValueError, match="a report is of mine"):
        quote.taken_over(kept, [{**report, "optimizer": "mine"}])
    with pytest.raises(ValueError, match="lacks 1 of 35 tasks"):
        quote.taken_over(kept, [{**report, "tasks": report["tasks"][1:]}])
    with pytest.raises(ValueError, match=f"nothing on {quote.BASE}"):
        quote.pieces({name: line for name, line in kept.items() if name != quote.BASE})
    assert quote.taken_over({**kept, "base-0": {}}, []).keys() == set(quote.REPORTS)


def test_nothing_is_measured_where_data_are_missing(copied, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("SUBSPACE_META_DATA", raising=False)
    monkeypatch.setattr(quote.subprocess, "run", lambda *_, **__: pytest.fail("it was measured"))
    with pytest.raises(SystemExit):
        quote.main(copied, ["--measure", str(tmp_path / "reports")])
    assert "YaleB" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("of <!-- numbers: tasks -->35", "not closed"),
        ("of <!-- numbers: tasks -->35<!-- /numbers --> <!-- /numbers -->", "closed twice"),
        ("of <!-- numbers: task -->35<!-- /numbers -->", "nothing is called task"),
        ("on\n<!-- numbers: tasks -->35<!-- /numbers --> tasks", "begins a line"),
        ("* <!-- numbers: tasks -->35<!-- /numbers --> tasks", "begins a line"),
    ],
)
def test_wrong_marks_are_seen(text, wrong):
    with pytest.raises(ValueError, match=wrong):
        quote.written(text, {"tasks": "35"})


def test_marks_of_numbers_and_of_tables():
    found = {"n": "35", "table": "| a |\n|---|"}
    assert quote.written("a <!-- numbers: n -->34<!-- /numbers --> b", found).count("35") == 1
    table = quote.written("x\n\n<!-- numbers: table --><!-- /numbers -->\n", found)
    assert table == "x\n\n<!-- numbers: table -->\n\n| a |\n|---|\n\n<!-- /numbers -->\n"
    assert quote.written(table, found) == table


def of_their_own(text):
    """The lines that have a number outside of marks, code and the targets of links."""
    for hidden in (quote.MARKED, r"```.*?```", r"`[^`\n]*`", r"\]\([^)]*\)"):
        text = re.sub(hidden, "", text, flags=0 if isinstance(hidden, re.Pattern) else re.DOTALL)
    return [line for line in text.splitlines() if re.search(r"\d", line)]


def test_the_readme_has_no_number_of_its_own():
    lines = of_their_own((ROOT / "README.md").read_text("utf-8"))
    assert [line for line in lines if "Python 3.10 or newer" not in line] == []


def test_the_results_of_the_model_card_have_no_number_of_their_own():
    text = (ROOT / "subspace_meta" / "weights" / "MODEL_CARD.md").read_text("utf-8")
    results = text.partition("\n## Results\n")[2].partition("\n### Earlier weights")[0]
    assert results
    assert of_their_own(results) == [
        "no worse after  steps, speed-up over tuned RAdam (interquartile mean, 95 % interval):"
    ]
