"""Every retraction written down again in mpmath, as the textbooks have it and by other algorithms than the library's.

``REFERENCES`` maps the class of a retraction to a function of mpmath matrices. Directional derivatives are central
differences with 80 digits and a step of 1e-20, so they are right to about 40 digits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from mpmath import eye, matrix, mp, mpf

from subspace_meta.manifolds import (
    Cayley,
    CholeskyQR,
    Geodesic,
    HouseholderQR,
    Normalization,
    PolarNewtonSchulz,
    SPDExponential,
    SPDSecondOrder,
    SphereExponential,
)

mp.dps = 80
STEP = mpf(10) ** -20


def to_mp(a: torch.Tensor) -> matrix:
    return matrix(a.double().tolist())


def to_torch(a: matrix) -> torch.Tensor:
    return torch.tensor([[float(a[i, j]) for j in range(a.cols)] for i in range(a.rows)], dtype=torch.float64)


def symmetric_function(a: matrix, f: Callable[[mpf], mpf]) -> matrix:
    """V f(D) V^T of a symmetric matrix."""
    values, vectors = mp.eigsy(a)
    scaled = vectors.copy()
    for j in range(a.cols):
        for i in range(a.rows):
            scaled[i, j] = vectors[i, j] * f(values[j])
    return scaled * vectors.T


def qr(x: matrix, v: matrix) -> matrix:
    """Gram-Schmidt."""
    y = x + v
    q = y.copy()
    for j in range(y.cols):
        column = y[:, j]
        for k in range(j):
            column = column - q[:, k] * (q[:, k].T * y[:, j])[0]
        q[:, j] = column / mp.sqrt((column.T * column)[0])
    return q


def polar(x: matrix, v: matrix) -> matrix:
    y = x + v
    return y * symmetric_function(y.T * y, lambda t: 1 / mp.sqrt(t))


def generator_of(x: matrix, v: matrix) -> matrix:
    """W = P V X^T - X V^T P with P = I - X X^T / 2, d x d, as Wen and Yin have it."""
    p = eye(x.rows) - x * x.T / 2
    return p * v * x.T - x * v.T * p


def cayley(x: matrix, v: matrix) -> matrix:
    half = generator_of(x, v) / 2
    return mp.inverse(eye(x.rows) - half) * (eye(x.rows) + half) * x


def expm(a: matrix) -> matrix:
    """Scaling and squaring of the Taylor series, 40 digits and more."""
    squarings = max(0, int(mp.ceil(mp.log(mp.mnorm(a, 1) + mpf(10) ** -30, 2))) + 12)
    small = a / mpf(2) ** squarings
    total = term = eye(a.rows)
    for k in range(1, 22):
        term = term * small / k
        total = total + term
    for _ in range(squarings):
        total = total * total
    return total


def canonical(x: matrix, v: matrix) -> matrix:
    return expm(generator_of(x, v)) * x


def embedded(x: matrix, v: matrix) -> matrix:
    """exp(V X^T - X V^T) X exp(-X^T V): the geodesic in its d x d form (Edelman, Arias, Smith 1998)."""
    return expm(v * x.T - x * v.T) * x * expm(-(x.T * v))


def normalization(x: matrix, v: matrix) -> matrix:
    y = x + v
    return y / mp.sqrt(mp.fsum(e * e for e in y))


def great_circle(x: matrix, v: matrix) -> matrix:
    length = mp.sqrt(mp.fsum(e * e for e in v))
    y = x if length == 0 else x * mp.cos(length) + v * (mp.sin(length) / length)
    return y / mp.sqrt(mp.fsum(e * e for e in y))


def spd_second_order(x: matrix, v: matrix) -> matrix:
    return x + v + v * mp.inverse(x) * v / 2


def spd_exponential(x: matrix, v: matrix) -> matrix:
    return x * expm(mp.inverse(x) * v)


def reference_of(retraction: object) -> Callable[[matrix, matrix], matrix]:
    """Return the reference of a retraction value."""
    if isinstance(retraction, Geodesic):
        return embedded if retraction.metric == "embedded" else canonical
    return {
        CholeskyQR: qr,
        HouseholderQR: qr,
        PolarNewtonSchulz: polar,
        Cayley: cayley,
        Normalization: normalization,
        SphereExponential: great_circle,
        SPDSecondOrder: spd_second_order,
        SPDExponential: spd_exponential,
    }[type(retraction)]


def derivatives(f: Callable[[matrix], matrix], u: matrix, w: matrix) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return f(u), the first and the second derivative of t -> f(u + tw) at 0, in float64."""
    here, ahead, behind = f(u), f(u + STEP * w), f(u - STEP * w)
    first = (ahead - behind) / (2 * STEP)
    second = (ahead - 2 * here + behind) / STEP**2
    return to_torch(here), to_torch(first), to_torch(second)
