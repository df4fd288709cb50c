# ruff: noqa: E501
"""Seeded errors in the geometry: does the test suite see each of them?

Every mutant is one replaced piece of source in ``subspace_meta/manifolds``: a wrong sign, a dropped symmetrisation, a
wrong factor, an unsigned QR, a wrong axis, a wrong metric. It is applied in a temporary copy, the fast tests of
``tests/manifolds`` run against that copy, and the mutant is killed if one of them fails.

    python tests/mutants/geometry_mutants.py            # all; half an hour on one core
    python tests/mutants/geometry_mutants.py sphere spd # only these files

Prints the survivors and exits with 1 if fewer than 95 % were killed, or if the tests fail without any mutant.
"""

from __future__ import annotations

import sys

from seeding import Mutant, hunt

# In the order in which they are likely to fail and cheap to run.
TESTS = (
    "formulas",
    "retractions",
    "spd",
    "distances",
    "cut_locus",
    "long_steps",
    "turning_points",
    "checks",
    "battery",
    "derivatives",
    "drift",
)
REQUIRED = 0.95


def mutant(file: str, original: str, mutated: str, kind: str) -> Mutant:
    """Return a mutant of a file of ``subspace_meta/manifolds``."""
    return Mutant(file, f"subspace_meta/manifolds/{file}.py", original, mutated, kind)


# One line per mutant reads as a table.
# fmt: off
MUTANTS = (
    # base
    mutant("base", "return 0.5 * (a + a.mT)", "return a", "dropped symmetrisation"),
    mutant("base", "return 0.5 * (a + a.mT)", "return a + a.mT", "dropped factor 1/2"),
    mutant("base", "return 0.5 * (a + a.mT)", "return 0.5 * (a - a.mT)", "wrong sign"),
    mutant("base", "return 0.5 * (a - a.mT)", "return a - a.mT", "dropped factor 1/2"),
    mutant("base", "torch.linalg.vecdot(u.flatten(-2), v.flatten(-2))", "(u * v).sum()", "wrong axis"),
    mutant("base", "mean.abs() + (spread", "mean.abs() - (spread", "wrong sign"),
    mutant("base", "((p - 1) / p)", "(1 / p)", "wrong bound"),
    mutant("base", "mean.abs() + (spread + torch.finfo(a.dtype).eps ** 2).sqrt()", "mean.abs() + spread.sqrt()", "NaN derivative"),
    mutant("base", "above = [lower[j][..., blocks[i][0] : blocks[i][1]].mT", "above = [0 * lower[j][..., blocks[i][0] : blocks[i][1]].mT", "half a Gram matrix"),
    mutant("base", "return torch.cat(columns, dim=-1) if", "return torch.cat(columns[::-1], dim=-1) if", "blocks in the wrong order"),
    mutant("base", "scale = 1.0 / power_of_two(whole)", "scale = 1.0", "gradients whose squares vanish are lost"),
    mutant("base", "return root(self.inner(x, v / scale, v / scale)) * scale[..., 0, 0]", "return root(self.inner(x, v, v))", "squares overflow"),
    mutant("base", "torch.where(positive, torch.where(positive, squares, 1.0).sqrt(), 0.0 * squares)", "squares.sqrt()", "NaN derivative"),
    # retractions
    mutant("base", "    v = v * (_HUGE / norm.clamp(min=_HUGE)).to(v.dtype)\n", "", "huge steps vanish"),
    mutant("retractions", "return Cayley(min(self.max_norm, 2.0))", "return self", "a subspace comes nearer again"),
    mutant("retractions", "return Geodesic(self.metric, min(self.max_norm, math.pi / 2))", "return self", "a subspace comes nearer again"),
    mutant("retractions", "max_norm: float = math.pi", "max_norm: float = 3.3", "past the way back"),
    mutant("retractions", "return positive_qr(torch.addcmul(x, _squared_scale(squared_norm, self.max_norm).sqrt(), v))", "return positive_qr(x + v)", "the point is lost in the step"),
    mutant("retractions", "torch.where(diagonal < 0, -1.0, 1.0)", "torch.where(diagonal < 0, 1.0, 1.0)", "unsigned QR"),
    mutant("retractions", "torch.where(diagonal < 0, -1.0, 1.0)", "diagonal.sgn()", "zero column erased"),
    mutant("retractions", "1.5 * identity_like(y) - 0.5 * gram(y)", "identity_like(y)", "dropped polish"),
    mutant("retractions", "1.5 * identity_like(y) - 0.5 * gram(y)", "1.5 * identity_like(y) + 0.5 * gram(y)", "wrong sign"),
    mutant("retractions", "    limit = max_norm * max_norm", "    limit = max_norm", "wrong bound"),
    mutant("retractions", "return limit / squared_norm.clamp(min=limit)", "return limit / squared_norm.clamp(min=limit) ** 0", "no bound"),
    mutant("retractions", "y = torch.addcmul(x, _squared_scale(squared_norm, self.max_norm).sqrt(), v)\n        # cholesky_ex", "y = torch.addcmul(x, _squared_scale(squared_norm, self.max_norm), v)\n        # cholesky_ex", "dropped square root"),
    mutant("retractions", "return euclidean_inner(v, v)[..., None, None]", "return v.square().sum(dim=-1, keepdim=True)", "wrong axis"),
    mutant("base", "corner = factor[..., start:end, start:end].mT", "corner = factor[..., start:end, start:end].mT.tril()", "diagonal blocks lose their triangle"),
    mutant("base", "factor[..., start:end, first:last].mT)", "factor[..., start:end, first:last].mT, 0.5)", "half of the columns before"),
    mutant("retractions", "solve_triangular(factor.mT, y, upper=True, left=False)", "solve_triangular(factor, y, upper=False, left=False)", "transposed factor"),
    mutant("retractions", "return positive_qr(torch.addcmul(x, _squared", "return positive_qr(torch.addcmul(x, 0.5 * _squared", "wrong factor 1/2"),
    mutant("retractions", "(1.0, 1 / 2, 3 / 8, 5 / 16, 35 / 128),", "(1.0, 1 / 2, 3 / 8, 5 / 16, 35 / 256),", "wrong coefficient"),
    mutant("retractions", "4.0 * torch.finfo(dtype).eps", "1e10 * torch.finfo(dtype).eps", "too few iterations"),
    mutant("retractions", "half_width * identity - (gram(y) - identity)", "half_width * identity - 0.5 * (gram(y) - identity)", "wrong factor 1/2"),
    mutant("retractions", "squared = 2.0 * e + e @ e", "squared = 2.0 * e - e @ e", "wrong sign"),
    mutant("retractions", "z = z + e + z @ e", "z = z + e", "dropped term"),
    mutant("retractions", "(y + y @ z) * centre.rsqrt()", "y + y @ z", "dropped scale"),
    mutant("retractions", ".clamp(max=self.max_norm**2)", "", "wrong centre for long steps"),
    mutant("retractions", "identity + 0.25 * (squared_scale * inner + a @ a) - 0.5 * a", "identity + 0.25 * (squared_scale * inner + a @ a) + 0.5 * a", "wrong sign"),
    mutant("retractions", "identity + 0.25 * (squared_scale * inner + a @ a) - 0.5 * a", "identity + 0.25 * squared_scale * inner - 0.5 * a", "dropped term"),
    mutant("retractions", "identity + 0.25 *", "identity + 0.5 *", "wrong factor 1/2"),
    mutant("retractions", "right, left = identity - 0.5 * a, 2.0 * x", "right, left = identity - a, 2.0 * x", "wrong factor 1/2"),
    mutant("retractions", "a = scale * skew_part(x.mT @ v)", "a = skew_part(x.mT @ v)", "bound applied to half of the step"),
    mutant("retractions", "@ matrix_exponential(-a, max_norm)", "@ matrix_exponential(a, max_norm)", "wrong sign"),
    mutant("retractions", "_geodesic_block(x, v - x @ a, a, torch.zeros_like(a), max_norm)", "_geodesic_block(x, v, a, torch.zeros_like(a), max_norm)", "normal part not taken"),
    mutant("retractions", "top = torch.cat([a, -inner / size], dim=-1)", "top = torch.cat([a, -inner], dim=-1)", "dropped scale"),
    mutant("retractions", "top = torch.cat([a, -inner / size], dim=-1)", "top = torch.cat([a, inner / size], dim=-1)", "wrong sign"),
    # matrix functions
    mutant("matrix_functions", "total = 2.0 * total + total @ total", "total = 2.0 * total - total @ total", "wrong sign"),
    mutant("matrix_functions", "math.factorial(start + index)", "math.factorial(start + index - 1)", "wrong coefficient"),
    mutant("matrix_functions", "block = 4 if a.dtype == torch.float64 else 3", "block = 2", "too low a degree"),
    mutant("matrix_functions", "STEPS = 3", "STEPS = 1", "derivatives of first order only"),
    mutant("matrix_functions", "STEPS = 3", "STEPS = 2", "derivatives of second order only"),
    mutant("matrix_functions", "divided = outer_sum(roots, roots)", "divided = 2.0 * outer_sum(roots, 0.0 * roots)", "wrong divided difference"),
    mutant("matrix_functions", "constant = a.detach()", "constant = a", "derivative through the eigenvectors"),
    mutant("matrix_functions", "torch.where(near, 1.0 + half", "torch.where(near, 1.5 + half", "wrong divided difference"),
    mutant("matrix_functions", "far.sinh() / far)", "far.cosh())", "wrong divided difference"),
    mutant("matrix_functions", "values[..., -1:].clamp(min=info.tiny / info.eps)", "values[..., -1:].clamp(min=info.eps)", "an absolute floor for eigenvalues"),
    mutant("matrix_functions", "residual = vectors.mT @ (a.detach() - start @ start) @ vectors", "residual = 0.0 * d", "rounding of the decomposition left"),
    mutant("matrix_functions", "logs = logs - _middle(logs)", "logs = 1.0 * logs", "the size of the matrix is not taken out"),
    mutant("matrix_functions", "middle.exp()[..., None] * difference", "difference", "the size is not put back"),
    mutant("matrix_functions", "f = outer_sum(y, y) * f + f @ f", "f = 2.0 * y[..., None] * f + f @ f", "factors do not commute"),
    mutant("matrix_functions", "f = outer_sum(y, y) * f + f @ f", "f = outer_sum(y, y) * f", "derivatives of first order only"),
    mutant("matrix_functions", "torch.float32: 6, torch.float64: 10", "torch.float32: 3, torch.float64: 5", "too low a degree"),
    mutant("matrix_functions", "return compose(vectors, values.exp(), middle", "return compose(vectors, 1.0 + values.expm1(), middle", "small exponentials lose their digits"),
    mutant("matrix_functions", "symmetric = -0.5 * (z @ z.mT)", "symmetric = 0.5 * (z @ z.mT)", "wrong sign"),
    mutant("matrix_functions", "rest = d + d @ z.mT + values", "rest = d + values", "dropped term"),
    mutant("matrix_functions", "return tangent is None", "return True", "dual numbers lose their derivative"),
    # stiefel, canonical, grassmann
    mutant("stiefel", "subtract_product(v, x, symmetric_part(x.mT @ v))", "subtract_product(v, x, -symmetric_part(x.mT @ v))", "wrong sign"),
    mutant("stiefel", "subtract_product(v, x, symmetric_part(x.mT @ v))", "subtract_product(v, x, x.mT @ v)", "dropped symmetrisation"),
    mutant("stiefel", "p * (p + 1) // 2", "p * (p - 1) // 2", "wrong dimension"),
    mutant("stiefel", "return stiefel_projection(y, v)", "return stiefel_projection(x, v)", "wrong point"),
    mutant("stiefel", "return positive_qr(torch.randn(", "return positive_qr(1.0 + torch.randn(", "biased start"),
    mutant("stiefel", "shape[-2] >= shape[-1] >= 1", "shape[-1] >= 1", "wide shapes accepted"),
    mutant("stiefel_canonical", "gradient - x @ (gradient.mT @ x)", "stiefel_projection(x, gradient)", "wrong metric"),
    mutant("stiefel_canonical", "- 0.5 * euclidean_inner", "+ 0.5 * euclidean_inner", "wrong sign"),
    mutant("stiefel_canonical", "- 0.5 * euclidean_inner", "- 1.0 * euclidean_inner", "dropped factor 1/2"),
    mutant("stiefel_canonical", "_scale_span(x, v, math.sqrt(0.5))", "_scale_span(x, v, 0.5)", "dropped square root"),
    mutant("stiefel_canonical", "_scale_span(x, v, math.sqrt(2.0))", "_scale_span(x, v, math.sqrt(0.5))", "coordinates not inverted"),
    mutant("stiefel_canonical", "return self.retraction.canonical_order", "return self.retraction.order", "order of another metric"),
    mutant("grassmann", "subtract_product(v, x, x.mT @ v)", "subtract_product(v, x, v.mT @ x)", "transposed factor"),
    mutant("grassmann", "* p * (d - p)", "* p * (d - p + 1)", "wrong dimension"),
    mutant("grassmann", "torch.atan2(sines.flip(-1), cosines)", "cosines.clamp(max=1.0).acos()", "inaccurate angle"),
    mutant("grassmann", "rotated = y @ right.mT", "rotated = y @ right", "transposed factor"),
    mutant("grassmann", "return self.project(y, v)", "return self.project(x, v)", "wrong point"),
    # sphere, oblique
    mutant("sphere", "return v - x * dot(x, v, dim)", "return v + x * dot(x, v, dim)", "wrong sign"),
    mutant("sphere", "return y * dot(y, y, dim).rsqrt()", "return y / dot(y, y, dim)", "dropped square root"),
    mutant("sphere", "by_sum = v - total * (dot(y, v, dim) / torch.where(near, opening, 1.0))", "by_sum = v - y * dot(y, v, dim)", "projection instead of transport"),
    mutant("sphere", "near = opening > 0.5", "near = opening > -1.0", "digits cancel near the antipode"),
    mutant("sphere", "middle = total - across * (dot(across, total, dim)", "middle = total - 0.0 * across * (dot(across, total, dim)", "not tangent near the antipode"),
    mutant("sphere", "tangent - middle * (2.0 * dot(middle, tangent, dim) / squared)", "tangent - middle * (dot(middle, tangent, dim) / squared)", "dropped factor 2"),
    mutant("sphere", "torch.where(cosine < 0, y + x, y - x)", "y - x", "digits cancel near the antipode"),
    mutant("sphere", "return torch.where(opposite, math.pi * _some_direction(x, dim), log)", "return log", "no logarithm at the antipode"),
    mutant("sphere", "far = (2.0 * torch.atan2(chord, root(dot(between, between, dim)))).square()", "far = dot(x, y, dim).clamp(-1.0, 1.0).acos().square()", "digits cancel near the antipode"),
    mutant("sphere", "2.0 / (k * k * math.comb(2 * k, k))", "1.0 / (k * k * math.comb(2 * k, k))", "wrong coefficient"),
    mutant("sphere", "for k in range(1, 11))", "for k in range(1, 3))", "too short a series"),
    mutant("sphere", "    near = q < 0.1\n", "    near = q < 0.0\n", "no derivative at equal points"),
    mutant("sphere", "sinc = 1.0 - sinc * small / ((2 * k) * (2 * k + 1))", "sinc = 1.0 - sinc * small / ((2 * k) * (2 * k - 1))", "wrong coefficient"),
    mutant("sphere", "range(10, 0, -1)", "range(3, 0, -1)", "too short a series"),
    mutant("sphere", "return normalized(cosine * x + sinc * v, dim)", "return cosine * x + sinc * v", "dropped polish"),
    mutant("sphere", "3 / 40", "3 / 20", "wrong coefficient"),
    mutant("sphere", "return 0.5 * (dot(x, x, dim) - 1.0)", "return (dot(x, x, dim) - 1.0)", "dropped factor 1/2"),
    mutant("oblique", "COLUMN = (-2,)", "COLUMN = (-1,)", "wrong axis"),
    mutant("oblique", "(shape[-2] - 1) * shape[-1]", "shape[-2] * (shape[-1] - 1)", "wrong axis"),
    # spd
    mutant("spd", "0.5 * (x + moved @ moved.mT)", "(x + moved @ moved.mT)", "dropped factor 1/2"),
    mutant("spd", "moved = factor + _length", "moved = factor - _length", "wrong sign"),
    mutant("spd", "self.max_norm, max_contraction=1.0)", "self.max_norm)", "long contractions turn around"),
    mutant("spd", "self.max_norm, max_contraction=1.0)", "self.max_norm, max_contraction=0.9)", "short contractions are shortened"),
    mutant("spd", "contraction = torch.maximum(_largest_contraction(e, bound),", "contraction = torch.maximum(bound,", "expansions bound contractions"),
    mutant("spd", "power = 1.125 * bound.detach() * identity - constant", "power = 1.125 * bound.detach() * identity + constant", "the wrong end of the spectrum"),
    mutant("spd", "power = 1.125 * bound.detach()", "power = bound.detach()", "nothing left of a multiple of the identity"),
    mutant("spd", "return largest + torch.where(", "return largest - torch.where(", "wrong second derivative"),
    mutant("spd", "_SQUARINGS = {torch.float32: 12, torch.float64: 24}", "_SQUARINGS = {torch.float32: 6, torch.float64: 6}", "mean of too many eigenvalues"),
    mutant("spd", "        e = e / scale\n", "        e, scale = 1.0 * e, 1.0\n", "squares out of range"),
    mutant("spd", "    return v / size, size\n", "    return v, v.new_ones((1, 1))\n", "whitening out of range"),
    mutant("spd", "scale = torch.maximum(\n            power_of_two(e), torch", "scale = torch.maximum(\n            power_of_two(e), 0.0 * torch", "derivatives of short steps overflow"),
    mutant("spd", "short = self.max_norm <= 5.0", "short = True", "small exponentials lose their digits"),
    mutant("spd", "(whitened / scale).square()", "whitened.square()", "dropped scale"),
    mutant("spd", "torch.where(finite & ~equal, constant", "torch.where(finite, constant", "rounding errors between equal points"),
    mutant("spd", "2.0 * self.values.log(), torch.nan", "self.values.square().log(), torch.nan", "range of the squares"),
    mutant("spd", "2.0 * self.values.log(), torch.nan", "self.values.log(), torch.nan", "dropped factor 2"),
    mutant("spd", "n + n.mT + n @ n.mT)", "n + n.mT)", "derivatives of first order only"),
    mutant("spd", "constant = k.detach()", "constant = k", "no derivative"),
    mutant("spd", "return (torch.diag_embed(logs) + difference).square()", "return (torch.diag_embed(logs) + difference.detach()).square()", "no derivative"),
    mutant("spd", "torch.where(size > 0, size, 1.0))", "1.0)", "an absolute floor for eigenvalues"),
    mutant("spd", "upper=False).mT\n        whitened = symmetric_part", "upper=False)\n        whitened = symmetric_part", "transposed factor"),
    mutant("spd", "half = 0.5 * _length", "half = _length", "wrong factor 1/2"),
    mutant("spd", "return x + ridge[..., None, None] * identity_like(x)", "return x", "no floor for eigenvalues"),
    mutant("spd", "    x = symmetric_part(x)\n    constant", "    constant", "dropped symmetrisation"),
    mutant("spd", "symmetric_part(x @ symmetric_part(euclidean_gradient.to(x.dtype)) @ x)", "symmetric_part(euclidean_gradient.to(x.dtype))", "wrong metric"),
    mutant("spd", "symmetric_part(x @ symmetric_part(euclidean_gradient.to(x.dtype)) @ x)", "symmetric_part(x @ symmetric_part(euclidean_gradient.to(x.dtype)))", "wrong metric"),
    mutant("spd", "right = torch.cholesky_solve(v.to(x.dtype), factor)", "right = v.to(x.dtype)", "wrong metric"),
    mutant("spd", "spectral_bound(squared).sqrt()", "spectral_bound(e).sqrt()", "wrong bound"),
    mutant("spd", "pair.left @ turn @ pair.right.mT).mT", "pair.left @ turn @ pair.right.mT)", "transposed factor"),
    mutant("spd", "turn = identity_like(y) + polar_difference(", "turn = identity_like(y) + 0.0 * polar_difference(", "no derivative"),
    mutant("spd", "return inverse @ v.to(x.dtype) @ inverse", "return inverse @ v.to(x.dtype)", "half whitened"),
    mutant("spd", "definite = (wrong + also_wrong == 0)[..., None]", "definite = (wrong + also_wrong >= 0)[..., None]", "distances of what is not definite"),
    mutant("sphere", "torch.where(near, 1.0, dot(across, across, dim))", "dot(across, across, dim)", "rounding decides where points are near"),
    mutant("spd", "n * (n + 1) // 2", "n * (n - 1) // 2", "wrong dimension"),
    # rotations
    mutant("orthogonal", "return x @ skew_part(x.mT @ v.to(x.dtype))", "return x @ symmetric_part(x.mT @ v.to(x.dtype))", "wrong sign"),
    mutant("orthogonal", "return y @ skew_part(x.mT @ v.to(x.dtype))", "return y @ skew_part(y.mT @ v.to(x.dtype))", "projection instead of transport"),
    mutant("orthogonal", "cosines < _widest_gap(cosines)", "cosines < -2.0 + 0.0 * _widest_gap(cosines)", "digits cancel near pi"),
    mutant("orthogonal", "levels.diff(dim=-1).argmax(", "levels.diff(dim=-1).argmin(", "split between equal angles"),
    mutant("orthogonal", "16.0 * torch.finfo(e.dtype).eps * size.abs()", "0.0 * size.abs()", "planes from rounding"),
    mutant("orthogonal", "kept @ (pairs - pairs.mT) @ kept.mT", "0.0 * kept @ kept.mT", "no logarithm at pi"),
    mutant("orthogonal", "    for _ in range(4):\n        turns = newton_schulz_step(skew_part(turns))\n", "", "dropped clean-up of planes"),
    mutant("orthogonal", "turns = -2.0 * projector.imag", "turns = 2.0 * projector.imag", "the long way round"),
    mutant("orthogonal", "torch.linalg.svdvals(y - x).flip(-1)", "torch.linalg.svdvals(y - x)", "sines paired with the wrong cosines"),
    mutant("orthogonal", "torch.linalg.svdvals(y + x))", "(4.0 - torch.linalg.svdvals(y - x).flip(-1).square()).clamp(min=0.0).sqrt())", "digits cancel near pi"),
    mutant("orthogonal", "0.25 * gram(y - x)", "0.25 * gram(y - x).detach()", "no derivative of distances"),
    mutant("base", "first + 0.5 * (divided", "first + 0.0 * (divided", "no second derivative of distances"),
    mutant("base", "divided = torch.where(close, curvature, ratio)", "divided = ratio", "no second derivative at equal angles"),
    mutant("base", "4**n * (n - 1) / (2 * n * math.comb(2 * n, n))", "4**n * n / (2 * n * math.comb(2 * n, n))", "wrong coefficient"),
    mutant("base", "0.5 * change - 0.125 * change.square() / safe", "0.5 * change", "no second derivative of distances"),
    mutant("grassmann", "torch.atan2(sines.flip(-1), cosines)", "torch.atan2(sines, cosines)", "sines paired with the wrong cosines"),
    mutant("retractions", "CANONICAL_TURN = 0.5 * math.sqrt(3.0) * math.pi", "CANONICAL_TURN = math.pi", "past the way back"),
    mutant("orthogonal", "torch.linalg.det(x) * torch.linalg.det(y) > 0", "torch.linalg.det(x) * torch.linalg.det(y) > -2", "components joined"),
    mutant("rotations", "signs[..., -1] = torch.where(determinant < 0, -1.0, 1.0)", "signs[..., -1] = torch.where(determinant < 0, 1.0, 1.0)", "reflections"),
    mutant("rotations", "signs[..., -1] = ", "signs[..., 0] = ", "not the nearest rotation"),
    mutant("rotations", "error.clamp(min=2.0)", "error", "reflections feasible"),
    # product
    mutant("product", "for factor, block in self._split((x,))]).amax(dim=0)", "for factor, block in self._split((x,))]).amin(dim=0)", "smallest instead of largest"),
    mutant("product", "return torch.cat(tuple(blocks), dim=self.axis)", "return torch.cat(tuple(blocks), dim=-2)", "wrong axis"),
    mutant("product", "factor.squared_distance(*block) for", "factor.distance(*block) for", "distances added"),
    mutant("product", "return root((norms / largest).square().sum(dim=0)) * largest", "return norms.sum(dim=0)", "norms added"),
    mutant("euclidean", "carried: Tensor = torch.broadcast_tensors(v.to(x.dtype), y)[0]", "carried: Tensor = v.to(x.dtype)", "one tangent for several points"),
    mutant("product", "return min(factor.retraction_order", "return max(factor.retraction_order", "order of the best factor"),
)
# fmt: on


if __name__ == "__main__":
    sys.exit(hunt(MUTANTS, lambda file: [f"manifolds/test_{name}.py" for name in TESTS], REQUIRED, sys.argv[1:]))
