"""Physical padding changes no bit, and has the right derivatives."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from subspace_kernels import padded, reference

SHAPES = st.lists(
    st.one_of(
        st.tuples(st.integers(1, 150), st.integers(1, 300)),
        st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 60)),
    ),
    min_size=1,
    max_size=4,
)


def operands(shapes, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    a, b = ([normal(*shape) for shape in shapes] for _ in range(2))
    layout = reference.layout_of(a)
    rows, columns = layout.rows, layout.columns
    return a, b, normal(rows), normal(columns), normal(rows), normal(columns)


def same_bits(one, other):
    return one.dtype == other.dtype and torch.equal(one.view(torch.int32), other.view(torch.int32))


@hypothesis.given(SHAPES, st.booleans())
def test_padding_to_common_buckets_changes_no_bit(shapes, weighted):
    a, b, u, v, other_u, other_b = operands(shapes, torch.float32)
    a[0].flatten()[:1].zero_()
    weights = (u, v) if weighted else ()
    for one, other in zip(padded.cross_padded(a, b, *weights), padded.cross_tiled(a, b, *weights), strict=True):
        assert same_bits(one, other)
    more = (other_u, other_b) if weighted else ()
    for one, other in zip(padded.rank2_padded(a, u, v, *more), padded.rank2_tiled(a, u, v, *more), strict=True):
        assert same_bits(one, other)


def test_negative_zeros_and_half_precision():
    a, ones = [torch.full((64, 128), -0.0), torch.full((65, 129), -0.0)], [torch.ones(64, 128), torch.ones(65, 129)]
    for one, other in zip(padded.cross_padded(a, ones), padded.cross_tiled(a, ones), strict=True):
        assert same_bits(one, other)
    half, b, *_ = operands([(70, 130), (3, 500)], torch.bfloat16)
    for one, other in zip(padded.cross_padded(half, b), padded.cross_tiled(half, b), strict=True):
        assert one.dtype == torch.float32
        assert same_bits(one, other)


@hypothesis.given(SHAPES)
def test_values(shapes):
    a, b, u, v, other_u, other_b = operands(shapes, torch.float64)
    for name in ("cross_padded", "cross_tiled"):
        found = getattr(padded, name)(a, b, u, v)
        torch.testing.assert_close(found, reference.cross(a, b, u, v), rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(getattr(padded, name)(a, a), reference.cross(a, a), rtol=1e-11, atol=1e-11)
    for name in ("rank2_padded", "rank2_tiled"):
        found = getattr(padded, name)(a, u, v, other_u, other_b)
        torch.testing.assert_close(found, reference.rank2(a, u, v, other_u, other_b))
        torch.testing.assert_close(getattr(padded, name)(a, u, v), reference.rank2(a, u, v))


@pytest.mark.parametrize("name", ["cross_padded", "cross_tiled"])
def test_derivatives_of_cross(name):
    a, b, u, v, *_ = [
        [x.requires_grad_() for x in part] if isinstance(part, list) else part.requires_grad_()
        for part in operands([(2, 3), (1, 4), (2, 2, 1)], torch.float64)
    ]
    call = getattr(padded, name)
    assert torch.autograd.gradcheck(lambda u, v, *ab: call(ab[:3], ab[3:], u, v), (u, v, *a, *b))
    assert torch.autograd.gradgradcheck(lambda u, v, *ab: call(ab[:3], ab[3:], u, v), (u, v, *a, *b))


@pytest.mark.parametrize("name", ["rank2_padded", "rank2_tiled"])
def test_derivatives_of_rank2(name):
    x, _, *factors = operands([(2, 3), (1, 4)], torch.float64)
    inputs = [value.requires_grad_() for value in (*factors[:2], *factors[2:], *x)]
    call = getattr(padded, name)
    assert torch.autograd.gradcheck(lambda a, v, u, b, *x: call(x, a, v, u, b), inputs)
