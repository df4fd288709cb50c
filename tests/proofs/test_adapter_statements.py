"""Adapter, whole update and kernels: does the code do what ``proofs/statements.json`` says it is proven to do?

A test has the name of its statement.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from drawing import close, is_orthonormal, orthonormal, permutation, seeds, tall
from hypothesis import given
from hypothesis import strategies as st
from making import adapt_step, lively_weights, normal, start
from subspace_kernels import Layout
from subspace_kernels.reference import cross_matrix, cross_matrix_means, matrix_mean, rank2_matrix
from torch import Tensor
from torch.utils import _pytree as pytree

import subspace_meta as sm
from subspace_meta.adapter.base import BaseAdapter
from subspace_meta.adapter.paper import PaperAdapter
from subspace_meta.adapter.spectral import spectral_direction, spectral_factor
from subspace_meta.manifolds import Cayley, Euclidean, Grassmann, PolarNewtonSchulz, Stiefel, StiefelCanonical
from subspace_meta.reference import reference_step

# Statistics, adapter, whole update

STEPS = 3
PAPER = PaperAdapter(mean_statistics=True)
ADAPTERS = {"base": BaseAdapter(), "paper": PAPER}
adapters = st.sampled_from(sorted(ADAPTERS))
sizes = st.tuples(st.integers(1, 6), st.integers(1, 4))


def gradients_of(size: tuple[int, int], seed: int) -> list[Tensor]:
    """Gradients whose rows and columns have different scales, so that the coordinates do not look alike."""
    d, p = size
    scale = torch.exp(normal(d, 1, seed=seed + 50) + normal(1, p, seed=seed + 51))
    return [scale * normal(d, p, seed=seed + t) for t in range(STEPS)]


def adapt(name: str, gradients: list[Tensor], padded_from: tuple[int, int] | None = None) -> tuple[list[Tensor], Any]:
    """The updates of one matrix and the last state; those of ``base`` without their factor 1/sqrt(d)."""
    adapter, weights = ADAPTERS[name], lively_weights(name, 1)
    d, p = gradients[0].shape
    layout = Layout(((d, p),), (padded_from,) if padded_from else ())
    state, updates = adapter.init(layout, gradients[:1]), []
    for r in gradients:
        (update,), state = adapt_step(adapter, weights, state, layout, [r])
        updates.append(update * (padded_from or (d, p))[0] ** 0.5 if name == "base" else update)
    return updates, state


def states_correspond(name: str, state: Any, other: Any, rows: Tensor, columns: Tensor) -> None:
    """``other`` is ``state`` seen through the index maps ``rows`` and ``columns``."""
    d = state.momentum[0].shape[0] if name == "base" else int(rows.max()) + 1
    coordinates = torch.cat([rows, d + columns])
    for field in ("hidden", "cell", *(("fast", "slow") if name == "base" else ("maximum",))):
        close(getattr(other, field), getattr(state, field)[..., coordinates])
    if name == "base":
        close(other.momentum[0], state.momentum[0][rows][:, columns])
        close(other.peak[0], state.peak[0])


def reference_updates(name: str, gradients: list[Tensor]) -> list[Tensor]:
    """The same by the reference, on flat space, where a step is the update."""
    more = {"mean_statistics": True} if name == "paper" else {}
    x, state, updates = torch.zeros_like(gradients[0]), None, []
    for r in gradients:
        y, state = reference_step(lively_weights(name, 1), name, Euclidean(), x, r, state, **more)
        updates.append((y - x) * (r.shape[0] ** 0.5 if name == "base" else 1.0))
        x = y
    return updates


@given(name=adapters, size=sizes, times=st.tuples(st.integers(1, 3), st.integers(1, 3)), seed=seeds)
def test_adapter_pullback(name, size, times, seed):
    """Index maps that take every value equally often, in any order, and only they."""
    (d, p), plain = size, gradients_of(size, seed)
    rows, columns = permutation(times[0] * d, seed) % d, permutation(times[1] * p, seed + 1) % p
    pulled = [r[rows][:, columns] for r in plain]
    for (a, b), (small_a, small_b) in zip(itertools.pairwise(pulled), itertools.pairwise(plain), strict=True):
        row, column = cross_matrix_means(a, b)
        small_row, small_column = cross_matrix_means(small_a, small_b)
        close(row, small_row[rows])
        close(column, small_column[columns])
        close(small_row, (small_a @ small_b.mT).diagonal() / p)
        close(small_column, (small_a.mT @ small_b).diagonal() / d)
        assert float(matrix_mean(row, len(rows))) == pytest.approx(float(small_a.mul(small_b).mean()), abs=1e-10)
    updates, state = adapt(name, plain)
    others, other = adapt(name, pulled)
    for a, b in zip(updates, others, strict=True):
        close(b, a[rows][:, columns])
    states_correspond(name, state, other, rows, columns)
    for a, b in zip(reference_updates(name, plain[:2]), reference_updates(name, pulled[:2]), strict=True):
        close(b, a[rows][:, columns], 1e-10)
    if name == "paper":  # the direction is diag(l) R diag(k)
        rows_scale, columns_scale = state.maximum[:d], state.maximum[d:]
        close(updates[-1], -PAPER.step_size * torch.diag(rows_scale) @ plain[-1] @ torch.diag(columns_scale))


@given(name=adapters, size=sizes, times=st.tuples(st.integers(1, 3), st.integers(1, 3)), seed=seeds)
def test_adapter_duplication(name, size, times, seed):
    plain = gradients_of(size, seed)
    for a, b in zip(
        cross_matrix_means(plain[0], plain[1]), cross_matrix_means(*(r.repeat(times) for r in plain[:2])), strict=True
    ):
        close(b, a.repeat(b.numel() // a.numel()))
    for a, b in zip(adapt(name, plain)[0], adapt(name, [r.repeat(times) for r in plain])[0], strict=True):
        close(b, a.repeat(times))


@given(name=adapters, size=sizes, extra=st.tuples(st.integers(0, 3), st.integers(0, 3)), seed=seeds)
def test_adapter_padding(name, size, extra, seed):
    (d, p), plain = size, gradients_of(size, seed)
    padded = [torch.nn.functional.pad(r, (0, extra[1], 0, extra[0])) for r in plain]
    (rows, columns), expected = cross_matrix_means(padded[0], padded[1], size), cross_matrix_means(plain[0], plain[1])
    close(rows[:d], expected[0])
    close(columns[:p], expected[1])
    # Whatever stands outside the mask is not seen by the mean.
    garbage = torch.cat([expected[0], torch.full((extra[0],), torch.nan, dtype=torch.float64)])
    close(matrix_mean(garbage, d), expected[0].mean())
    assert Layout((tuple(padded[0].shape),), (size,)).sizes == (size,)
    for a, b in zip(adapt(name, plain)[0], adapt(name, padded, size)[0], strict=True):
        close(b[:d, :p], a)
        assert not b[d:].any()
        assert not b[:, p:].any()


@given(name=adapters, size=sizes, seed=seeds)
def test_adapter_permutation(name, size, seed):
    plain, rows, columns = gradients_of(size, seed), permutation(size[0], seed), permutation(size[1], seed + 1)
    updates, state = adapt(name, plain)
    others, other = adapt(name, [r[rows][:, columns] for r in plain])
    for a, b in zip(updates, others, strict=True):
        close(b, a[rows][:, columns])
    states_correspond(name, state, other, rows, columns)


FOLLOWING = {
    "polar": Stiefel(PolarNewtonSchulz()),
    "Cayley": Stiefel(Cayley()),
    "canonical, Cayley": StiefelCanonical(),
    "canonical, polar": StiefelCanonical(PolarNewtonSchulz()),
    "Grassmann": Grassmann(),
}


@given(key=st.sampled_from(sorted(FOLLOWING)), name=adapters, shape=tall(smallest=2), seed=seeds)
def test_update_equivariance(key, name, shape, seed):
    d, p = shape
    geometry, params = start({"x": shape}, {"x": FOLLOWING[key]}, seed)
    optimizer = sm.SubspaceOptimizer(geometry, lively_weights(name, 1), ADAPTERS[name])
    rows, columns = permutation(d, seed), permutation(p, seed + 1)
    target = normal(d, p, seed=seed + 2)

    def trajectory(x: Tensor, target: Tensor) -> tuple[list[Tensor], Any]:
        """Gradients (k X^3 + C) that follow the permutations of X when C is permuted."""
        here, points = {"x": x}, []
        state = optimizer.init(here)
        for k in range(STEPS):
            here, state = optimizer.update({"x": k * here["x"] ** 3 + target}, state, here)
            points.append(here["x"])
            is_orthonormal(here["x"])
        return points, state

    points, state = trajectory(params["x"], target)
    others, other = trajectory(params["x"][rows][:, columns], target[rows][:, columns])
    for a, b in zip(points, others, strict=True):
        close(b, a[rows][:, columns], 1e-9)
    # The group is a batch of one matrix.
    coordinates = torch.cat([rows, d + columns])
    close(other.cell, state.cell[..., coordinates], 1e-8)
    if name == "base":
        close(other.momentum[0].view(d, p), state.momentum[0].view(d, p)[rows][:, columns], 1e-8)
        momentum = state.momentum[0].view(d, p)
        close(FOLLOWING[key].project(points[-1], momentum), momentum)


# Grassmann


@given(shape=tall(smallest=2), seed=seeds, repeated=st.booleans())
def test_grassmann_eigenbasis(shape, seed, repeated):
    """The formula itself, with a free choice of eigenbasis; then the orthonormal factor of the preset base.

    Its h is what the iterations make of one eigenvalue: of a matrix of one entry.
    """
    d, p = shape
    x, q = orthonormal(d, p, seed), orthonormal(p, p, seed + 1)
    g = normal(d, p, seed=seed + 2)
    if repeated:  # R^T R = identity: every orthogonal matrix is an eigenbasis
        g = orthonormal(d, p, seed + 2)

    def direction(r: Tensor, basis: Tensor) -> Tensor:
        mean = r.square().mean()
        rows = torch.exp(torch.tanh(r.square().mean(1) / (mean + 1e-3)))
        values = (basis.mT @ r.mT @ r @ basis).diagonal()
        close(basis @ torch.diag(values) @ basis.mT, r.mT @ r, 1e-9)
        scales = torch.exp(-torch.sqrt(values.clamp(min=0) + 0.1) / (mean + 1.0))
        return torch.diag(rows) @ r @ basis @ torch.diag(scales) @ basis.mT

    def eigenbasis(r: Tensor) -> Tensor:
        return torch.linalg.eigh(r.mT @ r).eigenvectors

    plain = direction(g, eigenbasis(g))
    others = [-eigenbasis(g)]
    others += [orthonormal(p, p, seed + 4)] if repeated else [eigenbasis(g).flip(1)]
    for basis in others:
        close(direction(g, basis), plain, 1e-9)
    close(direction(g @ q, eigenbasis(g @ q)), plain @ q, 1e-9)
    r = Grassmann().riemannian_gradient(x, g)
    whole = Grassmann().project(x, direction(r, eigenbasis(r)))
    turned = Grassmann().riemannian_gradient(x @ q, g @ q)
    close(Grassmann().project(x @ q, direction(turned, eigenbasis(turned))), whole @ q, 1e-8)
    # Column scales keep horizontal vectors horizontal.
    close(x.mT @ r @ torch.diag(normal(p, seed=seed)), torch.zeros(p, p, dtype=x.dtype))
    # The orthonormal factor of the code, of a direction of norm 1: these scales, with its own h.
    if d == p:  # nothing is horizontal
        return
    squared, one = r.mT @ r / r.square().sum(), torch.eye(1, dtype=r.dtype)
    values, basis = torch.linalg.eigh(squared)
    scales = torch.stack([spectral_factor(value.reshape(1, 1), one)[0, 0] for value in values])
    close(spectral_factor(squared, torch.eye(p, dtype=r.dtype)), basis @ torch.diag(scales) @ basis.mT, 1e-8)

    def mixed(r: Tensor) -> Tensor:
        squares = r.square().sum() / p
        return spectral_direction(r, squares, (d, p), torch.tensor(0.7, dtype=r.dtype))[0]

    close(mixed(turned), mixed(r) @ q, 1e-7)
    close(x.mT @ mixed(r), torch.zeros(p, p, dtype=x.dtype), 1e-8)


# Kernels


@given(size=sizes, seed=seeds)
def test_cross_adjoint(size, seed):
    d, p = size
    a, b, more = (normal(d, p, seed=seed + i) for i in range(3))
    (u, gr, du), (v, gc, dv) = ([normal(n, seed=seed + 10 + i) for i in range(3)] for n in size)
    rows, columns = cross_matrix(a, b, u, v)
    close(rows, (a @ torch.diag(v) @ b.mT).diagonal())
    close(columns, (a.mT @ torch.diag(u) @ b).diagonal())
    close(torch.cat(cross_matrix(b, a, u, v)), torch.cat([rows, columns]))
    close(
        torch.cat(cross_matrix(a + more, b, u, v)), torch.cat([rows, columns]) + torch.cat(cross_matrix(more, b, u, v))
    )
    close(
        torch.cat(cross_matrix(a, b, u + du, v + dv)),
        torch.cat([rows, columns]) + torch.cat(cross_matrix(a, b, du, dv)),
    )
    ga, gb, gu, gv = torch.func.vjp(cross_matrix, a, b, u, v)[1]((gr, gc))
    close(ga, rank2_matrix(b, gr, v, u, gc))
    close(gb, rank2_matrix(a, gr, v, u, gc))
    close(torch.cat([gu, gv]), torch.cat(cross_matrix(a, b, gr, gc)))
    close(torch.cat(cross_matrix(a, a)), torch.cat([(a @ a.mT).diagonal(), (a.mT @ a).diagonal()]))


@given(size=sizes, seed=seeds)
def test_rank2_adjoint(size, seed):
    d, p = size
    x, g, more = (normal(d, p, seed=seed + i) for i in range(3))
    (a, u, da), (v, b, dv) = ([normal(n, seed=seed + 10 + i) for i in range(3)] for n in size)
    y = rank2_matrix(x, a, v, u, b)
    close(y, torch.diag(a) @ x @ torch.diag(v) + torch.diag(u) @ x @ torch.diag(b))
    close(rank2_matrix(x + more, a, v, u, b), y + rank2_matrix(more, a, v, u, b))
    gx, ga, gv, gu, gb = torch.func.vjp(rank2_matrix, x, a, v, u, b)[1](g)
    close(gx, rank2_matrix(g, a, v, u, b))
    close(torch.cat([ga, gv]), torch.cat(cross_matrix(g, x, a, v)))
    close(torch.cat([gu, gb]), torch.cat(cross_matrix(g, x, u, b)))
    zero_u, zero_b = torch.zeros_like(u), torch.zeros_like(b)
    close(rank2_matrix(x, a + da, v, u, b), y + rank2_matrix(x, da, v, zero_u, zero_b))
    close(rank2_matrix(x, a, v + dv, u, b), y + rank2_matrix(x, a, dv, zero_u, zero_b))
    close(rank2_matrix(x, a, v, u + da, b), y + rank2_matrix(x, zero_u, torch.zeros_like(v), da, b))
    close(rank2_matrix(x, a, v, u, b + dv), y + rank2_matrix(x, torch.zeros_like(a), zero_b, u, dv))
    close(rank2_matrix(x, a, v), torch.diag(a) @ x @ torch.diag(v))


# Memory


@given(shapes=st.lists(tall(), min_size=1, max_size=3), hidden=st.integers(1, 6))
def test_optimizer_memory(shapes, hidden):
    points = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
    layout = Layout(tuple(shapes))
    coordinates, entries = sum(d + p for d, p in shapes), sum(d * p for d, p in shapes)
    paper, base = PaperAdapter(hidden=hidden), BaseAdapter(hidden=hidden)

    def count(state: Any) -> int:
        return sum(leaf.numel() for leaf in pytree.tree_leaves(state))

    assert count(paper.init(layout, points)) == (4 * hidden + 1) * coordinates
    # The count of steps, and how many there will be, are shared by all matrices.
    assert count(base.init(layout, points)) == (2 * hidden + 2) * coordinates + 8 * len(shapes) + entries + 2
    assert count(base.init(layout, points, averaging=True)) == count(base.init(layout, points)) + entries
    for adapter in (paper, base):
        weights = {name: value.double() for name, value in adapter.init_weights().items()}
        assert {name: tuple(value.shape) for name, value in weights.items()} == adapter.weight_shapes()
        state = adapter.init(layout, points)
        after = adapter(weights, adapter.init(layout, points), layout, [normal(*s) for s in shapes])[-1]
        assert count(after) == count(state)
    for d, p in shapes:
        theirs = 34 * d * d + 1024 * d * p + 2049
        assert (theirs - 2049) / count(paper.init(Layout(((d, p),)), [points[0]])) >= 34 * d / (4 * hidden + 1)
    for (d, p), total in {(64, 64): 4335617, (512, 64): 42469377, (2048, 512): 1216350209}.items():
        assert 34 * d * d + 1024 * d * p + 2049 == total
