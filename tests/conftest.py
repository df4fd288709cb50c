"""Settings of the whole suite: one thread, repeatable draws."""

import hypothesis
import torch

torch.set_num_threads(1)

hypothesis.settings.register_profile(
    "suite",
    deadline=None,
    max_examples=15,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.load_profile("suite")
