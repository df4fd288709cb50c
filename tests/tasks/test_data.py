"""The partition of real data, and the folder of data that are not shipped."""

import inspect

import pytest
import torch

from subspace_meta.presets import quick
from subspace_meta.tasks import data
from subspace_meta.tasks.base import draw_epochs
from subspace_meta.tasks.suite import evaluation_suite

TRAINING = {load for loads in data.TRAINING.values() for load in loads}
EVALUATION = {load for loads in data.EVALUATION.values() for load in loads}
ALL = TRAINING | EVALUATION


@pytest.fixture
def nothing_loaded():
    """Forget what other tests have loaded, so that every load shows."""
    for load in ALL:
        load.cache_clear()


def loaded():
    return {load for load in ALL if load.cache_info().misses}


def touch(family):
    generator = torch.Generator().manual_seed(0)
    tasks = family.draw(generator, 1)
    family.init(tasks, generator)
    family.sample(tasks, generator, 1)
    return family.name, family.problem


def test_the_partition_names_every_data_set_once():
    cached = {
        value
        for name, value in vars(data).items()
        if hasattr(value, "cache_info") and not name.startswith("_") and value.__module__ == data.__name__
    }
    assert cached == ALL
    assert not TRAINING & EVALUATION
    assert not set(data.TRAINING) & set(data.EVALUATION)
    for loads, side in ((TRAINING, "Training"), (EVALUATION, "Evaluation")):
        for load in loads:
            assert f"{side} partition" in inspect.getdoc(load), "the docstring says the side"


@pytest.mark.usefixtures("nothing_loaded")
def test_no_task_of_the_evaluation_loads_training_data():
    from subspace_meta.tasks import clustering, covariances

    clustering._clustering_data.cache_clear()
    covariances._karcher_data.cache_clear()
    for task in evaluation_suite():
        if task.available:
            touch(task.family)
    assert {data.digits_second_half, data.mnist, data.mnist_labelled, data.mnist_covariances} <= loaded()
    assert not loaded() & TRAINING


@pytest.mark.usefixtures("nothing_loaded")
def test_no_training_stream_loads_evaluation_data():
    for stream in quick().train.streams:
        for family in stream.families:
            touch(family)
    assert data.face_patches in loaded()
    assert not loaded() & EVALUATION


def test_the_suite_is_made_without_loading(nothing_loaded):
    evaluation_suite()
    assert not loaded()


@pytest.mark.parametrize("load", [data.yaleb, data.yaleb_test, data.kylberg])
def test_a_missing_folder_is_named(load, monkeypatch, tmp_path):
    load.cache_clear()
    monkeypatch.delenv(data.DATA_VARIABLE, raising=False)
    with pytest.raises(FileNotFoundError, match=f"set the environment variable {data.DATA_VARIABLE}"):
        load()
    monkeypatch.setenv(data.DATA_VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load()
    monkeypatch.setenv(data.DATA_VARIABLE, str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"without \w+\.npz"):
        load()
    needing = [task for task in evaluation_suite() if task.needs_file]
    monkeypatch.setenv(data.DATA_VARIABLE, "")
    assert needing
    assert not any(task.available for task in needing)


@pytest.mark.usefixtures("data_folder")
def test_the_faces():
    for load, count in ((data.yaleb, 1900), (data.yaleb_test, 514)):
        faces, labels = load()
        assert faces.shape == (count, 1024)
        assert faces.dtype == torch.float32
        assert float(faces.min()) >= 0.0
        assert 200.0 < float(faces.max()) <= 255.0, "raw pixels"
        assert sorted(labels.unique().tolist()) == list(range(38))


@pytest.mark.usefixtures("data_folder")
def test_the_texture_covariances():
    matrices, labels = data.kylberg()
    assert matrices.shape == (2560, 5, 5)
    assert sorted(labels.unique().tolist()) == list(range(20))
    assert float(torch.linalg.eigvalsh(matrices.double()).min()) > 0.0


def test_digit_covariances_are_positive_definite():
    matrices, labels = data.mnist_covariances()
    assert matrices.shape == (1000, 5, 5)
    values = torch.linalg.eigvalsh(matrices.double())
    assert float(values.min()) > 0.005
    torch.testing.assert_close(matrices, matrices.mT)
    assert labels.bincount().tolist() == [100] * 10
    images, digits = data.mnist_labelled()
    assert images is data.mnist()
    assert torch.equal(digits[::5], labels)


@pytest.mark.parametrize(("load", "shape", "classes"), [(data.wine, (178, 13), 3), (data.breast_cancer, (569, 30), 2)])
def test_tables_are_standardised(load, shape, classes):
    inputs, labels = load()
    assert inputs.shape == shape
    torch.testing.assert_close(inputs.mean(dim=0), torch.zeros(shape[1]), atol=1e-5, rtol=0)
    torch.testing.assert_close(inputs.std(dim=0), torch.ones(shape[1]), atol=1e-5, rtol=0)
    assert len(labels.unique()) == classes


def test_epochs_use_every_row_once():
    generator = torch.Generator().manual_seed(0)
    indices = draw_epochs(10, (7, 2, 4), generator)  # 28 draws: two epochs and a part
    assert indices.shape == (7, 2, 4)
    for task in range(2):
        drawn = indices[:, task].flatten()
        for epoch in drawn[:10], drawn[10:20]:
            assert sorted(epoch.tolist()) == list(range(10))
        assert len(set(drawn[20:].tolist())) == 8
    assert not torch.equal(indices[:, 0], indices[:, 1])
