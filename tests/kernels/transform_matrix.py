"""Every operation under every transform, compared with a formula that knows neither lists nor packing.

Each operation is seen as a function of one flat vector that holds all its tensor arguments, with a random linear
functional of its outputs as a scalar value: gradients, second derivatives and forward derivatives then have one form.
"""

from __future__ import annotations

import math

import subspace_kernels as sk
import torch
from making import normal

SHAPES = ((3, 2), (2, 4, 3), (1, 5))
LAYOUT = sk.Layout(SHAPES)
COORDINATES, MATRICES = LAYOUT.rows + LAYOUT.columns, LAYOUT.matrices
UNITS, ENERGIES, RAW, CONTEXT, OUTPUTS = 3, 2, 1, 2, 3
NETWORK_SHAPES = (
    (4 * UNITS, ENERGIES + RAW + CONTEXT + 1 + UNITS),
    (4 * UNITS, 1),
    (2 * OUTPUTS, UNITS),
    (2 * OUTPUTS, 1),
    (2, ENERGIES),
)
INPUT_SHAPES = ((ENERGIES, COORDINATES), (ENERGIES, MATRICES), (RAW, COORDINATES), (CONTEXT, MATRICES))
STATE_SHAPES = ((UNITS, COORDINATES),) * 2
TRANSFORMS = ("none", "grad", "grad of grad", "vmap", "vmap of grad", "jvp", "hessian product", "autograd", "double")


def cut(flat, shapes):
    """Cut a flat vector into tensors of these shapes."""
    parts = torch.split(flat, [math.prod(shape) for shape in shapes])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def matrices(tensors):
    """All matrices of a list of batches, one by one."""
    return [matrix for tensor in tensors for matrix in tensor.reshape(-1, *tensor.shape[-2:])]


def packed_pieces(values, axis):
    """Cut packed values of rows (axis 0) or of columns (axis 1) into one vector a matrix."""
    return torch.split(values, [size[axis] for size in (m.shape[-2:] for m in matrices(examples()))], dim=-1)


def examples():
    return [torch.empty(shape) for shape in SHAPES]


# The operations, and the same by formulas per matrix. Both take the flat vector and return a list of tensors.


def cross(flat):
    *ab, u, v = cut(flat, [*SHAPES, *SHAPES, (LAYOUT.rows,), (LAYOUT.columns,)])
    return [*sk.cross(ab[:3], ab[3:], u, v)]


def cross_formula(flat):
    *ab, u, v = cut(flat, [*SHAPES, *SHAPES, (LAYOUT.rows,), (LAYOUT.columns,)])
    groups = list(zip(matrices(ab[:3]), matrices(ab[3:]), packed_pieces(u, 0), packed_pieces(v, 1), strict=True))
    rows = [(a @ torch.diag(right) @ b.T).diagonal() for a, b, _, right in groups]
    columns = [(a.T @ torch.diag(left) @ b).diagonal() for a, b, left, _ in groups]
    return [torch.cat(rows), torch.cat(columns)]


def rank2(flat):
    *x, a, u, v, b = cut(flat, [*SHAPES, *[(LAYOUT.rows,)] * 2, *[(LAYOUT.columns,)] * 2])
    return [part.reshape(-1) for part in sk.rank2(x, a, v, u, b)]


def rank2_formula(flat):
    *x, a, u, v, b = cut(flat, [*SHAPES, *[(LAYOUT.rows,)] * 2, *[(LAYOUT.columns,)] * 2])
    pieces = zip(
        matrices(x), packed_pieces(a, 0), packed_pieces(u, 0), packed_pieces(v, 1), packed_pieces(b, 1), strict=True
    )
    made = [
        (torch.diag(aa) @ m @ torch.diag(vv) + torch.diag(uu) @ m @ torch.diag(bb)).reshape(-1)
        for m, aa, uu, vv, bb in pieces
    ]
    return [made[0], torch.cat(made[1:3]), made[3]]


def statistics(flat):
    *rm, weight = cut(flat, [*SHAPES, *SHAPES, ()])
    momentum, means = sk.moments(rm[:3], rm[3:], weight, LAYOUT)
    return [*(part.reshape(-1) for part in momentum), means.reshape(-1), sk.cross_means(rm[:3], rm[:3], LAYOUT)]


def statistics_formula(flat):
    *rm, weight = cut(flat, [*SHAPES, *SHAPES, ()])
    r = matrices(rm[:3])
    m = matrices(rm[3:])
    moved = [(1 - weight) * old + weight * new for old, new in zip(m, r, strict=True)]

    def means(a, b):
        rows = [(x * y).mean(dim=1) for x, y in zip(a, b, strict=True)]
        return torch.cat(rows + [(x * y).mean(dim=0) for x, y in zip(a, b, strict=True)])

    flat_m = [part.reshape(-1) for part in moved]
    three = torch.cat([means(r, r), means(m, m), means(r, m)])
    return [flat_m[0], torch.cat(flat_m[1:3]), flat_m[3], three, means(r, r)]


def directions(flat):
    *rm, mix, scale = cut(flat, [*SHAPES, *SHAPES, (MATRICES,), (COORDINATES,)])
    made, squares = sk.directions(rm[:3], rm[3:], mix, scale, LAYOUT)
    return [*(part.reshape(-1) for part in made), squares]


def directions_formula(flat):
    *rm, mix, scale = cut(flat, [*SHAPES, *SHAPES, (MATRICES,), (COORDINATES,)])
    sides = packed_pieces(scale[: LAYOUT.rows], 0), packed_pieces(scale[LAYOUT.rows :], 1)
    groups = zip(matrices(rm[:3]), matrices(rm[3:]), mix, *sides, strict=True)
    made = [torch.diag(left) @ ((1 - s) * r + s * m) @ torch.diag(right) for r, m, s, left, right in groups]
    flat_made = [part.reshape(-1) for part in made]
    squares = torch.stack([part.square().sum() / part.shape[1] for part in made])
    return [flat_made[0], torch.cat(flat_made[1:3]), flat_made[3], squares]


def lstm_parts(flat):
    parts = cut(flat, [*NETWORK_SHAPES, *INPUT_SHAPES, *STATE_SHAPES])
    energies, means, raw, context = parts[5:9]
    return sk.Network(*parts[:5]), sk.Inputs(energies.square() + 0.1, means.square() + 0.1, raw, context), *parts[9:]


def lstm_cell(flat):
    return [part.reshape(-1) for part in sk.lstm_cell(*lstm_parts(flat), LAYOUT)]


def lstm_cell_formula(flat):
    network, inputs, hidden, cell = lstm_parts(flat)
    sizes = [m.shape[-2:] for m in matrices(examples())]
    owners = [(b, 0) for b, (d, _) in enumerate(sizes) for _ in range(d)]
    owners += [(b, 1) for b, (_, p) in enumerate(sizes) for _ in range(p)]
    outputs, hiddens, cells = [], [], []
    for n, (b, side) in enumerate(owners):
        relative = (inputs.energies[:, n] / inputs.means[:, b] + 1e-6).sqrt().log()
        sign = torch.tensor([1.0 - 2.0 * side], dtype=flat.dtype)
        x = torch.cat([relative, inputs.raw[:, n], inputs.context[:, b], sign, hidden[:, n]])
        enter, forget, candidate, leave = (network.weight @ x + network.bias[:, 0]).chunk(4)
        c = forget.sigmoid() * cell[:, n] + enter.sigmoid() * candidate.tanh()
        h = leave.sigmoid() * c.tanh()
        half = slice(side * OUTPUTS, (side + 1) * OUTPUTS)
        out = network.head_weight[half] @ h + network.head_bias[half, 0]
        scale = torch.exp(out[0] + network.skip[side] @ relative)
        outputs.append(torch.cat([scale[None], out[1:]]))
        hiddens.append(h)
        cells.append(c)
    return [torch.stack(values, dim=1).reshape(-1) for values in (outputs, hiddens, cells)]


ENTRIES = LAYOUT.entries
OPERATIONS = {
    "cross": (cross, cross_formula, 2 * ENTRIES + COORDINATES),
    "rank2": (rank2, rank2_formula, ENTRIES + 2 * COORDINATES),
    "statistics": (statistics, statistics_formula, 2 * ENTRIES + 1),
    "directions": (directions, directions_formula, 2 * ENTRIES + MATRICES + COORDINATES),
    "lstm_cell": (
        lstm_cell,
        lstm_cell_formula,
        sum(math.prod(shape) for shape in (*NETWORK_SHAPES, *INPUT_SHAPES, *STATE_SHAPES)),
    ),
}


def transformed(function, transform, point, tangent, functional):
    """Return the values of a transform of ``function`` at a point."""

    def scalar(x):
        # The square makes every second derivative matter.
        value = torch.cat(function(x)) @ functional
        return value + value.square()

    if transform == "none":
        return torch.cat(function(point))
    if transform == "grad":
        return torch.func.grad(scalar)(point)
    if transform == "grad of grad":
        return torch.func.grad(lambda x: torch.func.grad(scalar)(x) @ tangent)(point)
    if transform == "vmap":
        return torch.func.vmap(lambda x: torch.cat(function(x)))(torch.stack([point, tangent]))
    if transform == "vmap of grad":
        return torch.func.vmap(torch.func.grad(scalar))(torch.stack([point, tangent]))
    if transform == "jvp":
        return torch.cat(torch.func.jvp(lambda x: torch.cat(function(x)), (point,), (tangent,)))
    if transform == "hessian product":
        return torch.func.jvp(torch.func.grad(scalar), (point,), (tangent,))[1]
    point = point.clone().requires_grad_()
    (first,) = torch.autograd.grad(scalar(point), point, create_graph=transform == "double")
    if transform == "autograd":
        return first
    return torch.autograd.grad(first @ tangent, point)[0]


def check(operation, transform, compiled, dtype, tolerance=None):
    """Compare an operation under a transform with its formula in float64."""
    function, formula, size = OPERATIONS[operation]
    point, tangent = (0.7 * normal(size, seed=i) for i in (1, 2))
    outputs = sum(len(part) for part in formula(point))
    functional = normal(outputs, seed=3) / outputs**0.5
    expected = transformed(formula, transform, point, tangent, functional)

    def run(*arguments):
        return transformed(function, transform, *arguments)

    if compiled:
        torch._dynamo.reset()  # all cases share one code object
        if transform in ("autograd", "double"):
            # Compiled is the function, the derivative is taken outside; twice is not offered by the compiler.
            if transform == "double":
                return
            whole = torch.compile(function, backend="aot_eager", fullgraph=True)

            def run(*arguments):
                return transformed(whole, transform, *arguments)

        else:
            run = torch.compile(run, backend="aot_eager", fullgraph=True)
    given = [value.to(dtype) for value in (point, tangent, functional)]
    scale = float(expected.abs().max())
    tolerance = tolerance or (1e-10 if dtype == torch.float64 else 3e-6)
    torch.testing.assert_close(run(*given).double(), expected, rtol=0, atol=tolerance * scale)
