# ruff: noqa: E501
"""Seeded errors in the geometry: does the test suite see each of them?

Every mutant is one replaced piece of source in ``subspace_meta/manifolds``: a wrong sign, a dropped symmetrisation, a
wrong factor, an unsigned QR, a wrong axis, a wrong metric. It is applied in a temporary copy, the fast tests of
``tests/manifolds`` run against that copy, and the mutant is killed if one of them fails.

    python tests/mutants/geometry_mutants.py            # all; about ten minutes on one core
    python tests/mutants/geometry_mutants.py sphere spd # only these files

Prints the survivors and exits with 1 if fewer than 95 % were killed, or if the tests fail without any mutant.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
# In the order in which they are likely to fail and cheap to run; the first failure ends the run.
TESTS = (
    "test_copy.py",
    "test_formulas.py",
    "test_retractions.py",
    "test_checks.py",
    "test_battery.py",
    "test_derivatives.py",
    "test_drift.py",
)
REQUIRED = 0.95


class Mutant(NamedTuple):
    """One seeded error: in which file, what is replaced by what, and what kind of error that is."""

    file: str
    original: str
    mutated: str
    kind: str


# One line per mutant reads as a table.
# fmt: off
MUTANTS = (
    # base
    Mutant("base", "return 0.5 * (a + a.mT)", "return a", "dropped symmetrisation"),
    Mutant("base", "return 0.5 * (a + a.mT)", "return a + a.mT", "dropped factor 1/2"),
    Mutant("base", "return 0.5 * (a + a.mT)", "return 0.5 * (a - a.mT)", "wrong sign"),
    Mutant("base", "return 0.5 * (a - a.mT)", "return a - a.mT", "dropped factor 1/2"),
    Mutant("base", "torch.linalg.vecdot(u.flatten(-2), v.flatten(-2))", "(u * v).sum()", "wrong axis"),
    Mutant("base", "mean.abs() + (spread", "mean.abs() - (spread", "wrong sign"),
    Mutant("base", "((p - 1) / p)", "(1 / p)", "wrong bound"),
    Mutant("base", "mean.abs() + (spread + torch.finfo(a.dtype).eps ** 2).sqrt()", "mean.abs() + spread.sqrt()", "NaN derivative"),
    Mutant("base", "above = [lower[j][..., blocks[i][0] : blocks[i][1]].mT", "above = [0 * lower[j][..., blocks[i][0] : blocks[i][1]].mT", "half a Gram matrix"),
    Mutant("base", "return torch.cat(columns, dim=-1) if", "return torch.cat(columns[::-1], dim=-1) if", "blocks in the wrong order"),
    # retractions
    Mutant("retractions", "torch.where(diagonal < 0, -1.0, 1.0)", "torch.where(diagonal < 0, 1.0, 1.0)", "unsigned QR"),
    Mutant("retractions", "torch.where(diagonal < 0, -1.0, 1.0)", "diagonal.sgn()", "zero column erased"),
    Mutant("retractions", "1.5 * identity_like(y) - 0.5 * gram(y)", "identity_like(y)", "dropped polish"),
    Mutant("retractions", "1.5 * identity_like(y) - 0.5 * gram(y)", "1.5 * identity_like(y) + 0.5 * gram(y)", "wrong sign"),
    Mutant("retractions", "    limit = max_norm * max_norm", "    limit = max_norm", "wrong bound"),
    Mutant("retractions", "return limit / squared_norm.clamp(min=limit)", "return limit / squared_norm.clamp(min=limit) ** 0", "no bound"),
    Mutant("retractions", "y = torch.addcmul(x, _squared_scale(squared_norm, self.max_norm).sqrt(), v)\n        # cholesky_ex", "y = torch.addcmul(x, _squared_scale(squared_norm, self.max_norm), v)\n        # cholesky_ex", "dropped square root"),
    Mutant("retractions", "squared_norm = euclidean_inner(v, v)[..., None, None]", "squared_norm = v.square().sum(dim=-1, keepdim=True)", "wrong axis"),
    Mutant("base", "corner = factor[..., start:end, start:end].mT", "corner = factor[..., start:end, start:end].mT.tril()", "diagonal blocks lose their triangle"),
    Mutant("base", "factor[..., start:end, first:last].mT)", "factor[..., start:end, first:last].mT, 0.5)", "half of the columns before"),
    Mutant("retractions", "solve_triangular(factor.mT, y, upper=True, left=False)", "solve_triangular(factor, y, upper=False, left=False)", "transposed factor"),
    Mutant("retractions", "return positive_qr(x + v.to(x.dtype))", "return positive_qr(x + 0.5 * v.to(x.dtype))", "wrong factor 1/2"),
    Mutant("retractions", "(1.0, 1 / 2, 3 / 8, 5 / 16, 35 / 128),", "(1.0, 1 / 2, 3 / 8, 5 / 16, 35 / 256),", "wrong coefficient"),
    Mutant("retractions", "4.0 * torch.finfo(dtype).eps", "1e10 * torch.finfo(dtype).eps", "too few iterations"),
    Mutant("retractions", "half_width * identity - (gram(y) - identity)", "half_width * identity - 0.5 * (gram(y) - identity)", "wrong factor 1/2"),
    Mutant("retractions", "squared = 2.0 * e + e @ e", "squared = 2.0 * e - e @ e", "wrong sign"),
    Mutant("retractions", "z = z + e + z @ e", "z = z + e", "dropped term"),
    Mutant("retractions", "(y + y @ z) * centre.rsqrt()", "y + y @ z", "dropped scale"),
    Mutant("retractions", ".clamp(max=self.max_norm**2)", "", "wrong centre for long steps"),
    Mutant("retractions", "identity + 0.25 * (squared_scale * inner + a @ a) - 0.5 * a", "identity + 0.25 * (squared_scale * inner + a @ a) + 0.5 * a", "wrong sign"),
    Mutant("retractions", "identity + 0.25 * (squared_scale * inner + a @ a) - 0.5 * a", "identity + 0.25 * squared_scale * inner - 0.5 * a", "dropped term"),
    Mutant("retractions", "identity + 0.25 *", "identity + 0.5 *", "wrong factor 1/2"),
    Mutant("retractions", "right, left = identity - 0.5 * a, 2.0 * x", "right, left = identity - a, 2.0 * x", "wrong factor 1/2"),
    Mutant("retractions", "a = scale * skew_part(x.mT @ v)", "a = skew_part(x.mT @ v)", "bound applied to half of the step"),
    Mutant("retractions", "@ matrix_exponential(-a, max_norm)", "@ matrix_exponential(a, max_norm)", "wrong sign"),
    Mutant("retractions", "_geodesic_block(x, v - x @ a, a, torch.zeros_like(a), max_norm)", "_geodesic_block(x, v, a, torch.zeros_like(a), max_norm)", "normal part not taken"),
    Mutant("retractions", "top = torch.cat([a, -inner / size], dim=-1)", "top = torch.cat([a, -inner], dim=-1)", "dropped scale"),
    Mutant("retractions", "top = torch.cat([a, -inner / size], dim=-1)", "top = torch.cat([a, inner / size], dim=-1)", "wrong sign"),
    # matrix functions
    Mutant("matrix_functions", "total = 2.0 * total + total @ total", "total = 2.0 * total - total @ total", "wrong sign"),
    Mutant("matrix_functions", "math.factorial(start + index)", "math.factorial(start + index - 1)", "wrong coefficient"),
    Mutant("matrix_functions", "block = 4 if a.dtype == torch.float64 else 3", "block = 2", "too low a degree"),
    Mutant("matrix_functions", "STEPS = 3", "STEPS = 1", "derivatives of first order only"),
    Mutant("matrix_functions", "differences = roots[..., :, None] + roots[..., None, :]", "differences = 2.0 * roots[..., :, None] + 0.0 * roots[..., None, :]", "wrong divided difference"),
    Mutant("matrix_functions", "torch.linalg.eigh(symmetric_part(a.detach()))", "torch.linalg.eigh(symmetric_part(a))", "derivative through the eigenvectors"),
    Mutant("matrix_functions", "half * half / 6.0", "half * half / 3.0", "wrong divided difference"),
    Mutant("matrix_functions", "far.sinh() / far)", "far.cosh())", "wrong divided difference"),
    # stiefel, canonical, grassmann
    Mutant("stiefel", "subtract_product(v, x, symmetric_part(x.mT @ v))", "subtract_product(v, x, -symmetric_part(x.mT @ v))", "wrong sign"),
    Mutant("stiefel", "subtract_product(v, x, symmetric_part(x.mT @ v))", "subtract_product(v, x, x.mT @ v)", "dropped symmetrisation"),
    Mutant("stiefel", "p * (p + 1) // 2", "p * (p - 1) // 2", "wrong dimension"),
    Mutant("stiefel", "return stiefel_projection(y, v)", "return stiefel_projection(x, v)", "wrong point"),
    Mutant("stiefel", "return positive_qr(torch.randn(", "return positive_qr(1.0 + torch.randn(", "biased start"),
    Mutant("stiefel", "shape[-2] >= shape[-1] >= 1", "shape[-1] >= 1", "wide shapes accepted"),
    Mutant("stiefel_canonical", "gradient - x @ (gradient.mT @ x)", "stiefel_projection(x, gradient)", "wrong metric"),
    Mutant("stiefel_canonical", "- 0.5 * euclidean_inner", "+ 0.5 * euclidean_inner", "wrong sign"),
    Mutant("stiefel_canonical", "- 0.5 * euclidean_inner", "- 1.0 * euclidean_inner", "dropped factor 1/2"),
    Mutant("stiefel_canonical", "_scale_span(x, v, math.sqrt(0.5))", "_scale_span(x, v, 0.5)", "dropped square root"),
    Mutant("stiefel_canonical", "_scale_span(x, v, math.sqrt(2.0))", "_scale_span(x, v, math.sqrt(0.5))", "coordinates not inverted"),
    Mutant("stiefel_canonical", "return self.retraction.canonical_order", "return self.retraction.order", "order of another metric"),
    Mutant("grassmann", "subtract_product(v, x, x.mT @ v)", "subtract_product(v, x, v.mT @ x)", "transposed factor"),
    Mutant("grassmann", "* p * (d - p)", "* p * (d - p + 1)", "wrong dimension"),
    Mutant("grassmann", "torch.atan2(torch.linalg.vector_norm(normal, dim=-2), cosines)", "cosines.clamp(max=1.0).acos()", "inaccurate angle"),
    Mutant("grassmann", "rotated = y @ right.mT", "rotated = y @ right", "transposed factor"),
    Mutant("grassmann", "return self.project(y, v)", "return self.project(x, v)", "wrong point"),
    # sphere, oblique
    Mutant("sphere", "return v - x * dot(x, v, dim)", "return v + x * dot(x, v, dim)", "wrong sign"),
    Mutant("sphere", "return y * dot(y, y, dim).rsqrt()", "return y / dot(y, y, dim)", "dropped square root"),
    Mutant("sphere", "return v - (x + y) * (dot(y, v, dim) / opening)", "return v - y * dot(y, v, dim)", "projection instead of transport"),
    Mutant("sphere", "sinc = 1.0 - sinc * small / ((2 * k) * (2 * k + 1))", "sinc = 1.0 - sinc * small / ((2 * k) * (2 * k - 1))", "wrong coefficient"),
    Mutant("sphere", "range(10, 0, -1)", "range(3, 0, -1)", "too short a series"),
    Mutant("sphere", "return normalized(cosine * x + sinc * v, dim)", "return cosine * x + sinc * v", "dropped polish"),
    Mutant("sphere", "3 / 40", "3 / 20", "wrong coefficient"),
    Mutant("sphere", "return 0.5 * (dot(x, x, dim) - 1.0)", "return (dot(x, x, dim) - 1.0)", "dropped factor 1/2"),
    Mutant("oblique", "COLUMN = (-2,)", "COLUMN = (-1,)", "wrong axis"),
    Mutant("oblique", "(shape[-2] - 1) * shape[-1]", "shape[-2] * (shape[-1] - 1)", "wrong axis"),
    # spd
    Mutant("spd", "0.5 * (x + moved @ moved.mT)", "(x + moved @ moved.mT)", "dropped factor 1/2"),
    Mutant("spd", "moved = factor + _shorten", "moved = factor - _shorten", "wrong sign"),
    Mutant("spd", "upper=False).mT\n        whitened", "upper=False)\n        whitened", "transposed factor"),
    Mutant("spd", "matrix_exponential(0.5 * whitened, 0.5 * max_norm)", "matrix_exponential(whitened, max_norm)", "wrong factor 1/2"),
    Mutant("spd", "return x + ridge[..., None, None] * identity_like(x)", "return x", "no floor for eigenvalues"),
    Mutant("spd", "    x = symmetric_part(x)\n    constant", "    constant", "dropped symmetrisation"),
    Mutant("spd", "symmetric_part(x @ symmetric_part(euclidean_gradient.to(x.dtype)) @ x)", "symmetric_part(euclidean_gradient.to(x.dtype))", "wrong metric"),
    Mutant("spd", "symmetric_part(x @ symmetric_part(euclidean_gradient.to(x.dtype)) @ x)", "symmetric_part(x @ symmetric_part(euclidean_gradient.to(x.dtype)))", "wrong metric"),
    Mutant("spd", "right = torch.cholesky_solve(v.to(x.dtype), factor)", "right = v.to(x.dtype)", "wrong metric"),
    Mutant("spd", "limit / spectral_bound(e @ e)", "limit / spectral_bound(e)", "wrong bound"),
    Mutant("spd", "left = factor @ root", "left = root @ factor", "wrong order of factors"),
    Mutant("spd", "return inverse @ v.to(x.dtype) @ inverse", "return inverse @ v.to(x.dtype)", "half whitened"),
    Mutant("spd", "n * (n + 1) // 2", "n * (n - 1) // 2", "wrong dimension"),
    # rotations
    Mutant("orthogonal", "return x @ skew_part(x.mT @ v.to(x.dtype))", "return x @ symmetric_part(x.mT @ v.to(x.dtype))", "wrong sign"),
    Mutant("orthogonal", "return y @ skew_part(x.mT @ v.to(x.dtype))", "return y @ skew_part(y.mT @ v.to(x.dtype))", "projection instead of transport"),
    Mutant("orthogonal", "half = (0.5 * (1.0 - cosines))", "half = (0.5 * (1.0 + cosines))", "wrong sign"),
    Mutant("orthogonal", "torch.linalg.det(x) * torch.linalg.det(y) > 0", "torch.linalg.det(x) * torch.linalg.det(y) > -2", "components joined"),
    Mutant("rotations", "signs[..., -1] = torch.where(determinant < 0, -1.0, 1.0)", "signs[..., -1] = torch.where(determinant < 0, 1.0, 1.0)", "reflections"),
    Mutant("rotations", "signs[..., -1] = ", "signs[..., 0] = ", "not the nearest rotation"),
    Mutant("rotations", "error.clamp(min=2.0)", "error", "reflections feasible"),
    # product
    Mutant("product", "for factor, block in self._split((x,))]).amax(dim=0)", "for factor, block in self._split((x,))]).amin(dim=0)", "smallest instead of largest"),
    Mutant("product", "return torch.cat(tuple(blocks), dim=self.axis)", "return torch.cat(tuple(blocks), dim=-2)", "wrong axis"),
    Mutant("product", "torch.linalg.vector_norm(distances, dim=0)", "distances.sum(dim=0)", "distances added"),
    Mutant("product", "return min(factor.retraction_order", "return max(factor.retraction_order", "order of the best factor"),
)
# fmt: on


def run_tests(folder: Path) -> bool:
    """Run the fast tests in ``folder``; True if they pass."""
    environment = dict(
        os.environ, PYTHONPATH=os.pathsep.join([str(folder), str(folder / "kernels")]), OMP_NUM_THREADS="1"
    )
    tests = [str(folder / "tests" / "manifolds" / name) for name in TESTS]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", *tests]
    finished = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if finished.returncode not in (0, 1, 2):
        raise RuntimeError(finished.stdout + finished.stderr)
    return finished.returncode == 0


def prepare(folder: Path) -> None:
    """Copy the package and its manifold tests; the package's own __init__ is emptied, so that only manifolds load."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "subspace_meta" / "manifolds", folder / "subspace_meta" / "manifolds", ignore=ignore)
    shutil.copy(ROOT / "subspace_meta" / "_tracing.py", folder / "subspace_meta")
    (folder / "subspace_meta" / "__init__.py").write_text("")
    shutil.copytree(ROOT / "tests" / "manifolds", folder / "tests" / "manifolds", ignore=ignore)
    shutil.copy(ROOT / "tests" / "conftest.py", folder / "tests")
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "tests" / "manifolds" / "test_copy.py").write_text(
        "import subspace_meta\n\n\ndef test_the_copy_is_what_runs():\n"
        f"    assert subspace_meta.__file__.startswith({str(folder)!r})\n"
    )


def main(files: list[str]) -> int:
    """Run all mutants of ``files`` (all files if empty); return the exit code."""
    mutants = [mutant for mutant in MUTANTS if not files or mutant.file in files]
    survivors = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        if not run_tests(folder):
            print("the tests fail without any mutant")
            return 1
        for number, mutant in enumerate(mutants, start=1):
            path = folder / "subspace_meta" / "manifolds" / f"{mutant.file}.py"
            source = path.read_text()
            if mutant.original not in source:
                print(f"{mutant.file}: {mutant.original!r} is no longer in the source; renew this mutant")
                return 1
            path.write_text(source.replace(mutant.original, mutant.mutated))
            start = time.monotonic()
            killed = not run_tests(folder)
            path.write_text(source)
            status = "killed  " if killed else "SURVIVED"
            print(
                f"{number:3d}/{len(mutants)} {status} {mutant.file}: {mutant.kind} [{time.monotonic() - start:.0f} s]",
                flush=True,
            )
            if not killed:
                survivors.append(mutant)
    rate = 1.0 - len(survivors) / max(1, len(mutants))
    print(f"{len(mutants) - len(survivors)} of {len(mutants)} killed ({100 * rate:.1f} %)")
    for mutant in survivors:
        print(f"survivor in {mutant.file}: {mutant.original!r} -> {mutant.mutated!r} ({mutant.kind})")
    return 0 if mutants and rate >= REQUIRED else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
