"""Numerical checks of a manifold, one's own included: does the code do what the mathematics says?

:func:`check_manifold` runs them all on random points and prints as a table; each ``check_*`` function runs one. A
failure raises :class:`ManifoldCheckError` with the measured figure and the allowed one. A check that does not apply (no
closed exponential, say) is reported as skipped, with the reason.

    >>> from subspace_meta.manifolds import Stiefel
    >>> from subspace_meta.manifolds.checks import check_manifold
    >>> report = check_manifold(Stiefel(), (6, 3))
    >>> report.passed
    True

Orders are measured as slopes: the error of a retraction of order k is proportional to t^(k+1), so on a log-log plot
over a window of step sizes it is a line of slope k+1. The window's points that rounding has reached are left out. The
idea of shipping such checks with slope windows is that of ManifoldsBase.jl; the identities are those of Boumal, "An
Introduction to Optimization on Smooth Manifolds", 2023, chapters 3, 5 and 10.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from subspace_meta.manifolds.base import Manifold, euclidean_inner

# Step sizes for slopes, relative to a tangent of unit length; at the long end float32 still resolves order 2.
SLOPE_WINDOW = (0.2, 0.14, 0.1, 0.06, 0.03, 0.02, 0.01)
SLOPE_TOLERANCE = 0.25
LONG_STEPS = (1.0, 10.0, 1e3, 1e6)


class ManifoldCheckError(AssertionError):
    """A manifold does not do what its contract says; the message names the check and the figures."""


@dataclass(frozen=True)
class CheckResult:
    """One check: what was measured, what is allowed, and why it was skipped if it was.

    ``measured`` must be at most ``allowed``; for slopes it is how far the slope falls short of the claimed one.
    """

    name: str
    measured: float
    allowed: float
    note: str = ""
    skipped: bool = False

    @property
    def passed(self) -> bool:
        """Whether the check was skipped or the measured figure is finite and allowed."""
        return self.skipped or self.measured <= self.allowed

    def __str__(self) -> str:
        if self.skipped:
            return f"skipped  {self.name}: {self.note}"
        status = "passed" if self.passed else "FAILED"
        note = f" ({self.note})" if self.note else ""
        return f"{status}   {self.name}: {self.measured:.2e}, allowed {self.allowed:.2e}{note}"


@dataclass(frozen=True)
class ManifoldReport:
    """All checks of one manifold at one shape and type. Printing it gives one line per check."""

    manifold: Manifold
    shape: tuple[int, ...]
    dtype: torch.dtype
    results: tuple[CheckResult, ...]

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(result.passed for result in self.results)

    @property
    def failures(self) -> tuple[CheckResult, ...]:
        """The checks that failed."""
        return tuple(result for result in self.results if not result.passed)

    def __getitem__(self, name: str) -> CheckResult:
        """Return the result of that name; ``KeyError`` if there is none."""
        for result in self.results:
            if result.name == name:
                return result
        raise KeyError(name)

    def __str__(self) -> str:
        head = f"{self.manifold!r} at {' x '.join(map(str, self.shape))}, {self.dtype}"
        return "\n".join([head, *(f"  {result}" for result in self.results)])

    def raise_on_failure(self) -> None:
        """Raise :class:`ManifoldCheckError` listing every failed check."""
        if not self.passed:
            lines = [f"{self.manifold!r} at {self.shape}, {self.dtype}:", *map(str, self.failures)]
            raise ManifoldCheckError("\n  ".join(lines))


@dataclass(frozen=True)
class Sample:
    """What the checks look at: a point and, at it, tangents of unit length, ambient matrices, and a tolerance.

    Make it with :func:`draw`. All tensors have the checked shape; ``scale`` is the size of an entry.
    """

    manifold: Manifold
    x: Tensor
    u: Tensor
    v: Tensor
    ambient: Tensor
    other: Tensor
    tolerance: float

    @property
    def dtype(self) -> torch.dtype:
        """The type of the point."""
        return self.x.dtype


def draw(
    manifold: Manifold,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float64,
    generator: torch.Generator | None = None,
    tolerance: float | None = None,
) -> Sample:
    """Draw what the checks look at.

    Args:
        manifold: any implementation of the contract.
        shape: ``(..., d, p)``; small matrices are enough.
        dtype: float64 (sharp checks) or float32.
        generator: where randomness comes from; seed 0 if not given.
        tolerance: allowed relative error; 1000 times the type's precision if not given.

    Raises:
        ValueError: the manifold does not accept the shape.
    """
    manifold.check_shape(shape)
    generator = generator or torch.Generator().manual_seed(0)
    x = manifold.random_point(shape, generator, dtype)
    u = unit(manifold, x, manifold.random_tangent(x, generator))
    v = unit(manifold, x, manifold.random_tangent(x, generator))
    ambient = torch.randn(shape, generator=generator, dtype=dtype, device=generator.device)
    other = torch.randn(shape, generator=generator, dtype=dtype, device=generator.device)
    if tolerance is None:
        tolerance = 1000.0 * torch.finfo(dtype).eps
    return Sample(manifold, x, u, v, ambient, other, tolerance)


def unit(manifold: Manifold, x: Tensor, v: Tensor) -> Tensor:
    """Scale tangents to length one in the metric; zero stays zero."""
    length = manifold.inner(x, v, v).sqrt()[..., None, None]
    return v / torch.where(length > 0, length, 1.0)


def difference(a: Tensor, b: Tensor) -> float:
    """Return the largest |a - b| relative to the largest entry of ``b`` (at least 1); NaN if one is not finite."""
    scale = max(1.0, float(b.abs().max())) if b.numel() else 1.0
    return float((a - b).abs().max()) / scale if a.shape == b.shape else math.inf


def gap(manifold: Manifold, a: Tensor, b: Tensor) -> float:
    """Return how far apart two points are: by the manifold's distance where it has one, else entry by entry.

    On Grassmann one point has many matrices, and only the distance knows.
    """
    try:
        return float(manifold.distance(a, b).max())
    except NotImplementedError:
        return difference(a, b)


def slope(steps: Sequence[float], errors: Sequence[float], floor: float) -> float | None:
    """Fit the slope of log error over log step by least squares, leaving out errors at or below ``floor``.

    Returns ``None`` if fewer than three points are left: the errors are rounding and no slope can be seen.
    """
    points = [(math.log(t), math.log(e)) for t, e in zip(steps, errors, strict=True) if e > floor]
    if len(points) < 3:
        return None
    mean_t = sum(t for t, _ in points) / len(points)
    mean_e = sum(e for _, e in points) / len(points)
    return sum((t - mean_t) * (e - mean_e) for t, e in points) / sum((t - mean_t) ** 2 for t, _ in points)


def _slope_result(name: str, claimed: float, errors: Sequence[float], sample: Sample) -> CheckResult:
    """Turn errors over ``SLOPE_WINDOW`` into a result: how far the slope falls short of ``claimed``."""
    if not all(map(math.isfinite, errors)):
        return CheckResult(name, math.nan, SLOPE_TOLERANCE, "not finite")
    measured = slope(SLOPE_WINDOW, errors, 30.0 * torch.finfo(sample.dtype).eps)
    if measured is None:
        return CheckResult(name, max(errors), sample.tolerance, "exact to rounding")
    return CheckResult(name, claimed - measured, SLOPE_TOLERANCE, f"slope {measured:.2f}, claimed {claimed:g}")


def _time_derivative(curve: Callable[[float], Tensor], t: float, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Return the derivative of a curve by the five-point formula, and the relative error to allow for it."""
    eps = torch.finfo(dtype).eps
    h = eps**0.2
    near, far = curve(t + h) - curve(t - h), curve(t + 2 * h) - curve(t - 2 * h)
    return (8.0 * near - far) / (12.0 * h), 100.0 * eps**0.8


def check_feasibility(sample: Sample) -> CheckResult:
    """A random point and the nearest point to an ambient matrix satisfy the constraints."""
    m = sample.manifold
    violations = [m.violation(sample.x).max(), m.violation(m.nearest(sample.ambient)).max()]
    return CheckResult("feasibility", _largest(violations), sample.tolerance)


def check_nearest(sample: Sample) -> CheckResult:
    """The nearest point to a point is that point."""
    return CheckResult("nearest", difference(sample.manifold.nearest(sample.x), sample.x), sample.tolerance)


def check_tangency(sample: Sample) -> CheckResult:
    """Moving along a projected vector leaves the constraints at second order only: the violation has slope 2."""
    m = sample.manifold
    v = unit(m, sample.x, m.project(sample.x, sample.ambient))
    errors = [float(m.violation(sample.x + t * v).max()) for t in SLOPE_WINDOW]
    return _slope_result("tangency", 2.0, errors, sample)


def check_idempotence(sample: Sample) -> CheckResult:
    """Projecting twice is projecting once, and tangents stay."""
    m, x = sample.manifold, sample.x
    once = m.project(x, sample.ambient)
    errors = [difference(m.project(x, once), once), difference(m.project(x, sample.v), sample.v)]
    return CheckResult("idempotence", _largest(errors), sample.tolerance)


def check_self_adjointness(sample: Sample) -> CheckResult:
    """The projection is orthogonal in the metric: <P a, b> = <a, P b> for ambient a and b."""
    m, x, a, b = sample.manifold, sample.x, sample.ambient, sample.other
    left, right = m.inner(x, m.project(x, a), b), m.inner(x, a, m.project(x, b))
    return CheckResult("self-adjointness", difference(left, right), sample.tolerance)


def check_metric(sample: Sample) -> CheckResult:
    """The metric is symmetric, bilinear and positive on tangents, and the norm is its root."""
    m, x, u, v = sample.manifold, sample.x, sample.u, sample.v
    errors = [
        difference(m.inner(x, u, v), m.inner(x, v, u)),
        difference(m.inner(x, 2.0 * u - 3.0 * v, v), 2.0 * m.inner(x, u, v) - 3.0 * m.inner(x, v, v)),
        0.0 if bool((m.inner(x, v, v) > 0).all()) else math.inf,
        difference(m.norm(x, v).square(), m.inner(x, v, v)),
    ]
    return CheckResult("metric", _largest(errors), sample.tolerance)


def check_gradient(sample: Sample) -> CheckResult:
    """Riesz: the Riemannian gradient is tangent and <grad, v>_x = tr(G^T v) for every tangent v."""
    m, x, g = sample.manifold, sample.x, sample.ambient
    gradient = m.riemannian_gradient(x, g)
    errors = [difference(m.project(x, gradient), gradient)]
    errors += [difference(m.inner(x, gradient, v), euclidean_inner(g, v)) for v in (sample.u, sample.v)]
    return CheckResult("gradient", _largest(errors), sample.tolerance)


def check_dimension(sample: Sample) -> CheckResult:
    """The dimension is the trace of the projection (which is an orthogonal projection). Takes dp projections."""
    m = sample.manifold
    batch = sample.x.shape[:-2].numel()
    x = sample.x.reshape(batch, *sample.x.shape[-2:])[0]
    if x.numel() > 1024:
        return CheckResult("dimension", 0.0, 0.0, "more than 1024 entries; use a smaller shape", skipped=True)
    basis = torch.eye(x.numel(), dtype=x.dtype, device=x.device).reshape(-1, *x.shape)
    images = m.project(x.expand_as(basis), basis)
    measured = float(torch.diagonal(images.flatten(1)).sum())
    claimed = m.dimension(tuple(sample.x.shape)) / batch
    return CheckResult("dimension", abs(measured - claimed), sample.tolerance * x.numel())


def check_retraction(sample: Sample) -> CheckResult:
    """R(0) = x, results are feasible, and R(tv) = x + tv + O(t^2): the derivative at 0 is the identity."""
    m, x, v = sample.manifold, sample.x, sample.v
    start = difference(m.retract(x, torch.zeros_like(v)), x)
    feasible = _largest([m.violation(m.retract(x, t * v)).max() for t in SLOPE_WINDOW])
    if not max(start, feasible) <= sample.tolerance:
        return CheckResult("retraction", max(start, feasible), sample.tolerance, "R(0) = x, or feasibility")
    errors = [difference(m.retract(x, t * v), x + t * v) for t in SLOPE_WINDOW]
    return _slope_result("retraction", 2.0, errors, sample)


def check_retraction_order(sample: Sample) -> CheckResult:
    """The distance from the retraction to the exponential has slope order + 1 (or is rounding, for an infinite order).

    Without a closed exponential, and with the metric of the surrounding space, order 2 is checked by the acceleration
    at 0, which has no tangent part (Absil, Mahony, Sepulchre 2008, proposition 5.5.5).
    """
    m, x, v, name = sample.manifold, sample.x, sample.v, "retraction order"
    claimed = m.retraction_order
    try:
        errors = [gap(m, m.retract(x, t * v), m.exp(x, t * v)) for t in SLOPE_WINDOW]
    except NotImplementedError:
        return _check_acceleration(sample, name, claimed)
    if claimed == math.inf:
        return CheckResult(name, _largest(errors), sample.tolerance, "exponential")
    return _slope_result(name, claimed + 1.0, errors, sample)


def _check_acceleration(sample: Sample, name: str, claimed: float) -> CheckResult:
    """Check order 2 without an exponential: P (R(tv) - 2x + R(-tv)) / t^2 goes to 0 with slope 2."""
    m, x, v = sample.manifold, sample.x, sample.v
    if claimed < 2:
        return CheckResult(name, 0.0, 0.0, "order 1 is the retraction check", skipped=True)
    embedded = difference(m.inner(x, sample.ambient, v), euclidean_inner(sample.ambient, v)) <= sample.tolerance
    if not embedded:
        return CheckResult(name, 0.0, 0.0, "no closed exponential, and not the embedded metric", skipped=True)
    errors = [
        float(m.project(x, m.retract(x, t * v) - 2.0 * x + m.retract(x, -t * v)).abs().max()) for t in SLOPE_WINDOW
    ]
    # A tangent acceleration would show as slope 2; the next even term gives 4.
    return _slope_result(name, 4.0, errors, sample)


def check_long_steps(sample: Sample, lengths: Sequence[float] = LONG_STEPS) -> CheckResult:
    """Steps far too long, along a full and along a rank-one direction, give finite feasible points."""
    m, x = sample.manifold, sample.x
    left, right = sample.ambient[..., :, :1], sample.ambient[..., :1, :]
    directions = (sample.v, unit(m, x, m.project(x, left @ right)))
    ends = [m.retract(x, length * v) for v in directions for length in lengths]
    # Relative to the size of the point: on a manifold without bound it may have gone far.
    worst = _largest([m.violation(y).max() / y.abs().max().clamp(min=1.0) for y in ends])
    return CheckResult("long steps", worst, sample.tolerance, f"lengths up to {max(lengths):g}")


def check_transport(sample: Sample) -> CheckResult:
    """Transport is linear, lands in the tangent space, is the identity for y = x, and isometric if it says so."""
    m, x, u, v = sample.manifold, sample.x, sample.u, sample.v
    y = m.retract(x, 0.5 * u)
    moved_u, moved_v = m.transport(x, y, u), m.transport(x, y, v)
    errors = [
        difference(m.project(y, moved_v), moved_v),
        difference(m.transport(x, y, 2.0 * u - 3.0 * v), 2.0 * moved_u - 3.0 * moved_v),
        difference(m.transport(x, x, v), v),
    ]
    if m.isometric_transport:
        errors += [difference(m.inner(y, moved_u, moved_v), m.inner(x, u, v))]
        errors += [difference(m.inner(y, moved_v, moved_v), m.inner(x, v, v))]
    return CheckResult(
        "transport", _largest(errors), sample.tolerance, "isometric" if m.isometric_transport else "not isometric"
    )


def check_coordinates(sample: Sample) -> CheckResult:
    """The two changes of coordinates are inverse, and in coordinates the metric is Euclidean."""
    m, x, u, v = sample.manifold, sample.x, sample.u, sample.v
    a, b = m.coordinates(x, u), m.coordinates(x, v)
    errors = [difference(m.from_coordinates(x, b), v), difference(euclidean_inner(a, b), m.inner(x, u, v))]
    return CheckResult("coordinates", _largest(errors), sample.tolerance)


def check_exponential(sample: Sample) -> CheckResult:
    """The exponential is feasible, has constant speed, and goes on from halfway with the velocity it has there."""
    m, x, v, name = sample.manifold, sample.x, sample.v, "exponential"
    try:
        y = m.exp(x, v)
    except NotImplementedError:
        return CheckResult(name, 0.0, 0.0, "no closed exponential", skipped=True)
    halfway = m.exp(x, 0.5 * v)
    velocity, allowed = _time_derivative(lambda t: m.exp(x, t * v), 0.5, sample.dtype)
    errors = [float(m.violation(y).max()), difference(m.exp(x, torch.zeros_like(v)), x)]
    numeric = [
        difference(m.inner(halfway, velocity, velocity), m.inner(x, v, v)),
        gap(m, m.exp(halfway, 0.5 * m.project(halfway, velocity)), y),
    ]
    errors += [error * sample.tolerance / allowed for error in numeric]
    return CheckResult(name, _largest(errors), sample.tolerance)


def check_logarithm(sample: Sample) -> CheckResult:
    """log inverts exp on short tangents and exp inverts log; |log y| is the distance, which is symmetric.

    The squared distance is its square.
    """
    m, x, v, name = sample.manifold, sample.x, 0.5 * sample.v, "logarithm"
    try:
        y = m.exp(x, v)
        back, distance = m.log(x, y), m.distance(x, y)
    except NotImplementedError:
        return CheckResult(name, 0.0, 0.0, "no closed logarithm", skipped=True)
    errors = [
        difference(back, v),
        gap(m, m.exp(x, back), y),
        difference(m.inner(x, back, back).sqrt(), distance),
        difference(m.distance(y, x), distance),
        difference(distance, m.inner(x, v, v).sqrt()),
        difference(m.squared_distance(x, y), distance.square()),
    ]
    return CheckResult(name, _largest(errors), sample.tolerance)


def check_batch(sample: Sample) -> CheckResult:
    """A batch gives what its items give one by one, in every method."""
    m = sample.manifold
    methods: dict[str, Callable[..., Tensor]] = {
        "project": m.project,
        "riemannian_gradient": m.riemannian_gradient,
        "retract": m.retract,
        "coordinates": m.coordinates,
        "from_coordinates": m.from_coordinates,
    }
    d, p = sample.x.shape[-2:]
    x = torch.stack([sample.x.reshape(-1, d, p)[0], m.retract(sample.x, sample.v).reshape(-1, d, p)[0]])
    v = torch.stack([sample.v.reshape(-1, d, p)[0], m.project(x[1], sample.ambient.reshape(-1, d, p)[0])])
    errors = [
        difference(method(x, v), torch.stack([method(x[0], v[0]), method(x[1], v[1])])) for method in methods.values()
    ]
    y = m.retract(x, 0.3 * v)
    errors += [
        difference(m.transport(x, y, v), torch.stack([m.transport(x[i], y[i], v[i]) for i in range(2)])),
        difference(m.inner(x, v, v), torch.stack([m.inner(x[i], v[i], v[i]) for i in range(2)])),
        difference(m.violation(x), torch.stack([m.violation(x[i]) for i in range(2)])),
        difference(m.nearest(x), torch.stack([m.nearest(x[i]) for i in range(2)])),
    ]
    return CheckResult("batch", _largest(errors), sample.tolerance)


def check_derivatives(sample: Sample) -> CheckResult:
    """The retraction can be differentiated at v = 0 and along it, and agrees with finite differences.

    At v = 0 the derivative in v is the identity on the tangent space: <G, dR(0)[w]> = <G, w>.
    """
    m, x, g, w = sample.manifold, sample.x, sample.ambient, sample.u

    def value(v: Tensor) -> Tensor:
        return euclidean_inner(g, m.retract(x, v)).sum()

    at_zero = torch.func.grad(value)(torch.zeros_like(w))
    along = torch.func.grad(value)(0.3 * sample.v)
    numeric, allowed = _time_derivative(lambda t: value(0.3 * sample.v + t * w), 0.0, sample.dtype)
    errors = [
        difference((at_zero * w).sum(), (g * w).sum()),
        difference((along * w).sum(), numeric) * sample.tolerance / allowed,
    ]
    return CheckResult("derivatives", _largest(errors), sample.tolerance)


CHECKS: tuple[Callable[[Sample], CheckResult], ...] = (
    check_feasibility,
    check_nearest,
    check_tangency,
    check_idempotence,
    check_self_adjointness,
    check_metric,
    check_gradient,
    check_dimension,
    check_retraction,
    check_retraction_order,
    check_long_steps,
    check_transport,
    check_coordinates,
    check_exponential,
    check_logarithm,
    check_batch,
    check_derivatives,
)


def check_manifold(
    manifold: Manifold,
    shape: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float64,
    generator: torch.Generator | None = None,
    tolerance: float | None = None,
    checks: Sequence[Callable[[Sample], CheckResult]] = CHECKS,
    raise_on_failure: bool = True,
) -> ManifoldReport:
    """Run all checks on one manifold.

    Args:
        manifold: any implementation of the contract, a user's own included.
        shape: ``(..., d, p)``; small matrices are enough.
        dtype: float64 (sharp checks) or float32 (as the optimizer runs it).
        generator: where randomness comes from; seed 0 if not given.
        tolerance: allowed relative error; 1000 times the type's precision if not given.
        checks: which checks to run.
        raise_on_failure: raise at the end if a check failed, or leave that to the caller.

    Returns:
        The report, with every measured figure.

    Raises:
        ManifoldCheckError: a check failed; the message lists all that did.
        ValueError: the manifold does not accept the shape.
    """
    sample = draw(manifold, shape, dtype, generator, tolerance)
    report = ManifoldReport(manifold, tuple(shape), dtype, tuple(check(sample) for check in checks))
    if raise_on_failure:
        report.raise_on_failure()
    return report


def _largest(errors: Sequence[float | Tensor]) -> float:
    """Return the largest error; NaN if any is NaN, which ``max`` would lose."""
    values = [float(error) for error in errors]
    return math.nan if any(map(math.isnan, values)) else max(values)
