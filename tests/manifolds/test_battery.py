"""One battery over all manifolds, retractions and types, built on the checks that users have."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from manifold_cases import CASES, FEW, label, seeded, step_of_norm

from subspace_meta.manifolds import SPD, Euclidean, Product, Sphere, check_manifold
from subspace_meta.manifolds.checks import SLOPE_WINDOW, draw, gap, slope

every_case = pytest.mark.parametrize("case", CASES, ids=label)
few_cases = pytest.mark.parametrize("case", FEW, ids=label)
both_types = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


@every_case
@both_types
def test_checks_pass(case, dtype):
    manifold, shape = case
    report = check_manifold(manifold, shape, dtype=dtype)
    assert report.passed
    assert len(report.results) == 17
    if dtype == torch.float64:
        # What is exact in closed form is exact to a few roundings, well below what the checks allow a user.
        sharp = [
            r for r in report.results if not r.skipped and r.name not in ("long steps", "derivatives", "dimension")
        ]
        assert max(r.measured for r in sharp if r.allowed == 1000 * torch.finfo(dtype).eps) < 5e-14


@every_case
def test_claimed_order_is_the_measured_one(case):
    manifold, shape = case
    sample = draw(manifold, shape, generator=seeded(3))
    errors = [
        gap(manifold, manifold.retract(sample.x, t * sample.v), manifold.exp(sample.x, t * sample.v))
        for t in SLOPE_WINDOW
    ]
    measured = slope(SLOPE_WINDOW, errors, 1e-14)
    if manifold.retraction_order == math.inf:
        assert measured is None
        assert max(errors) < 1e-14
    else:
        assert measured == pytest.approx(manifold.retraction_order + 1, abs=0.1)


@every_case
def test_long_steps_stay_on_the_manifold(case):
    manifold, shape = case
    x = manifold.random_point(shape, seeded(), torch.float32)
    bound = 8e-6
    for length in (1.0, 10.0, 1e3, 1e6):
        for rank in (None, 1, 2):
            y = manifold.retract(x, step_of_norm(manifold, x, length, rank))
            assert y.isfinite().all()
            assert manifold.violation(y.double()).max() <= bound, (length, rank)
            gradient = torch.func.grad(lambda v: manifold.retract(x, v).square().sum())(
                step_of_norm(manifold, x, length)
            )
            assert gradient.isfinite().all(), length


@every_case
def test_small_violations_are_corrected_by_a_step(case):
    manifold, shape = case
    if isinstance(manifold, Euclidean):
        pytest.skip("nothing is constrained")
    generator = seeded()
    x = manifold.random_point(shape, generator, torch.float64)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    off = x + 1e-5 * noise
    before = manifold.violation(off).max()
    after = manifold.violation(manifold.retract(off, 1e-3 * manifold.project(x, noise))).max()
    assert before > 1e-6
    # The polish is quadratic: 1e-5 becomes 1e-10, times the size of the matrix squared.
    assert after < 1e-8


@every_case
def test_nothing_is_moved_without_a_step(case):
    manifold, shape = case
    x = manifold.random_point(shape, seeded(), torch.float32)
    moved = manifold.retract(x, torch.zeros_like(x))
    assert (moved - x).abs().max() <= 1e-6 * x.abs().max()


@few_cases
def test_bfloat16_vectors_are_brought_to_the_points_type(case):
    manifold, shape = case
    x = manifold.random_point(shape, seeded(), torch.float32)
    y = manifold.random_point(shape, seeded(1), torch.float32)
    if isinstance(manifold, Euclidean | Sphere | SPD | Product):
        u = torch.randn(shape, generator=seeded(2))
    else:
        u = 0.1 * manifold.random_tangent(x, seeded(2))
    short = u.to(torch.bfloat16)
    long = short.to(torch.float32)
    for method in (
        lambda v: manifold.project(x, v),
        lambda v: manifold.riemannian_gradient(x, v),
        lambda v: manifold.retract(x, v),
        lambda v: manifold.exp(x, v),
        lambda v: manifold.transport(x, y, v),
        lambda v: manifold.inner(x, v, v),
        lambda v: manifold.coordinates(x, v),
        lambda v: manifold.from_coordinates(x, v),
    ):
        assert method(short).dtype == torch.float32
        torch.testing.assert_close(method(short), method(long), rtol=0, atol=0)


@few_cases
def test_transforms_of_one_step(case):
    """vmap over grad equals a loop; the Hessian by jacrev of grad is finite and symmetric on the ambient space."""
    manifold, shape = case
    x = manifold.random_point(shape, seeded(), torch.float64)
    v = 0.1 * manifold.random_tangent(x, seeded(1))
    target = torch.randn(shape, generator=seeded(2), dtype=torch.float64)

    def loss(x, v, target):
        gradient = manifold.riemannian_gradient(x, v + x)
        y = manifold.retract(x, manifold.project(x, v) - 0.1 * gradient)
        return ((manifold.transport(x, y, v) + y - target) ** 2).sum()

    one_by_one = torch.stack([torch.func.grad(loss, 1)(x[i], v[i], target[i]) for i in range(len(x))])
    torch.testing.assert_close(
        torch.func.vmap(torch.func.grad(loss, 1))(x, v, target), one_by_one, rtol=1e-12, atol=1e-12
    )
    hessian = torch.func.jacrev(torch.func.grad(loss, 1), 1)(x[0], v[0], target[0]).flatten(2).flatten(0, 1)
    assert hessian.isfinite().all()
    torch.testing.assert_close(hessian, hessian.mT, rtol=1e-9, atol=1e-9)


@few_cases
@pytest.mark.filterwarnings("ignore:.torch.jit.script.:DeprecationWarning")
def test_forward_mode_agrees_with_reverse_mode(case):
    manifold, shape = case
    x = manifold.random_point(shape, seeded(), torch.float64)
    v = 0.3 * manifold.random_tangent(x, seeded(1))
    w = manifold.random_tangent(x, seeded(2))
    g = torch.randn(shape, generator=seeded(3), dtype=torch.float64)
    _, forward = torch.func.jvp(lambda v: manifold.retract(x, v), (v,), (w,))
    reverse = torch.func.grad(lambda v: (g * manifold.retract(x, v)).sum())(v)
    torch.testing.assert_close((g * forward).sum(), (reverse * w).sum(), rtol=1e-11, atol=1e-12)


@every_case
def test_value_objects(case):
    """Equal, hashable, frozen, picklable; the shape is checked."""
    manifold, shape = case
    copy = pickle.loads(pickle.dumps(manifold))
    assert copy == manifold
    assert hash(copy) == hash(manifold)
    with pytest.raises((AttributeError, TypeError)):
        manifold.extra = 1
    manifold.check_shape(shape)
    with pytest.raises(ValueError, match=r"\(5,\)"):
        manifold.check_shape((5,))


@every_case
def test_random_points_come_from_the_generator(case):
    manifold, shape = case
    x, again, other = (manifold.random_point(shape, seeded(s), torch.float64) for s in (0, 0, 1))
    assert torch.equal(x, again)
    assert not torch.equal(x, other)
    assert x.shape == shape
    assert x.dtype == torch.float64
    assert torch.equal(manifold.random_tangent(x, seeded(5)), manifold.random_tangent(x, seeded(5)))
