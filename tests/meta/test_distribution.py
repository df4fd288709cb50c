"""What the shipped weights are trained on shares nothing with what they are judged on."""

from subspace_meta.meta.distribution import training_streams
from subspace_meta.presets import RUN_PRESETS
from subspace_meta.tasks import data, evaluation_suite


def test_no_problem_of_the_evaluation_is_trained_on():
    trained = {family.name for stream in training_streams() for family in stream.families}
    suite = [task for task in evaluation_suite() if task.available]  # without its data a family cannot say its name
    judged = {task.family.name for task in (*suite, *RUN_PRESETS["release"]().evaluation)}
    both = trained & judged
    assert both <= {"synthetic PCA 64x8"}, both  # drawn at random, on other seeds


def test_only_training_data_is_loaded(monkeypatch):
    def refuse(*_):
        raise AssertionError("data of the evaluation")

    for name in ("mnist", "mnist_covariances", "digits_second_half", "yaleb", "kylberg"):
        assert hasattr(data, name), name
        monkeypatch.setattr(data, name, refuse)
    for stream in training_streams():
        assert stream.families


def test_the_release_is_drawn_alike_each_time():
    names = [[family.name for stream in training_streams() for family in stream.families] for _ in range(2)]
    assert names[0] == names[1]
    shapes = [g.shape for s in training_streams() for f in s.families for g in f.problem.geometry.groups]
    assert max(max(shape[-2:]) for shape in shapes) <= 128  # larger ones are left to the evaluation
