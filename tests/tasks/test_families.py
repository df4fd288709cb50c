"""Task families: shapes, the loss as its formula, attainable reference values, seeds, and the partition of the data."""

import functools

import pytest
import torch
from making import drawn, normal, pick

import subspace_meta as sm
from subspace_meta.tasks import OrthonormalClassification, OrthonormalClassifier, SampledPCA, SyntheticPCA, data
from subspace_meta.tasks.pca import residual_variance

COUNT, STEPS, BATCH = 3, 4, 8


@functools.cache
def samples():
    """A small data set, ``(40, 6)``, centred."""
    x = normal(40, 6, seed=3, dtype=torch.float32) * torch.arange(1.0, 7.0)
    return x - x.mean(dim=0)


@functools.cache
def labelled():
    """Three classes, ``(40, 6)`` and ``(40,)``."""
    labels = torch.arange(40) % 3
    return normal(40, 6, seed=4, dtype=torch.float32) + 2 * torch.nn.functional.one_hot(labels, 6), labels


PCA = {
    "synthetic": SyntheticPCA(6, 2, BATCH),
    "synthetic on Grassmann": SyntheticPCA(6, 2, BATCH, manifold=sm.Grassmann()),
    "sampled": SampledPCA("numbers", samples, 2, BATCH),
    "sampled, rotated": SampledPCA("numbers", samples, 2, BATCH, rotate=True),
}
CLASSIFICATION = {
    "classification": OrthonormalClassification("classes", labelled, 3, BATCH),
    "classification, rotated": OrthonormalClassification("classes", labelled, 3, BATCH, (0.0, 1.0), True, 20),
}
FAMILIES = {**PCA, **CLASSIFICATION}

families = pytest.mark.parametrize("name", FAMILIES)


@families
def test_shapes(name):
    family = FAMILIES[name]
    tasks, params, batches = drawn(family, COUNT, STEPS)
    assert tasks["reference"].shape == (COUNT,)
    assert all(value.shape[0] == COUNT for value in tasks.values())
    assert all(value.shape[:2] == (STEPS, COUNT) for value in batches.values())
    assert batches["z"].shape == (STEPS, COUNT, BATCH, 6)
    assert params["x"].shape == (COUNT, 6, 3 if name in CLASSIFICATION else 2)
    for i in range(COUNT):
        family.problem.geometry.check_feasible(pick(params, i))
    assert "6x" in family.name
    assert hash(family) == hash(FAMILIES[name])
    assert family.problem is family.problem, "one problem, one compilation"


@families
def test_seeds_reproduce(name):
    same, again, other = (drawn(FAMILIES[name], COUNT, STEPS, seed) for seed in (0, 0, 1))
    for a, b, c in zip(same, again, other, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)
        assert any(not torch.equal(a[key], c[key]) for key in a) or not FAMILIES[name].__dict__.get("rotate", True)
    assert not torch.equal(same[2]["z"][0], same[2]["z"][1])
    assert not torch.equal(same[1]["x"][0], same[1]["x"][1])


@pytest.mark.parametrize("name", PCA)
def test_pca_loss_is_the_reconstruction_error(name):
    family = PCA[name]
    tasks, params, batches = drawn(family, COUNT, STEPS)
    for i in range(COUNT):
        x, z = params["x"][i].double(), batches["z"][0, i].double()
        expected = sum((row - x @ (x.T @ row)).square().sum() for row in z) / BATCH
        loss = family.problem.loss({"x": x}, {"z": z})
        assert float(loss) == pytest.approx(float(expected), rel=1e-5)
        c = tasks["covariance"][i].double()
        projector = torch.eye(6, dtype=torch.float64) - x @ x.T
        objective = family.problem.objective({"x": x}, {"covariance": c})
        assert float(objective) == pytest.approx(float((projector @ c @ projector).trace()), rel=1e-5)
        metric = family.problem.metric(pick(params, i), pick(tasks, i))
        excess = (objective - tasks["reference"][i]) / c.trace()
        assert float(metric) == pytest.approx(float(excess), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", PCA)
def test_pca_reference_is_attained_by_the_eigenvectors_and_by_nothing_less(name):
    family = PCA[name]
    tasks, params, _ = drawn(family, COUNT, STEPS)
    for i in range(COUNT):
        scale = float(tasks["covariance"][i].trace())
        vectors = torch.linalg.eigh(tasks["covariance"][i].double())[1][:, -2:]
        best = family.problem.objective({"x": vectors.float()}, pick(tasks, i))
        assert float(best) == pytest.approx(float(tasks["reference"][i]), abs=1e-5 * scale)
        for x in (params["x"][i], vectors.flip(0).float()):
            assert family.problem.objective({"x": x}, pick(tasks, i)) >= tasks["reference"][i] - 1e-6 * scale


@pytest.mark.parametrize("name", PCA)
def test_pca_objective_is_the_mean_of_the_loss(name):
    family = PCA[name]
    tasks, params, _ = drawn(family, COUNT, STEPS)
    batches = family.sample(tasks, torch.Generator().manual_seed(9), 4000)
    for i in range(COUNT):
        z = batches["z"][:, i].reshape(1, -1, 6)[0]
        mean = family.problem.loss(pick(params, i), {"z": z})
        objective = family.problem.objective(pick(params, i), pick(tasks, i))
        assert float(mean) == pytest.approx(float(objective), rel=0.05)


def test_residual_variance():
    covariance = torch.diag(torch.tensor([5.0, 1.0, 2.0, 4.0]))
    assert residual_variance(covariance, 2) == 3.0
    assert residual_variance(covariance.expand(3, 4, 4), 3).tolist() == [1.0] * 3
    assert residual_variance(covariance, 4) == 0.0


def test_synthetic_spectra_are_of_all_kinds_and_scales():
    tasks = SyntheticPCA(12, 3).draw(torch.Generator().manual_seed(0), 200)
    scale = tasks["covariance"].diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    assert scale.log10().min() < -1.7
    assert scale.log10().max() > 1.7
    relative = tasks["reference"] / scale
    assert relative.min() < 0.05
    assert relative.max() > 0.4
    axis_aligned = (tasks["covariance"] - torch.diag_embed(tasks["covariance"].diagonal(dim1=-2, dim2=-1))).abs()
    share = float((axis_aligned.amax(dim=(-2, -1)) < 1e-6 * scale).float().mean())
    assert 0.2 < share < 0.5


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_classification_loss_is_the_mean_cross_entropy(name):
    family = CLASSIFICATION[name]
    tasks, params, batches = drawn(family, COUNT, STEPS)
    for i in range(COUNT):
        x = params["x"][i]
        for function, inputs, one_hot, tree in (
            (
                family.problem.loss,
                batches["z"][1, i],
                batches["one_hot"][1, i],
                {k: v[1, i] for k, v in batches.items()},
            ),
            (family.problem.objective, tasks["inputs"][i], tasks["one_hot"][i], pick(tasks, i)),
        ):
            expected = torch.nn.functional.cross_entropy(inputs @ x, one_hot.argmax(dim=-1))
            assert float(function({"x": x}, tree)) == pytest.approx(float(expected), rel=1e-5)
        predicted = (tasks["test_inputs"][i] @ x).argmax(dim=-1)
        accuracy = float((predicted == tasks["test_labels"][i]).float().mean())
        assert float(family.problem.metric({"x": x}, pick(tasks, i))) == pytest.approx(accuracy)
    assert torch.equal(batches["one_hot"].sum(dim=-1), torch.ones(STEPS, COUNT, BATCH))
    assert (tasks["reference"] == 0).all()


def test_classification_keeps_a_test_set():
    family = CLASSIFICATION["classification"]
    inputs, labels = labelled()
    tasks = family.draw(torch.Generator().manual_seed(0), 1)
    scale = 10**0.5
    torch.testing.assert_close(tasks["test_inputs"][0], scale * inputs[4::5])
    assert torch.equal(tasks["test_labels"][0], labels[4::5])
    kept = torch.arange(40) % 5 != 4
    torch.testing.assert_close(tasks["inputs"][0], scale * inputs[kept])
    torch.testing.assert_close(tasks["one_hot"][0].argmax(dim=-1), labels[kept])
    rows = {tuple(row.tolist()) for row in tasks["inputs"][0]}
    batches = family.sample(tasks, torch.Generator().manual_seed(1), 30)["z"].reshape(-1, 6)
    assert {tuple(row.tolist()) for row in batches} <= rows, "mini-batches come from the training part"


def test_rotated_classification_is_the_same_problem_turned():
    """Labels follow the permutation of the classes and inputs the rotation: the best loss is that of the original."""
    family = CLASSIFICATION["classification, rotated"]
    tasks = family.draw(torch.Generator().manual_seed(0), COUNT)
    inputs, labels = labelled()
    for i in range(COUNT):
        frame, order = tasks["frame"][i], tasks["order"][i]
        scale = frame.norm() / 6**0.5
        assert 1.0 <= float(scale) <= 10.0001
        torch.testing.assert_close(frame.T @ frame, scale**2 * torch.eye(6), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(tasks["test_inputs"][i], inputs[4::5] @ frame)
        assert torch.equal(tasks["test_labels"][i], order[labels[4::5]])
        assert sorted(order.tolist()) == [0, 1, 2]


def test_the_classifier_is_a_module_with_one_weight():
    model = OrthonormalClassifier(6, 3)
    assert [name for name, _ in model.named_parameters()] == ["x"]
    z = normal(2, 6, dtype=torch.float32)
    x = normal(6, 3, dtype=torch.float32)
    assert torch.equal(torch.func.functional_call(model, {"x": x}, (z,)), z @ x)


def test_the_partition_is_disjoint():
    assert not set(data.TRAINING) & set(data.EVALUATION)
    first, second = data.digits_first_half(), data.digits_second_half()
    assert (len(first[0]), len(second[0])) == (898, 899)
    assert {tuple(row.tolist()) for row in first[0]}.isdisjoint({tuple(row.tolist()) for row in second[0]})
    everything = data._digits()[1]
    assert torch.equal(torch.cat([first[1], second[1]]), everything)


@pytest.mark.parametrize(
    ("load", "size"),
    [
        (data.face_patches, 64),
        (data.brick_patches, 64),
        (data.grass_patches, 64),
        (data.gravel_patches, 64),
        (data.mnist, 784),
        (lambda: data.digits_first_half()[0], 64),
        (lambda: data.digits_second_half()[0], 64),
    ],
)
def test_data_sets_are_centred_and_finite(load, size):
    x = load()
    assert x.shape[1] == size
    assert x.dtype == torch.float32
    assert torch.isfinite(x).all()
    assert x.mean(dim=0).abs().max() < 1e-3
    if size == 64:
        assert float(x.square().mean()) == pytest.approx(1.0, rel=0.01)


def test_data_sets_are_loaded_once():
    assert data.mnist() is data.mnist()
    assert data.mnist().shape == (5000, 784)
    assert 1.0 < float(data.mnist().max() - data.mnist().min()) < 2.0, "pixels were in 0..1"
