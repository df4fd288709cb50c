"""Problems for meta-training: known solutions, expectations, seeds."""

import pytest
import torch
from making import drawn, pick

import subspace_meta as sm
from subspace_meta.tasks.networks import NetworkClassification
from subspace_meta.tasks.planted import (
    PerceptronOf,
    PlantedClassification,
    PlantedKarcherMeans,
    PlantedLeastSquares,
    random_root,
)

COUNT, STEPS = 3, 2
LEAST_SQUARES = {
    "Stiefel": PlantedLeastSquares(6, 2, sm.Stiefel(), 8),
    "Rotations": PlantedLeastSquares(4, 4, sm.Rotations(), 8),
    "Euclidean": PlantedLeastSquares(5, 3, sm.Euclidean(), 8),
    "expected loss": PlantedLeastSquares(6, 2, sm.Stiefel(), 0),
}
FAMILIES = {
    **LEAST_SQUARES,
    "classification": PlantedClassification(6, 3, 8, 40),
    "Karcher means": PlantedKarcherMeans(2, 3, 8, 12),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_tasks_are_drawn_from_the_seed_alone(name):
    family = FAMILIES[name]
    tasks, params, batches = drawn(family, COUNT, STEPS)
    assert hash(family) is not None
    assert family.problem is family.problem
    assert all(value.shape[0] == COUNT for value in tasks.values())
    assert all(value.shape[:2] == (STEPS, COUNT) for value in batches.values())
    for i in range(COUNT):
        family.problem.geometry.check_feasible(pick(params, i))
        assert torch.isfinite(family.problem.loss(pick(params, i), pick(pick(batches, 0), i)))
        assert family.problem.objective(pick(params, i), pick(family.measured(tasks), i)) > tasks["reference"][i]
    again, other = drawn(family, COUNT, STEPS), drawn(family, COUNT, STEPS, 1)
    assert all(torch.equal(a, b) for a, b in zip(tasks.values(), again[0].values(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(batches.values(), other[2].values(), strict=True))


@pytest.mark.parametrize("name", LEAST_SQUARES)
def test_the_planted_solution_is_feasible_and_has_no_excess(name):
    family = LEAST_SQUARES[name]
    tasks, _, _ = drawn(family, COUNT, STEPS)
    for i in range(COUNT):
        solution = {"x": tasks["solution"][i]}
        family.problem.geometry.check_feasible(solution)
        assert family.problem.objective(solution, pick(tasks, i)) == 0.0


@pytest.mark.parametrize("name", LEAST_SQUARES)
def test_the_loss_of_least_squares_is_the_excess_and_the_noise_on_average(name):
    family = LEAST_SQUARES[name]
    tasks, params, _ = drawn(family, COUNT, STEPS)
    batches = family.sample(tasks, torch.Generator().manual_seed(5), 6000 if family.batch_size else 1)
    for i in range(COUNT):
        losses = torch.func.vmap(lambda batch, i=i: family.problem.loss(pick(params, i), batch))(
            {name: value[:, i] for name, value in batches.items()}
        )
        noise = (tasks["noise"][i] * tasks["weights"][i]).square().sum() if family.batch_size else 0.0
        expected = float(family.problem.objective(pick(params, i), pick(tasks, i)) + noise)
        assert float(losses.mean()) == pytest.approx(expected, rel=0.05 if family.batch_size else 1e-4)


def test_covariances_have_unit_trace_and_a_third_keeps_its_axes():
    root = random_root(5, 300, torch.Generator().manual_seed(0))
    assert torch.allclose(root.square().sum(dim=(1, 2)), torch.ones(300), atol=1e-4)
    diagonal = (root - torch.diag_embed(root.diagonal(dim1=1, dim2=2))).abs().amax(dim=(1, 2)) < 1e-6
    assert 0.2 < float(diagonal.float().mean()) < 0.4


def test_scales_of_logits_are_as_said():
    family = PlantedClassification(6, 3, 8, 40, log10_logit_scale=(1.0, 1.0))
    tasks, _, _ = drawn(family, COUNT, STEPS)
    assert tasks["inputs"].square().mean(dim=(1, 2)).sqrt() == pytest.approx(
        torch.full((COUNT,), 10.0).numpy(), rel=1e-4
    )


def test_karcher_means_are_the_minimum():
    """Descent from the identity ends at the reference, not below."""
    family = FAMILIES["Karcher means"]
    tasks, params, _ = drawn(family, COUNT, STEPS)
    for i in range(COUNT):
        optimizer = sm.RSGD(family.problem.geometry, 0.3)
        point, data = pick(params, i), pick(tasks, i)
        state = optimizer.init(point)
        for _ in range(200):
            grads = torch.func.grad(family.problem.objective)(point, data)
            point, state = optimizer.update(grads, state, point)
        value = float(family.problem.objective(point, data))
        assert value == pytest.approx(float(tasks["reference"][i]), rel=2e-2, abs=1e-4)
        assert value >= float(tasks["reference"][i]) * (1 - 1e-3) - 1e-5


def test_perceptrons_of_any_width():
    def load():
        return torch.randn(20, 5, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 3

    family = NetworkClassification(
        "numbers", load, "perceptron", PerceptronOf((5, 4, 3)), (("0.weight", sm.Stiefel()),)
    )
    params = drawn(family, COUNT, STEPS)[1]
    assert {name: value.shape[1:] for name, value in params.items()} == {
        "0.weight": (4, 5),
        "0.bias": (4,),
        "2.weight": (3, 4),
        "2.bias": (3,),
    }
    assert PerceptronOf((5, 4, 3)) == PerceptronOf((5, 4, 3))
