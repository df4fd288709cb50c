# ruff: noqa: E501
"""Seeded errors in the code behind the proven statements: does each statement's test see its own?

One mutant for each statement that has code (for the memory of segments a second): a replaced piece of source in a
temporary copy. Only the tests of that statement run against the copy; the mutant is killed if they fail.

    python tests/mutants/statement_mutants.py                # all; about five minutes on one core
    python tests/mutants/statement_mutants.py cayley polar   # only these statements

Prints the survivors and exits with 1 if there is one, or if the tests fail without any mutant.
"""

from __future__ import annotations

import sys

from seeding import ROOT, Mutant, hunt

RETRACTIONS = "subspace_meta/manifolds/retractions.py"
CANONICAL = "subspace_meta/manifolds/stiefel_canonical.py"
BASE = "subspace_meta/adapter/base.py"
SUBSPACE = "subspace_meta/optimizers/subspace.py"
ESTIMATORS = "subspace_meta/meta/estimators.py"
KERNELS = "kernels/subspace_kernels/reference.py"
# One line per mutant reads as a table.
# fmt: off
MUTANTS = (
    Mutant("stiefel_projection", "subspace_meta/manifolds/stiefel.py", "symmetric_part(x.mT @ v)", "(x.mT @ v)"),
    Mutant("stiefel_embedded_gradient", "subspace_meta/manifolds/stiefel.py", "without_rounding(stiefel_projection(x, euclidean_gradient), euclidean_gradient)", "euclidean_gradient - x @ euclidean_gradient.mT @ x"),
    Mutant("stiefel_canonical_gradient", CANONICAL, "gradient - x @ (gradient.mT @ x)", "gradient - x @ (x.mT @ gradient)"),
    Mutant("stiefel_coordinates", CANONICAL, "_scale_span(x, v, math.sqrt(0.5))", "_scale_span(x, v, 0.5)"),
    Mutant("stiefel_equivariance", "subspace_meta/manifolds/stiefel.py", "symmetric_part(x.mT @ v)", "symmetric_part(x.mT @ v).tril()"),
    Mutant("cholesky_qr", RETRACTIONS, "factor = torch.linalg.cholesky_ex(gram(y)).L", "factor = torch.linalg.cholesky_ex(identity_like(y) + gram(v)).L"),
    Mutant("qr_not_equivariant", RETRACTIONS, "torch.where(diagonal < 0, -1.0, 1.0)", "torch.where(diagonal < 0, 1.0, 1.0)"),
    Mutant("cayley", RETRACTIONS, "identity + 0.25 * (squared_scale * inner + a @ a) - 0.5 * a", "identity + 0.25 * (squared_scale * inner + a @ a) + 0.5 * a"),
    Mutant("cayley_small_solve", RETRACTIONS, "identity + 0.25 * (squared_scale * inner + a @ a)", "identity + 0.25 * (squared_scale * inner)"),
    Mutant("cayley_equivariant", RETRACTIONS, "a = scale * skew_part(x.mT @ v)", "a = scale * skew_part(x.mT @ v).triu()"),
    Mutant("polar", RETRACTIONS, "return (y + y @ z) * centre.rsqrt()", "return positive_qr(y)"),
    Mutant("spd_retraction", "subspace_meta/manifolds/spd.py", "keep_positive(0.5 * (x + moved @ moved.mT))", "keep_positive(moved @ factor.mT)"),
    Mutant("spd_square_root", "subspace_meta/manifolds/spd.py", "half = symmetric_square_root(x)\n        return half @", "half = cholesky(x)\n        return half @"),
    Mutant("newton_schulz_equivariant", RETRACTIONS, "0.5 * gram(y))", "0.5 * gram(y).square())"),
    Mutant("newton_schulz_padding", RETRACTIONS, "return y @ (1.5 * identity_like(y) - 0.5 * gram(y))", "return y @ (1.5 * identity_like(y) - 0.5 * gram(y)) + 1e-6"),
    Mutant("newton_schulz_singular_values", RETRACTIONS, "1.5 * identity_like(y) - 0.5 * gram(y)", "2.0 * identity_like(y) - gram(y)"),
    Mutant("newton_schulz_defect", RETRACTIONS, "1.5 * identity_like(y) - 0.5 * gram(y)", "1.4 * identity_like(y) - 0.4 * gram(y)"),
    Mutant("adapter_pullback", KERNELS, "return rows / p, columns / d", "return rows / d, columns / p"),
    Mutant("adapter_duplication", KERNELS, "return rows / p, columns / d", "return rows, columns"),
    Mutant("adapter_padding", KERNELS, "values[..., :count].mean(dim=-1)", "values.mean(dim=-1)"),
    Mutant("adapter_permutation", "subspace_meta/adapter/paper.py", "v - matrix_mean(v, p)[..., None] + 1", "v - v[..., :1] + 1"),
    Mutant("update_equivariance", SUBSPACE, "g.manifold.transport(x, y, g.manifold.from_coordinates(x, m))", "g.manifold.from_coordinates(x, m)"),
    Mutant("grassmann_projection", "subspace_meta/manifolds/grassmann.py", "subtract_product(v, x, x.mT @ v)", "subtract_product(v, x, x.mT @ v, 0.5)"),
    Mutant("grassmann_eigenbasis", "subspace_meta/adapter/spectral.py", "a * eye + gram @ (b * eye + c * gram)", "a * eye + gram * (b * eye + c * gram)"),
    Mutant("cross_adjoint", KERNELS, "product.sum(dim=-1) if v is None else (product @ v[..., None])[..., 0]", "product.sum(dim=-1)"),
    Mutant("rank2_adjoint", KERNELS, "u[..., :, None] * x * b[..., None, :]", "u[..., :, None] * x * v[..., None, :]"),
    Mutant("descent_direction", SUBSPACE, "gradients = [g.manifold.coordinates(x, r) for g, x, r in zip(groups, points, gradients, strict=True)]", "gradients = list(gradients)"),
    Mutant("sufficient_decrease", SUBSPACE, "moved = retract_all(self.geometry, points, tangents)", "moved = retract_all(self.geometry, points, [3.0 * v for v in tangents])"),
    Mutant("ambient_counter_example", CANONICAL, "return _scale_span(x, v, math.sqrt(0.5))", "return v"),
    Mutant("neumann_truncation", ESTIMATORS, "total = {name: value + to_theta[name] for name, value in total.items()}", "total = {name: to_theta[name] for name in total}"),
    Mutant("pes_unbiased", ESTIMATORS, "accumulated = {name: carry.weights[name] + value for name, value in noise.items()}", "accumulated = noise"),
    Mutant("segment_recomputation", "subspace_meta/meta/unroll.py", "        cotangent = pytree.tree_unflatten(passed, structure)", "        cotangent = pytree.tree_map(torch.zeros_like, trace.carry)"),
    Mutant("segment_recomputation_memory", "subspace_meta/meta/unroll.py", "return self.interval or self.block * math.ceil(math.sqrt(steps / self.block))", "return steps"),
    Mutant("retraction_orders", RETRACTIONS, "torch.addcmul(x @ (2.0 * identity - a), scale, v)", "torch.addcmul(x @ (2.0 * identity - a), scale, v) + 0.1 * (v - x @ a) @ a"),
    Mutant("optimizer_memory", BASE, "slow=like.new_zeros(coordinates)", "slow=like.new_zeros(2, coordinates)"),
)
# fmt: on


def tests_of(name: str) -> list[str]:
    """The test of this name, in whichever file of statements it is."""
    files = sorted((ROOT / "tests" / "proofs").glob("test_*_statements.py"))
    return [f"proofs/{file.name}::test_{name}" for file in files if f"def test_{name}(" in file.read_text()]


if __name__ == "__main__":
    sys.exit(hunt(MUTANTS, tests_of, 1.0, sys.argv[1:]))
