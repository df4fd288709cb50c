"""A task and an optimizer of your own, against tuned baselines.

subspace-meta archive  --own examples.own_task:TASKS --archive my_archive       # tunes the baselines, a minute
subspace-meta evaluate --own examples.own_task:TASKS --archive my_archive       # the shipped learned optimizer
subspace-meta evaluate --own examples.own_task:TASKS --archive my_archive --optimizer examples.own_task:my_optimizer
"""

from dataclasses import dataclass

import torch

import subspace_meta as sm
from subspace_meta.tasks import Problem, TaskFamily
from subspace_meta.tasks.suite import SuiteTask


def loss(params, batch):  # the direction that explains most of the batch; the leading eigenvalue of the covariance is 1
    return 1.0 - (batch["z"] @ params["x"]).square().sum() / len(batch["z"])


def objective(params, data):
    return 1.0 - (data["spectrum"][:, None] * params["x"].square()).sum()


@dataclass(frozen=True)
class LeadingDirection(TaskFamily):
    name = "leading direction"
    problem = Problem(sm.Geometry.from_rules({"x": torch.empty(30, 1)}, {"x": sm.Sphere()}), loss, objective)

    def draw(self, generator, count):
        return {"spectrum": torch.arange(1, 31).pow(-1.0).expand(count, -1), "reference": torch.zeros(count)}

    def sample(self, data, generator, steps):
        noise = torch.randn(steps, len(data["reference"]), 64, 30, generator=generator)
        return {"z": noise * data["spectrum"].sqrt()[:, None]}


TASKS = (
    SuiteTask(
        row="direction",
        family=LeadingDirection(),
        manifolds=("Sphere",),
        axis="unseen task",  # how it differs from what the weights were trained on
        metric="loss",
        reference="closed form",  # what `draw` gives as "reference" is attained
        horizon=100,
    ),
)


def my_optimizer(geometry):  # anything with init and update
    return sm.RSGD(geometry, lr=0.1, momentum=0.5)
