"""The archive: what is stored is what was measured, nothing is made twice, damage is told."""

import dataclasses
import gzip
import json

import pytest
import torch

import subspace_meta as sm
from subspace_meta.evaluation import archive, protocol
from subspace_meta.evaluation.archive import (
    cell_of,
    code_hash,
    load,
    make_cell,
    missing,
    path_of,
    save,
    smoothed_minimum,
)
from subspace_meta.evaluation.protocol import BASELINES, EvaluationTask, tune
from subspace_meta.manifolds import Stiefel
from subspace_meta.tasks import SyntheticPCA, held_out_suite
from subspace_meta.tasks.suite import SuiteTask, evaluation_suite

FAMILY = SyntheticPCA(8, 2, batch_size=8, log10_scale=(0.0, 0.0), manifold=Stiefel())
TASK = SuiteTask("tiny PCA 8x2", FAMILY, ("Stiefel",), "unseen size", "excess", "closed form", horizon=20)
RADAM = next(baseline for baseline in BASELINES if baseline.name == "RAdam")


def test_a_cell_keeps_what_was_measured(tmp_path):
    curves = tune(EvaluationTask(TASK.row, FAMILY), RADAM, archive.SEEDS, TASK.horizon)
    cell = cell_of(curves, "code")
    save(TASK.row, {"RAdam": cell}, tmp_path)
    read = load(TASK.row, tmp_path)["RAdam"]
    assert read.checkpoints == curves.checkpoints == (5, 10, 20)
    for step in read.checkpoints:
        best = curves.best(step)
        assert read.best(step) == best
        assert read.score(step) == pytest.approx(float(curves.at(step)[best].mean()), abs=1e-4)
        torch.testing.assert_close(read.objective(step), curves.objective(step)[best], rtol=1e-3, atol=1e-6)
    assert read.rates == pytest.approx(curves.rates, rel=1e-5)
    assert torch.equal(read.log_excess.isinf(), cell.log_excess.isinf())
    # The envelope never rises, and is no better than what some rate has reached so far or at the next measured step.
    lowest = curves.log_excess.mean(dim=1).amin(dim=0).cummin(dim=0).values
    assert (read.envelope.diff() <= 0).all()
    assert (read.envelope[:-1] >= lowest[1:] - 1e-3).all()
    assert (read.envelope[-1] - lowest[-1]).abs() < 1.0
    assert read.envelope[0] == 0.0


def test_smoothing_takes_three_steps_and_the_running_minimum():
    curve = torch.tensor([0.0, -3.0, 0.0, -3.0, -6.0])
    assert smoothed_minimum(curve).tolist() == [0.0, -1.0, -2.0, -3.0, -5.0]


def test_nothing_is_made_twice_and_other_code_is_stale(tmp_path, monkeypatch):
    few = [baseline for baseline in BASELINES if baseline.name in ("RSGD", "RAdam")]
    assert [baseline.name for _, baseline in missing([TASK], few, tmp_path)] == ["RSGD", "RAdam"]
    save(TASK.row, {"RAdam": make_cell(TASK, RADAM)}, tmp_path)
    assert [baseline.name for _, baseline in missing([TASK], few, tmp_path)] == ["RSGD"]
    monkeypatch.setattr(protocol, "GRID", protocol.GRID[1:])
    assert [baseline.name for _, baseline in missing([TASK], few, tmp_path)] == ["RSGD", "RAdam"]
    longer = dataclasses.replace(TASK, horizon=30)
    assert code_hash(longer, RADAM) != code_hash(TASK, RADAM)


def test_a_cell_depends_on_the_manifolds_of_its_task_and_on_no_others():
    def names(**rules):
        start = {name: rule.random_point((6, 2)) for name, rule in rules.items()}
        modules = archive._manifold_modules(sm.Geometry.from_rules(start, rules))
        return {module.__name__.rpartition(".")[2] for module in modules}

    orthonormal = names(x=sm.Stiefel())
    assert {"stiefel", "retractions", "base"} <= orthonormal
    assert orthonormal.isdisjoint({"sphere", "oblique", "spd"})
    assert {"oblique", "sphere", "base"} <= names(x=sm.Oblique())
    assert "sphere" in names(x=sm.Product((sm.Stiefel(), sm.Sphere()), sizes=(4, 2)))


def test_a_stale_cell_is_kept_if_its_numbers_hold(tmp_path):
    cell = make_cell(TASK, RADAM)
    stale = dataclasses.replace(cell, code="other")
    assert archive.confirm(TASK, RADAM, stale) == dataclasses.replace(stale, code=cell.code)
    # A value that decides is another, a bad rate has become the best, the horizon is another; a hopeless rate may vary.
    best = stale.best(20)
    for index, change, kept in ((best, 0.02, False), (best, 0.002, True), (-1, -9.0, False), (-1, 0.5, True)):
        log_excess = stale.log_excess.clone()
        log_excess[index, :, stale.checkpoints.index(20)] += change
        confirmed = archive.confirm(TASK, RADAM, dataclasses.replace(stale, log_excess=log_excess))
        assert (confirmed is not None) == kept, (index, change)
    assert archive.confirm(dataclasses.replace(TASK, horizon=30), RADAM, stale) is None
    save(TASK.row, {"RAdam": stale}, tmp_path)
    ((_, _, made, confirmed),) = archive.regenerate([(TASK, RADAM)], folder=tmp_path)
    assert confirmed
    assert made.code == cell.code
    assert missing([TASK], [RADAM], tmp_path) == []
    ((_, _, made, confirmed),) = archive.regenerate([(TASK, RADAM)], folder=tmp_path, confirming=False)
    assert not confirmed


def test_the_hash_looks_at_meaning_only():
    plain = "def f(x):\n    return x + 1\n"
    commented = 'def f(x):\n    """Say."""\n    # why\n    return (x\n            + 1)\n'
    assert archive._meaning(plain) == archive._meaning(commented)
    assert archive._meaning(plain) != archive._meaning(plain.replace("1", "2"))
    made = "x = torch.zeros(2)\n"
    assert archive._meaning(made) == archive._meaning("x = torch.zeros(2, device=like.device)\n")
    assert archive._meaning(made) != archive._meaning("x = torch.zeros(2, dtype=like.dtype)\n")


CHECKED = """
from a import b{imports}
class M:
    def f(self, x, names=()):
        {first}
        try:
            y = b(x)
        except KeyError as error:
            raise {error}
        return y
"""


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"first": "check_named(x)"}, True),
        ({"first": "self.check_shape(x)"}, True),
        ({"first": "if x is None:\n            raise ValueError('x')"}, True),
        ({"first": "def _check(x):\n            if x: return\n            raise ValueError"}, True),
        ({"error": "ValueError(f'{x}') from error"}, True),
        ({"imports": ", check_rate"}, True),
        ({"first": "x = check_named(x)"}, False),
        ({"first": "checked(x)"}, False),
        ({"first": "x.add_(1)"}, False),
        ({"first": "if x is None:\n            x = 0\n            raise ValueError('x')"}, False),
        ({"first": "if x is None:\n            raise ValueError('x')\n        else:\n            x = 0"}, False),
        ({"first": "def _check(x):\n            return x"}, False),
        ({"imports": ", c"}, False),
    ],
)
def test_the_hash_does_not_look_at_errors(change, same):
    plain = {"imports": "", "first": "pass", "error": "ValueError"}
    before, after = (
        archive._meaning(CHECKED.format(**fields).replace("        pass\n", "")) for fields in (plain, plain | change)
    )
    assert (after == before) == same


def test_the_hash_does_not_look_at_what_is_done_where_a_decomposition_fails():
    plain = "def f(x):\n    y = svd(x)\n    return y\n"
    mended = "def f(x):\n    try:\n        y = svd(x)\n    except {}:\n        y = svd(x.double())\n    return y\n"
    assert archive._meaning(plain) == archive._meaning(mended.format("torch.linalg.LinAlgError"))
    assert archive._meaning(plain) != archive._meaning(mended.format("ValueError"))


def test_methods_are_tuned_where_they_are_defined_only():
    rows = {task.row: task for task in evaluation_suite()}
    defined = {
        row: {b.name for b in BASELINES if b.defined_on(rows[row].family.problem.geometry)}
        for row in ("joint diagonalisation 32x8", "Rayleigh quotient 200", "orthogonal perceptron on digits")
    }
    special = {"landing", "POGO", "POGO, Muon", "RSDM", "SPEL", "manifold Muon"}
    assert special <= defined["joint diagonalisation 32x8"]
    assert not special & defined["Rayleigh quotient 200"]
    assert not special & defined["orthogonal perceptron on digits"]
    assert "intrinsic Muon" in {
        b.name for b in BASELINES if b.defined_on(rows["Wahba's problem SO(3)"].family.problem.geometry)
    }
    assert len(defined["joint diagonalisation 32x8"]) == len(BASELINES) == 21


def test_infeasible_methods_are_measured_at_the_nearest_point():
    """Off the manifold the objective of PCA falls without bound; the nearest point cannot be below the reference."""
    landing = next(baseline for baseline in BASELINES if baseline.name == "landing")
    curves = tune(EvaluationTask(TASK.row, FAMILY), landing, 2, 20)
    assert not landing.feasible
    finite = curves.log_excess.isfinite()
    assert finite.any()
    assert (curves.log_excess[finite] <= 5.0).all()
    assert (curves.objective(20)[curves.at(20).isfinite()] >= curves.reference * (1 - 1e-5)).all()
    assert curves.violation[curves.best(20)].max() > 1e-6  # of the iterate itself


@pytest.mark.parametrize("damage", ["truncated", "foreign", "other json"])
def test_a_damaged_file_is_told(tmp_path, damage):
    path = path_of(TASK.row, tmp_path)
    content = gzip.compress(json.dumps({"task": TASK.row, "cells": {"RAdam": {}}}).encode())
    path.write_bytes({"truncated": content[:-9], "foreign": b"not a gzip file", "other json": content}[damage])
    with pytest.raises(ValueError, match=r"tiny-pca-8x2.json.gz: not a file of the archive, or damaged"):
        load(TASK.row, tmp_path)


def test_the_archive_that_ships_is_small_and_whole():
    files = sorted(archive.FOLDER.glob("*.json.gz"))
    assert sum(path.stat().st_size for path in files) < 5e6
    rows = {path_of(task.row): task for task in (*evaluation_suite(), *held_out_suite())}
    assert files
    for path in files:
        task = rows[path]  # no file without a task
        for cell in load(task.row).values():
            assert cell.steps[-1] == task.horizon
            assert cell.log_excess.shape == (len(cell.rates), archive.SEEDS, len(cell.checkpoints))
            assert cell.metric.shape == cell.log_excess.shape


@pytest.mark.parametrize("row", ["Wahba's problem SO(3)", "unbalanced Procrustes 40x10"])
def test_the_archive_is_what_the_code_gives(row):
    """One cell made anew: the same best losses, but for rounding that differs between processors."""
    task = next(task for task in evaluation_suite() if task.row == row)
    stored = load(row)["RSGD"]
    assert stored.code == code_hash(task, next(b for b in BASELINES if b.name == "RSGD"))
    made = make_cell(task, next(b for b in BASELINES if b.name == "RSGD"))
    assert made.rates == pytest.approx(stored.rates, rel=1e-4)
    for step in (5, 10, 20):
        assert made.score(step) == pytest.approx(stored.score(step), abs=0.05)
