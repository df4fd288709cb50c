"""The twin that ``bench meta`` is compared with computes the same meta-gradient; needs JAX (extra ``bench``)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from subspace_meta.benchmarks.meta import _peer, mlp_setting, pca_setting, relative_difference
from subspace_meta.meta.unroll import pull_back, run


@pytest.mark.parametrize("unroll", [1, 4])
def test_the_same_gradient_in_float64(unroll: int) -> None:
    jax = pytest.importorskip("jax")
    twin = _peer("jax_twin", "jax")
    with jax.enable_x64(True):
        setting = pca_setting(3, 12, 3, 20, dtype=torch.float64)
        setting = setting._replace(loop=replace(setting.loop, compiled=False))
        assert relative_difference(twin.caller(setting, unroll)(), setting.meta_gradient().theta) < 1e-10


def test_torchopt_computes_the_same_derivative() -> None:
    pytest.importorskip("torchopt")
    twin = _peer("torchopt_twin", "torchopt")
    loop, params, batches, data = mlp_setting(2)
    loop = replace(loop, compiled=False)
    params, batches, data = ({k: v.double() for k, v in part.items()} for part in (params, batches, data))
    trace = run(loop, {}, loop.start({}, params), batches, data)
    cotangents = torch.zeros_like(trace.objectives)
    cotangents[-1] = 1.0
    ours = pull_back(loop, {}, trace, batches, data, cotangents).carry.params
    assert relative_difference(twin.caller(params, batches, 1e-2)(), ours) < 1e-6
