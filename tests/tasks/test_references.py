"""Reference values: attained by known solutions, certified where the problem allows it, found from elsewhere."""

import functools
import math

import pytest
import torch
from making import normal

import subspace_meta as sm
from subspace_meta.tasks import (
    IncompleteCovariance,
    IndependentComponents,
    JointDiagonalisation,
    KarcherMeans,
    LeadingSubspace,
    LogisticRegression,
    LowRankFactorisation,
    MatrixCompletion,
    MaxCut,
    MetricLearning,
    OrderedEigenvectors,
    Problem,
    RayleighQuotient,
    RobustSubspace,
    SparsePCA,
    SphericalKMeans,
    Synchronisation,
    TraceRatio,
    UnbalancedProcrustes,
    Wahba,
    data,
)
from subspace_meta.tasks.classification import logistic_loss, logistic_problem, split
from subspace_meta.tasks.clustering import STARTS, best_centres
from subspace_meta.tasks.covariances import inverse_root, karcher_means, squared_log_norm
from subspace_meta.tasks.low_rank import RIDGE, completion_loss
from subspace_meta.tasks.references import descend


@functools.cache
def labelled():
    """Three classes in eight dimensions, ``(120, 8)`` and ``(120,)``."""
    labels = torch.arange(120) % 3
    return normal(120, 8, seed=4, dtype=torch.float32) + 2 * torch.nn.functional.one_hot(labels, 8), labels


@functools.cache
def matrices():
    """Two classes of positive definite matrices, ``(30, 3, 3)`` and ``(30,)``."""
    labels = torch.arange(30) % 2
    roots = normal(30, 3, 5, seed=5, dtype=torch.float32) * (1 + labels)[:, None, None]
    return roots @ roots.mT / 5, labels


def eigenvectors(matrix, p):
    return torch.linalg.eigh(matrix)[1][:, -p:].flip(1)


def factors(best):
    u, values, vh = torch.linalg.svd(best)
    return {"u": u[:, :3], "s": values[:3].diag(), "v": vh[:3].mT}


def geometric_mean(one):
    """S^{-1} # D, the solution of A S A = D."""
    root, inverse = sm_root(one["within_moment"]), inverse_root(one["within_moment"])
    return inverse @ sm_root(root @ one["between_moment"] @ root) @ inverse


def sm_root(a):
    values, vectors = torch.linalg.eigh(a)
    return (vectors * values.sqrt()) @ vectors.mT


SOLVED = {
    "leading subspace": (LeadingSubspace(12, 3), lambda one: {"x": eigenvectors(one["covariance"], 3)}),
    "ordered eigenvectors": (OrderedEigenvectors(12, 3), lambda one: {"x": eigenvectors(one["matrix"], 3)}),
    "Rayleigh quotient": (RayleighQuotient(8), lambda one: {"x": one["vectors"]}),
    "joint diagonalisation": (JointDiagonalisation(10, 3), lambda one: {"x": one["directions"]}),
    "Procrustes": (UnbalancedProcrustes(12, 4), lambda one: {"x": one["solution"]}),
    "Wahba": (Wahba(), lambda one: {"x": one["solution"]}),
    "Wahba in five dimensions": (Wahba(5, 50), lambda one: {"x": one["solution"]}),
    "factorisation": (LowRankFactorisation(12, 10, 3), lambda one: factors(one["best"])),
    "Karcher means": (
        KarcherMeans("numbers", matrices, 2, 3),
        lambda one: {"means": torch.linalg.matrix_power(torch.linalg.inv(one["solution_roots"]), 2)},
    ),
    "metric learning": (MetricLearning("numbers", labelled, 4, 300), lambda one: {"a": geometric_mean(one)}),
    "trace ratio": (
        TraceRatio("numbers", labelled, 2),
        lambda one: {"x": eigenvectors(one["reference"] * one["total"] - one["within"], 2)},
    ),
}


def drawn(family, seed=0):
    """One task in float64: data, objective's part of it, reference."""
    tasks = family.draw(torch.Generator().manual_seed(seed), 1)
    exact = {name: value[0].double() if value.is_floating_point() else value[0] for name, value in tasks.items()}
    return exact, family.measured(exact), float(exact["reference"])


def random_start(family, seed):
    tasks = family.draw(torch.Generator().manual_seed(0), 1)
    return {name: value[0].double() for name, value in family.init(tasks, torch.Generator().manual_seed(seed)).items()}


@pytest.mark.parametrize("name", SOLVED)
def test_a_known_solution_attains_the_reference_and_descent_finds_no_less(name):
    family, solve = SOLVED[name]
    exact, measured, reference = drawn(family)
    objective = family.problem.objective
    solution = solve(exact)
    scale = abs(reference) + 1.0
    assert float(objective(solution, measured)) == pytest.approx(reference, abs=1e-6 * scale)
    family.problem.geometry.check_feasible(solution, tolerance=1e-5)
    for seed in range(3):
        end = descend(family.problem, random_start(family, seed), measured, 500)
        assert float(objective(end, measured)) >= reference - 1e-6 * scale


@pytest.mark.parametrize("name", sorted(set(SOLVED) - {"joint diagonalisation", "Procrustes"}))
def test_descent_from_anywhere_attains_the_reference(name):
    """These have no bad local minima, so a formula that is too low would show."""
    family, _ = SOLVED[name]
    _, measured, reference = drawn(family)
    end = descend(family.problem, random_start(family, 7), measured, 2000)
    assert float(family.problem.objective(end, measured)) == pytest.approx(reference, abs=2e-6 * (abs(reference) + 1))


BEST_KNOWN = {
    "robust subspace": RobustSubspace(16, 2, 200),
    "completion": MatrixCompletion(20, 2, 60, 0.5),
    "components": IndependentComponents(6, 3, 1500),
    "sparse PCA": SparsePCA(24, 3),
    "incomplete": IncompleteCovariance(4, 200),
    "synchronisation": Synchronisation(8),
    "max-cut": MaxCut(14, 7, 0.5),
}


@pytest.mark.parametrize("name", BEST_KNOWN)
def test_the_best_of_several_random_starts_attains_the_best_known_value_and_no_less(name):
    family = BEST_KNOWN[name]
    for seed in range(2):
        _, measured, reference = drawn(family, seed)
        values = []
        for start in range(4):
            end = descend(family.problem, random_start(family, start), measured, 2000)
            values.append(float(family.problem.objective(end, measured)))
        assert min(values) == pytest.approx(reference, abs=2e-6 * (abs(reference) + 1))


def test_synchronisation_is_certified():
    """A critical point with a positive semidefinite dual matrix is the global minimum (Rosen et al. 2019)."""
    family = Synchronisation(12)
    exact, measured, _ = drawn(family)
    found = descend(family.problem, {"r": exact["truth"]}, measured, 2000)["r"]
    r, h = found.flatten(0, 1), exact["measurements"]
    blocks = (h @ r).reshape(12, 3, 3) @ found.mT
    torch.testing.assert_close(blocks, blocks.mT, atol=1e-5, rtol=0)  # critical
    dual = torch.block_diag(*(0.5 * (blocks + blocks.mT))) - h
    assert float(torch.linalg.eigvalsh(dual)[0]) > -1e-4


def test_max_cut_is_the_semidefinite_program():
    """The dual: sum of the multipliers, with diag(multipliers) + A positive semidefinite, bounds from below."""
    family = MaxCut(20, 8, 0.4)
    exact, measured, reference = drawn(family)
    graph = exact["graph"]
    x = descend(family.problem, random_start(family, 0), measured, 3000)["x"]
    multipliers = -(x * (x @ graph)).sum(dim=0)
    low = float(torch.linalg.eigvalsh(multipliers.diag() + graph)[0])
    bound = 0.5 - 0.5 * float((multipliers - min(low, 0.0)).sum() / graph.sum())
    assert bound == pytest.approx(reference, abs=1e-5)
    assert bound <= reference + 1e-6
    # and no cut is better than the relaxation
    signs = torch.where(torch.rand(500, 20, generator=torch.Generator().manual_seed(0)) < 0.5, -1.0, 1.0).double()
    uncut = 0.5 + 0.5 * (signs * (signs @ graph)).sum(dim=-1) / graph.sum()
    assert float(uncut.min()) >= reference
    assert 1 - float(uncut.min()) <= 1 - reference


def test_logistic_regression_is_at_its_minimum():
    family = LogisticRegression("numbers", labelled)
    _, measured, reference = drawn(family)
    end = descend(logistic_problem(8), {"w": torch.zeros(8), "b": torch.zeros(())}, measured, 500)
    assert float(logistic_loss(end, measured)) == pytest.approx(reference, rel=1e-6)
    z, labels, _, _ = split(*labelled())
    assert torch.equal(measured["z"], z.double())
    assert torch.equal(measured["sign"], torch.where(labels % 2 == 1, 1.0, -1.0).double())


def test_spherical_k_means_reference_is_found_several_times():
    """Expectation maximisation never rises, and its best value is no lucky one."""
    family = SphericalKMeans("digits", data.digits_second_half, 10)
    exact, measured, reference = drawn(family)
    z, k = exact["z"], 10
    generator = torch.Generator().manual_seed(0)
    starts = torch.stack([z[torch.randperm(len(z), generator=generator)[:k]] for _ in range(STARTS)])
    _, values = best_centres(z, starts, 40)
    assert int((values < reference + 1e-4).sum()) >= 3
    assert float(values.min()) >= reference - 1e-6
    falling = torch.stack([best_centres(z, starts[:4], steps)[1] for steps in (1, 2, 5)])
    assert (falling.diff(dim=0) <= 1e-12).all()
    end = descend(family.problem, random_start(family, 3), measured, 100)
    assert float(family.problem.objective(end, measured)) >= reference - 1e-6


@pytest.mark.usefixtures("data_folder")
def test_kylberg_has_the_published_optimum():
    tasks = KarcherMeans("Kylberg", data.kylberg, 20, 5).draw(torch.Generator(), 1)
    assert float(tasks["reference"][0]) == pytest.approx(0.23488, abs=5e-6)


def test_karcher_mean_of_commuting_matrices_is_the_geometric_one():
    spectra = torch.tensor([[1.0, 4.0], [4.0, 9.0], [2.0, 6.0]], dtype=torch.float64)
    roots = torch.diag_embed(spectra.rsqrt())
    mean = karcher_means(roots, torch.ones(3, 1, dtype=torch.float64))
    torch.testing.assert_close(mean[0].diagonal(), spectra.log().mean(dim=0).exp())


def test_squared_log_norm_has_the_right_gradient_at_equal_eigenvalues():
    a = 2.0 * torch.eye(4, dtype=torch.float64)
    gradient = torch.func.grad(squared_log_norm)(a)
    torch.testing.assert_close(gradient, 2 * math.log(2.0) / 2.0 * torch.eye(4, dtype=torch.float64))
    s = sm.SPD()
    for seed in range(3):
        x, y = (s.random_point((4, 4), torch.Generator().manual_seed(10 * seed + i), torch.float64) for i in range(2))
        root = inverse_root(y)
        assert float(squared_log_norm(root @ x @ root)) == pytest.approx(float(s.distance(y, x)) ** 2)
    assert torch.isnan(squared_log_norm(torch.full((2, 2), math.inf)))


def test_completion_is_the_best_over_coefficients():
    """Against ridge regression, column by column."""
    family = MatrixCompletion(10, 2, 40, 0.6)
    exact, _, _ = drawn(family)
    x = random_start(family, 1)["x"]
    total = 0.0
    for column, mask in zip(exact["columns"], exact["mask"], strict=True):
        rows = mask.bool()
        a = torch.cat([x[rows], RIDGE**0.5 * torch.eye(2, dtype=torch.float64)])
        b = torch.cat([column[rows], torch.zeros(2, dtype=torch.float64)])
        w = torch.linalg.lstsq(a, b[:, None]).solution[:, 0]
        total += float((a @ w - b).square().sum())
    assert float(completion_loss({"x": x}, exact)) == pytest.approx(total / 40)
    turned = x @ torch.linalg.qr(normal(2, 2))[0]
    assert float(completion_loss({"x": turned}, exact)) == pytest.approx(total / 40), "a function of the span"


def test_incomplete_likelihood_is_that_of_the_known_entries():
    family = IncompleteCovariance(4, 30)
    exact, measured, _ = drawn(family)
    covariance = sm.SPD().random_point((4, 4), torch.Generator().manual_seed(3), torch.float64)
    total = 0.0
    for z, mask in zip(exact["z"], exact["mask"].bool(), strict=True):
        if mask.any():
            part = covariance[mask][:, mask]
            total += 0.5 * float(part.logdet() + z[mask] @ torch.linalg.solve(part, z[mask]))
    assert float(family.problem.objective({"covariance": covariance}, measured)) == pytest.approx(total / 30)
    truth = torch.linalg.inv(exact["precision"])
    assert float(family.problem.metric({"covariance": truth}, exact)) == pytest.approx(0.0, abs=1e-5)


def test_synchronisation_loss_is_its_formula():
    family = Synchronisation(5)
    exact, measured, _ = drawn(family)
    r, h = random_start(family, 1)["r"], exact["measurements"]
    terms = []
    for i in range(5):
        for j in range(5):
            block = h[3 * i : 3 * i + 3, 3 * j : 3 * j + 3]
            if block.abs().sum() > 0:
                torch.testing.assert_close(block @ block.T, torch.eye(3, dtype=torch.float64), atol=1e-5, rtol=0)
                terms.append(float((r[i] - block @ r[j]).square().sum()))
    assert len(terms) == int(exact["pairs"])
    assert float(family.problem.objective({"r": r}, measured)) == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_descent_on_a_known_bowl():
    def bowl(params, one):
        return (one["curvature"] * params["x"].square()).sum()

    problem = Problem(sm.Geometry.from_rules({"x": torch.empty(3)}), bowl, bowl)
    one = {"curvature": torch.tensor([1.0, 10.0, 100.0])}
    end = descend(problem, {"x": torch.ones(3)}, one)
    assert float(bowl(end, one)) < 1e-12
    assert end["x"].dtype == torch.float64
    assert torch.equal(descend(problem, {"x": torch.zeros(3)}, one)["x"], torch.zeros(3, dtype=torch.float64))
