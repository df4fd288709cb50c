"""An optimizer against an archive of known content: verdicts, speed-ups, and the report's three forms."""

import dataclasses
import json
import re
from dataclasses import dataclass

import pytest
import torch

import subspace_meta as sm
from subspace_meta.evaluation import archive, predecessor
from subspace_meta.evaluation.comparison import Comparison, compare, doubts
from subspace_meta.evaluation.page import gaps, markdown, page, scheduled, untuned
from subspace_meta.evaluation.protocol import EvaluationTask, run_untuned
from subspace_meta.manifolds import Stiefel
from subspace_meta.optimizers.subspace import PRESETS
from subspace_meta.tasks import SyntheticPCA
from subspace_meta.tasks.suite import SuiteTask

TASKS = tuple(
    SuiteTask(
        f"PCA {d}x2",
        SyntheticPCA(d, 2, batch_size=8, log10_scale=(0.0, 0.0), manifold=Stiefel()),
        ("Stiefel",),
        axis,
        "excess",
        "closed form",
        horizon=60,
    )
    for d, axis in ((8, "unseen size"), (10, "real data"))
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An archive with tuned baselines, one of them scheduled, and one that needs no tuning, on both tasks."""
    folder = tmp_path_factory.mktemp("archive")
    few = [baseline for baseline in archive.KEPT if baseline.name in ("RSGD", "RAdam", "RDoWG", "RAdam cosine")]
    made = list(archive.regenerate(archive.missing(TASKS, few, folder), jobs=1, folder=folder))
    assert len(made) == 8
    assert not archive.missing(TASKS, few, folder)
    return folder


def results(make, folder):
    return [result for _, result in compare("ours", make, TASKS, folder)]


def test_a_tuned_peer_ties_with_itself(folder):
    """RAdam at the rate that is best at step 50 ties there, and its speed-up over itself is about 1."""
    for task in TASKS:
        cell = archive.load(task.row, folder)["RAdam"]
        rate = cell.rates[cell.best(50)]
        (result,) = [r for _, r in compare("ours", lambda g, rate=rate: sm.RAdam(g, rate), [task], folder)]
        assert result.score(50) == pytest.approx(cell.score(50), abs=2e-3)
        if result.best(50)[0] == "RAdam":
            assert result.verdict(50) == "tie"
        speed, _ = result.speed_ups()
        assert 0.5 < float(speed.mean()) < 2.0
        assert 0.3 < result.time_ratio() < 3.0


def test_what_nothing_was_tuned_for_is_a_table_of_its_own(folder):
    """At published defaults, and beside the best of them; the best tuned one is another, RDoWG never."""
    found = Comparison("ours", tuple(results(lambda g: sm.RAdam(g, 1e-3), folder)))
    for result in found.results:
        assert result.untuned(50).keys() == {"RSGD", "RAdam", "RDoWG"}
        assert result.untuned(50)["RAdam"] == pytest.approx(result.score(50), abs=2e-3)
        assert result.cells["RDoWG"].rates == (1.0,)
        assert result.best(50)[0] in ("RSGD", "RAdam")
    assert found.beside_untuned("RAdam", 50) == (2, 2)
    assert found.beside_untuned("RDoWG", 50)[1] == 2
    still = Comparison("ours", tuple(results(lambda g: sm.RSGD(g, 0.0), folder)))
    assert still.beside_untuned("", 50) == (0, 2)
    header, rows = untuned(found)
    assert header[:3] == ["nothing tuned", "rate", "from"]
    assert [row[0] for row in rows] == ["RSGD", "RAdam", "RDoWG", "the best of them on each task"]
    assert rows[1][1] == "0.001"
    assert "the best of them on each task" in markdown(found)
    with pytest.raises(ValueError, match=r"rate 0\.002 was not run"):
        found.results[0].cells["RAdam"].score_at(2e-3, 50)


def test_who_knows_the_number_of_steps_is_a_table_of_its_own(folder):
    found = Comparison("ours", tuple(results(lambda g: sm.RSGD(g, 0.0), folder)))
    for result in found.results:
        assert result.scheduled(50) == {"RAdam cosine": result.cells["RAdam cosine"].score(50)}
        assert result.best(50)[0] in ("RSGD", "RAdam"), "the best tuned one is not told"
        assert result.scheduled(50)["RAdam cosine"] < result.cells["RAdam"].score(50) + 0.3
    assert found.beside_scheduled("RAdam cosine", 50) == found.beside_scheduled("", 50) == (0, 2)
    assert found.beside_scheduled("SPEL cosine", 50) == (0, 0)
    header, rows = scheduled(found)
    assert header[:2] == ["told the steps, peak rate tuned", "@20"]
    assert rows == [
        ["RAdam cosine", "0/2", "0/2"],
        ["the best of them on each task", "0/2", "0/2"],
        ["the best tuned one on each task, not told", "0/2", "0/2"],
    ]
    assert "The number of steps known" in markdown(found)


def test_who_takes_the_number_of_steps_is_told_it(folder):
    found = Comparison("ours", tuple(results(lambda g: sm.SubspaceOptimizer(g, sm.pretrained()), folder)))
    for result in found.results:
        alone = run_untuned(
            EvaluationTask(result.task.row, result.task.family),
            lambda g: sm.SubspaceOptimizer(g, sm.pretrained(), steps=20),
            archive.SEEDS,
            20,
        )
        assert result.told.steps == (0, 5, 10, 20, 50, 60)
        assert result.score_told(20) == pytest.approx(float(alone.at(20).mean()), abs=1e-6)
    described = found.to_json()["tasks"][0]
    assert described["log_excess_told"] == [found.results[0].score_told(step) for step in (20, 50)]
    paper = PRESETS["paper"].init_weights(torch.Generator().manual_seed(0))
    (first, _) = results(lambda g: sm.SubspaceOptimizer(g, paper, "paper"), folder)
    assert first.told is None
    assert first.score_told(20) == first.score(20)


def test_told_the_steps_it_is_counted_anew_beside_those_who_are_not(folder):
    still = results(lambda g: sm.RSGD(g, 0.0), folder)
    learned = results(lambda g: sm.SubspaceOptimizer(g, sm.pretrained()), folder)
    found = Comparison(
        "ours", tuple(dataclasses.replace(s, told=r.curves) for s, r in zip(still, learned, strict=True))
    )
    assert found.no_worse(20) == (0, 2)
    assert found.no_worse(20, told=True) == Comparison("ours", tuple(learned)).no_worse(20) != (0, 2)
    assert found.to_json()["all"]["no_worse_told"]["20"] == list(found.no_worse(20, told=True))
    assert scheduled(found)[1][-1][1] == "{}/{}".format(*found.no_worse(20, told=True))
    alone = tuple(dataclasses.replace(r, cells={name: r.cells[name] for name in ("RSGD", "RAdam")}) for r in still)
    assert scheduled(Comparison("ours", alone))[1] == [["the best tuned one on each task, not told", "0/2", "0/2"]]


def test_only_baselines_that_are_on_every_task_are_counted(folder):
    first, second = results(lambda g: sm.RSGD(g, 0.0), folder)
    assert Comparison("ours", (first, second)).tuned == ("RSGD", "RAdam")
    lacking = dataclasses.replace(second, cells={"RAdam": second.cells["RAdam"]})
    assert Comparison("ours", (first, lacking)).tuned == ("RAdam",)
    assert "against 1 hand-made" in markdown(Comparison("ours", (first, lacking)))


def test_the_widest_gap_comes_first_in_rows_that_fit_a_console(folder):
    found = Comparison("ours", tuple(results(lambda g: sm.RSGD(g, 0.0), folder)))
    header, rows = gaps(found)
    worst = [max(float(cell) for cell in row[1:-1] if cell) for row in rows]
    assert worst == sorted(worst, reverse=True)
    assert rows[0][1].startswith("+")
    assert max(len("  ".join(row)) for row in (header, *rows)) <= 100


def test_no_step_is_worse_and_slow(folder):
    found = Comparison("ours", tuple(results(lambda g: sm.RSGD(g, 0.0), folder)))
    for result in found.results:
        assert result.verdict(20) == "worse"
        assert result.score(50) == pytest.approx(0.0, abs=1e-4)
    assert found.no_worse(20) == (0, 2)
    assert found.speed()[0] < 0.1
    assert found.profile(torch.tensor([0.5])).item() == 0.0


def test_the_report_says_the_same_in_three_forms(folder):
    found = Comparison("ours <b>", tuple(results(lambda g: sm.SubspaceOptimizer(g, sm.pretrained()), folder)))
    described = json.loads(json.dumps(found.to_json()))
    text, html = markdown(found), page(found)
    score = f"{found.results[0].score(20):.2f} ({found.results[0].best(20)[1]:.2f} {found.results[0].best(20)[0]})"
    assert score in text
    assert score.replace(" (", "<br><small>(") in html
    assert described["tasks"][0]["log_excess"][0] == pytest.approx(found.results[0].score(20))
    assert "ours &lt;b&gt;" in html
    assert html.count("data:image/png;base64,") == 2
    assert not re.search(r'(src|href)="http', html)  # needs nothing else
    assert 'name="viewport"' in html
    assert re.search(r'<td class="left">unseen size</td><td>1</td>', html)  # words flush left, numbers right
    verdict = found.results[0].verdict(20)
    assert f"{found.results[0].best(20)[0]}) {verdict}</small>" in html
    assert described["share_finite"] == 1.0
    assert set(described["axes"]) == {"unseen size", "real data"}
    assert "| unseen size | 1 |" in text
    low, high = found.speed()[1:]
    assert low <= found.speed()[0] <= high


def test_what_was_measured_beside_the_predecessor_is_in_the_report(folder, tmp_path, monkeypatch):
    """Only the tasks of the report, and only if they were measured."""
    steps, curve = [0, 10, 20], [0.0, -1.25, -2.5]
    record = dict.fromkeys(("meta_parameters", "outer_steps", "minutes", "cpu_seconds_a_step"), 7)
    record |= {"optimizer": "MatrixLSTM", "training": "after", "steps": steps, "log_excess": curve}
    record |= {"checkpoints": [10, 20], "metric": [0.5, 0.625]}
    file = tmp_path / "predecessor.json"
    records = [{**record, "task": row} for row in (TASKS[0].row, "another task")]
    file.write_text(json.dumps({"environment": {"machine": "a <small> one"}, "records": records}))
    monkeypatch.setattr(predecessor, "FILE", file)
    predecessor.content.cache_clear()
    found = Comparison("ours", tuple(results(lambda g: sm.RSGD(g, 1e-2), folder)))
    text, html = markdown(found), page(found)
    assert f"| {TASKS[0].row} | MatrixLSTM | after | 7 | 7 | 7 | -1.25 | -2.50 | 0.625 |" in text
    assert "another task" not in text
    assert "a &lt;small&gt; one" in html
    assert html.count("data:image/png;base64,") == 3
    predecessor.content.cache_clear()


def test_tasks_without_a_tuned_peer_are_named(folder):
    other = SuiteTask("nowhere", TASKS[0].family, ("Stiefel",), "unseen size", "excess", "closed form")
    ((task, reason),) = compare("ours", lambda g: sm.RSGD(g, 0.1), [other], folder)
    assert task is other
    assert "RAdam is not tuned" in reason


@dataclass(frozen=True)
class Growing:
    """Leaves the manifold, where PCA's loss has no bound."""

    geometry: sm.Geometry

    def init(self, params):
        return ()

    def update(self, grads, state, params, value=None):
        return {name: 1.05 * x for name, x in params.items()}, state


def test_leaving_the_manifold_does_not_win(folder):
    """Such iterates are measured at the nearest points, which do not move here; the violation is told."""
    for result in results(Growing, folder):
        assert result.score(50) == pytest.approx(0.0, abs=1e-3)
        assert result.verdict(50) == "worse"
        assert result.violation > 1.0


def test_what_an_optimizer_raises_stops_one_task(folder):
    def make(geometry):
        if geometry.parameters[0].shape[0] == 8:
            raise ValueError("not on this one")
        return sm.RSGD(geometry, 1e-2)

    (_, first), (_, second) = compare("mine", make, TASKS, folder)
    assert first == "mine: ValueError: not on this one"
    assert second.task is TASKS[1]
    ((_, reason), _) = compare("mine", lambda g: 42, TASKS, folder)
    assert "'int' object has no attribute" in reason


def test_doubts_about_the_archive_are_told(folder):
    """The two tasks have four baselines of thirty, and made by this code."""
    compared = tuple(results(lambda g: sm.RSGD(g, 1e-2), folder))
    found = doubts(compared)
    assert [text.split(":")[0] for text in found] == [task.row for task in TASKS]
    assert all("26 of the baselines are missing" in text for text in found)
    others = [dataclasses.replace(compared[0], task=dataclasses.replace(TASKS[0], row=f"task {i}")) for i in range(4)]
    (one,) = doubts(others)
    assert one.startswith("on 4 tasks up to 30 of the baselines are missing"), (
        "another task, so all its cells are stale"
    )
    shown = Comparison("ours", compared, tuple(found))
    assert f"Note: {found[0]}." in markdown(shown)
    assert shown.to_json()["notes"] == found


def test_a_task_is_as_long_as_the_first_comparison():
    with pytest.raises(ValueError, match="at least 20 steps, got 19"):
        dataclasses.replace(TASKS[0], horizon=19)
