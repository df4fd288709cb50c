"""One battery over all tasks of both suites: finite, differentiable, reproducible, unbiased, batched, bounded."""

import functools
import math
from typing import get_args

import pytest
import torch
from making import pick

import subspace_meta as sm
from subspace_meta.tasks.held_out import held_out_suite
from subspace_meta.tasks.references import descend
from subspace_meta.tasks.suite import Axis, evaluation_suite

DEVELOPMENT = {task.row: task for task in evaluation_suite()}
TEST = {task.row: task for task in held_out_suite()}
SUITE = {**DEVELOPMENT, **TEST}
every_task = pytest.mark.parametrize("row", SUITE)

COUNT, STEPS = 2, 3


@pytest.fixture(autouse=True)
def _data_are_there(request):
    """Skip a task whose data are not there."""
    row = getattr(request.node, "callspec", None) and request.node.callspec.params.get("row")
    if row and SUITE[row].needs_file:
        request.getfixturevalue("data_folder")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@functools.cache
def drawn(row):
    """Two tasks, two starts and batches for three steps."""
    family = SUITE[row].family
    tasks = family.draw(generator(), COUNT)
    return tasks, family.init(tasks, generator(1)), family.sample(tasks, generator(2), STEPS)


def double(tree):
    return {name: value.double() if value.is_floating_point() else value for name, value in tree.items()}


def test_the_suite_is_large_and_wide():
    assert len(DEVELOPMENT) == len(evaluation_suite()) >= 26, "rows have different names"
    assert len({name for task in DEVELOPMENT.values() for name in task.manifolds}) >= 8
    assert {task.axis for task in DEVELOPMENT.values()} == set(get_args(Axis))
    assert [task.row for task in DEVELOPMENT.values() if task.needs_file] == [
        "orthonormal classification of YaleB 1024x38",
        "Karcher means of Kylberg 20x5x5",
    ]


@every_task
def test_the_row_says_what_the_family_is(row):
    task = SUITE[row]
    assert task.manifolds == tuple(sorted({p.manifold.name for p in task.family.problem.geometry.parameters}))
    parameters = task.family.problem.geometry.parameters
    # Blocks of a product have sizes of their own.
    sizes = {str(size) for p in parameters for size in (*p.shape, *getattr(p.manifold, "sizes", ()))}
    named = [word for word in row.replace(",", " ").replace("S(", "").replace(")", "").split() if "x" in word]
    for word in named:
        if word.replace("x", "").isdigit():
            assert set(word.split("x")) <= sizes, f"{word} in {row}"
    assert task.metric
    assert len(task.family.name) > 5
    assert task.available


@every_task
def test_equal_families_share_one_problem(row):
    family = SUITE[row].family
    again = next(task.family for task in (*evaluation_suite(), *held_out_suite()) if task.row == row)
    assert again == family
    assert hash(again) == hash(family)
    assert again.problem is family.problem, "one problem, one compilation"
    assert hash(family.problem) == hash(again.problem)


@every_task
def test_shapes_and_finite_values_at_the_start(row):
    problem = SUITE[row].family.problem
    tasks, params, batches = drawn(row)
    measured = SUITE[row].family.measured(tasks)
    assert tasks["reference"].shape == (COUNT,)
    assert all(len(value) == COUNT for value in tasks.values())
    assert all(value.shape[:2] == (STEPS, COUNT) for value in batches.values())
    for i in range(COUNT):
        one, start = pick(measured, i), pick(params, i)
        problem.geometry.check_points(start)
        problem.geometry.check_feasible(start, tolerance=1e-5)
        for value in (problem.loss(start, pick(batches, 0, i)), problem.objective(start, one)):
            assert value.shape == ()
            assert value.dtype == torch.float32
            assert math.isfinite(value)
        assert problem.metric(start, one).shape == ()
        assert math.isfinite(problem.metric(start, one))
        assert problem.objective(start, one) > tasks["reference"][i], "there is something to do"


@every_task
def test_gradients_agree_with_differences(row):
    """Along a random tangent, central differences in float64, of the loss and of the objective."""
    problem = SUITE[row].family.problem
    tasks, params, batches = drawn(row)
    start = double(pick(params, 0))
    # A few steps off the start: the means' identity would be a special place, zero biases too.
    points = [
        group.manifold.retract(x, 0.1 * group.manifold.random_tangent(x, generator(5)))
        for group, x in zip(problem.geometry.groups, problem.geometry.gather(start), strict=True)
    ]
    tangents = [
        group.manifold.random_tangent(x, generator(6)) for group, x in zip(problem.geometry.groups, points, strict=True)
    ]
    point, along = problem.geometry.scatter(points), problem.geometry.scatter(tangents)
    h = 1e-6
    for function, inputs in (
        (problem.loss, double(pick(batches, 0, 0))),
        (problem.objective, double(pick(SUITE[row].family.measured(tasks), 0))),
    ):
        grads = torch.func.grad(function)(point, inputs)
        slope = sum((grads[name] * along[name]).sum() for name in grads)
        ahead, behind = (
            function({name: point[name] + sign * h * along[name] for name in point}, inputs) for sign in (1, -1)
        )
        size = max(float(g.norm() * along[name].norm()) for name, g in grads.items())
        assert size > 0
        assert float(slope) == pytest.approx(float((ahead - behind) / (2 * h)), abs=1e-6 * size + 1e-9)


@every_task
def test_seeds_reproduce(row):
    family = SUITE[row].family
    tasks, params, batches = drawn(row)
    again = family.draw(generator(), COUNT)
    for name, value in tasks.items():
        torch.testing.assert_close(again[name], value, rtol=0, atol=0)
    for name, value in family.init(tasks, generator(1)).items():
        assert torch.equal(value, params[name])
    same, other = family.sample(tasks, generator(2), STEPS), family.sample(tasks, generator(3), STEPS)
    assert all(torch.equal(same[name], batches[name]) for name in batches)
    noisy = any(not torch.equal(batches[name][0], batches[name][1]) for name in batches)
    assert noisy == any(not torch.equal(other[name], batches[name]) for name in batches)


@every_task
def test_the_loss_is_the_objective_on_average(row):
    """Within five standard errors of the mean over batches; exactly where batches do not differ."""
    family, problem = SUITE[row].family, SUITE[row].family.problem
    tasks, params, _ = drawn(row)
    start, n = pick(params, 0), 60
    one = {name: value[:1] for name, value in tasks.items()}
    sampled = family.sample(one, generator(4), n)
    losses = torch.stack([problem.loss(start, pick(sampled, t, 0)) for t in range(n)]).double()
    measured = family.measured(one)
    if "adding" in row or "recall" in row:  # its objective is a sample itself
        measured = family.measured(family.sample({"reference": torch.zeros(1)}, generator(9), 200))
        measured = {name: value.flatten(0, 2)[None] for name, value in measured.items()}
    objective = float(problem.objective(start, pick(measured, 0)))
    error = float(losses.std()) / n**0.5
    assert float(losses.mean()) == pytest.approx(objective, rel=2e-5, abs=5 * error)
    size = max(abs(objective), objective - float(tasks["reference"][0]))
    assert error < 0.1 * size + 1e-9, "the test sees a bias of some size"


@every_task
def test_vmap_is_a_loop(row):
    problem = SUITE[row].family.problem
    tasks, params, batches = drawn(row)
    first, measured = {name: value[0] for name, value in batches.items()}, SUITE[row].family.measured(tasks)
    grads, losses = torch.func.vmap(torch.func.grad_and_value(problem.loss))(params, first)
    objectives = torch.func.vmap(problem.objective)(params, measured)
    metrics = torch.func.vmap(problem.metric)(params, measured)
    for i in range(COUNT):
        expected, loss = torch.func.grad_and_value(problem.loss)(pick(params, i), pick(first, i))
        torch.testing.assert_close(losses[i], loss, rtol=1e-5, atol=1e-6)
        for name, grad in expected.items():
            torch.testing.assert_close(grads[name][i], grad, rtol=1e-3, atol=1e-5 * float(grad.abs().max()) + 1e-9)
        one = pick(measured, i)
        torch.testing.assert_close(objectives[i], problem.objective(pick(params, i), one), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(metrics[i], problem.metric(pick(params, i), one), rtol=1e-4, atol=1e-6)


@every_task
def test_a_diverged_run_spoils_no_other(row):
    """LAPACK raises at what is not finite; under vmap that would end the runs beside it."""
    problem = SUITE[row].family.problem
    tasks, params, batches = drawn(row)
    first, measured = {name: value[0] for name, value in batches.items()}, SUITE[row].family.measured(tasks)
    bad = {name: value.clone() for name, value in params.items()}
    for value in bad.values():
        value[1] = math.nan
    grads, losses = torch.func.vmap(torch.func.grad_and_value(problem.loss))(bad, first)
    objectives = torch.func.vmap(problem.objective)(bad, measured)
    assert torch.isfinite(torch.func.vmap(problem.metric)(bad, measured)[0])
    for values in (losses, objectives):
        assert torch.isfinite(values).tolist() == [True, False]
    assert all(torch.isfinite(grad[0]).all() for grad in grads.values())


@every_task
def test_the_reference_is_a_lower_bound(row):
    """Of a run of RAdam on mini-batches, and of descent on the objective in float64."""
    family, problem = SUITE[row].family, SUITE[row].family.problem
    tasks, params, _ = drawn(row)
    one = {name: value[:1] for name, value in tasks.items()}
    measured, reference = pick(family.measured(one), 0), float(one["reference"][0])
    x = pick(params, 0)
    before = float(problem.objective(x, measured))
    slack = 1e-6 * (abs(before) + abs(reference))
    optimizer = sm.RAdam(problem.geometry, 3e-2)
    state = optimizer.init(x)
    batches = family.sample(one, generator(7), 40)
    for t in range(40):
        grads, value = torch.func.grad_and_value(problem.loss)(x, pick(batches, t, 0))
        x, state = optimizer.update(grads, state, x, value)
        if t % 10 == 9:
            assert float(problem.objective(x, measured)) >= reference - slack
    exact = double(measured)
    best = descend(problem, x, exact, steps=15)
    after = float(problem.objective(best, exact))
    assert reference - slack <= after < before
    problem.geometry.check_feasible(best)


@pytest.mark.parametrize("row", [row for row, task in SUITE.items() if "Euclidean" in task.manifolds])
def test_networks_start_with_zero_biases(row):
    _, params, _ = drawn(row)
    for name, value in params.items():
        assert bool((value == 0).all()) == name.endswith("bias"), name
