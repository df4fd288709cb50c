"""Problems on symmetric positive definite matrices: Karcher means, metric learning, covariance from incomplete samples.

*Karcher means.* minimise the mean over samples of d(M_y, S)^2, one matrix M_c a class, d the affine-invariant distance:
geodesically convex, so one minimum. Sources: Moakher, "A differential geometric approach to the geometric mean of
symmetric positive-definite matrices", SIAM J. Matrix Anal. 26 (2005); Tuzel, Porikli, Meer, "Region covariance: a fast
descriptor for detection and classification", ECCV 2006.

*Metric learning.* minimise tr(A S) + tr(A^{-1} D), S and D the second moments of differences within and between
classes. Source: Zadeh, Hosseini, Sra, "Geometric mean metric learning", ICML 2016: the minimum is at the geometric mean
of S^{-1} and D, and has the value 2 tr (S^{1/2} D S^{1/2})^{1/2}.

*Covariance from incomplete samples.* minimise the mean negative log-likelihood of the known entries of normal samples.
Source: Dempster, Laird, Rubin, "Maximum likelihood from incomplete data via the EM algorithm", J. R. Stat. Soc. B 39
(1977).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from subspace_meta.geometry import Geometry, Params
from subspace_meta.manifolds import SPD, SPDExponential
from subspace_meta.manifolds.base import identity_like
from subspace_meta.tasks.base import (
    Batch,
    Data,
    Problem,
    TaskFamily,
    draw_epochs,
    draw_indices,
    draw_rows,
    once_per_task,
    symmetric_matrix,
)
from subspace_meta.tasks.classification import split
from subspace_meta.tasks.references import reference_by_descent


def squared_log_norm(a: Tensor) -> Tensor:
    """Return |log A|^2 of symmetric positive definite ``(..., n, n)`` matrices; NaN where A is not finite.

    The gradient of a sum over eigenvalues divides by no eigenvalue gap, so first derivatives are right at equal
    eigenvalues; second ones are not. LAPACK raises at a non-finite matrix, which one diverged run in a ``vmap`` would
    bring upon all others: such a matrix is replaced.
    """
    finite = torch.isfinite(a).all(dim=-1).all(dim=-1)
    safe = torch.where(finite[..., None, None], a, identity_like(a))
    values = torch.linalg.eigvalsh(safe)
    floor = torch.finfo(a.dtype).eps * values.detach()[..., -1:].abs().clamp(min=torch.finfo(a.dtype).tiny)
    logs = torch.maximum(values, floor).log()
    return torch.where(finite, logs.square().sum(dim=-1), torch.nan)


def karcher_loss(params: Params, batch: Batch) -> Tensor:
    """Return the mean squared distance of samples, given as S^{-1/2} and one-hot classes, to their class's mean."""
    means, roots = params["means"], batch["roots"]
    # A product with the one-hot classes, not an index: its derivative is a product again, not a scatter.
    mine = (batch["one_hot"] @ means.flatten(1)).reshape(-1, *means.shape[-2:])
    a = roots @ mine @ roots
    return squared_log_norm(0.5 * (a + a.mT)).mean()


def mean_error(params: Params, data: Data) -> Tensor:
    """Return the root mean square distance of the class means to the best ones, given as roots."""
    roots = data["solution_roots"]
    a = roots @ params["means"] @ roots
    return squared_log_norm(0.5 * (a + a.mT)).mean().sqrt()


@functools.cache
def karcher_problem(classes: int, n: int) -> Problem:
    """Return the problem of one size. Its starts are far away, where only the exponential map takes long steps well."""
    manifold = SPD(SPDExponential())
    geometry = Geometry.from_rules({"means": torch.empty(classes, n, n, device="meta")}, {"means": manifold})
    return Problem(geometry, karcher_loss, karcher_loss, mean_error)


def inverse_root(s: Tensor) -> Tensor:
    """Return S^{-1/2}."""
    values, vectors = torch.linalg.eigh(s)
    return (vectors * values.rsqrt()[..., None, :]) @ vectors.mT


def identities(count: int, classes: int, n: int, device: torch.device) -> Params:
    """Return the start of ``count`` tasks: identities ``(count, classes, n, n)``."""
    return {"means": torch.eye(n, device=device).expand(count, classes, n, n)}


def karcher_means(roots: Tensor, one_hot: Tensor, iterations: int = 50) -> Tensor:
    """Return the Karcher mean of each class by the fixed-point iteration of Moakher 2005, in float64.

    Takes S^{-1/2} ``(N, n, n)`` and one-hot classes ``(N, c)``. Starts at the mean of the matrices' logarithms.
    """

    def function(a: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
        values, vectors = torch.linalg.eigh(a)
        return (vectors * f(values)[..., None, :]) @ vectors.mT

    share = one_hot.mT / one_hot.sum(dim=0)[:, None]  # (c, N)
    label = one_hot.argmax(dim=-1)
    samples = function(roots, lambda values: values**-2.0)
    means = function((share @ function(samples, torch.log).flatten(1)).reshape(-1, *roots.shape[-2:]), torch.exp)
    for _ in range(iterations):
        root, inverse = function(means, torch.sqrt), inverse_root(means)
        logs = function(inverse[label] @ samples @ inverse[label], torch.log)
        step = (share @ logs.flatten(1)).reshape(-1, *roots.shape[-2:])
        means = root @ function(step, torch.exp) @ root
    return means


@functools.cache
def _karcher_data(load: Callable[[], tuple[Tensor, Tensor]]) -> Data:
    """Return the entries of the one task of a data set: the means of 20 classes take a second."""
    samples, labels = load()
    roots = inverse_root(samples.double())
    one_hot = F.one_hot(labels).double()
    means = karcher_means(roots, one_hot)
    reference = karcher_loss({"means": means}, {"roots": roots, "one_hot": one_hot})
    values = {"roots": roots, "one_hot": one_hot, "solution_roots": inverse_root(means), "reference": reference}
    return {name: value.float() for name, value in values.items()}


@dataclass(frozen=True)
class KarcherMeans(TaskFamily):
    """One Karcher mean a class, all starting at the identity.

    The reference is the minimum, computed in float64; the metric is the distance to the means that attain it.

    Attributes:
        source: name of the data set, for tables.
        load: cached function that returns matrices ``(N, n, n)`` and labels ``(N,)``.
        classes: number of classes.
        n: size of the matrices.
        epochs: draw each matrix once an epoch (of one call) instead of with replacement.
    """

    source: str
    load: Callable[[], tuple[Tensor, Tensor]]
    classes: int
    n: int
    batch_size: int = 64
    epochs: bool = False

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name with the size."""
        return f"Karcher means of {self.source} {self.classes}x{self.n}x{self.n}"

    @property
    def problem(self) -> Problem:  # type: ignore[override]
        """The problem of this size."""
        return karcher_problem(self.classes, self.n)

    def draw(self, generator: torch.Generator, count: int) -> Data:
        """Return the matrices, once a task."""
        return once_per_task(_karcher_data(self.load), count)

    def sample(self, data: Data, generator: torch.Generator, steps: int) -> Batch:
        """Draw matrices."""
        draw = draw_epochs if self.epochs else draw_indices
        return draw_rows(data, ("roots", "one_hot"), self.batch_size, generator, steps, draw)

    def init(self, data: Data, generator: torch.Generator) -> Params:
        """Return identities."""
        return identities(len(data["reference"]), self.classes, self.n, generator.device)


def _inverse_moment(a: Tensor, moment: Tensor) -> Tensor:
    """Return tr(A^{-1} D); meaningless, but without an exception, where A has no Cholesky factor."""
    return torch.cholesky_solve(moment, torch.linalg.cholesky_ex(a).L).diagonal().sum()


def metric_loss(params: Params, batch: Batch) -> Tensor:
    """Return tr(A S) + tr(A^{-1} D) for differences ``within`` and ``between`` classes, ``(B, n)`` each."""
    within, between = (batch[name].mT @ batch[name] / batch[name].shape[0] for name in ("within", "between"))
    return (params["a"] * within).sum() + _inverse_moment(params["a"], between)


def metric_objective(params: Params, data: Data) -> Tensor:
    """Return tr(A S) + tr(A^{-1} D) for the moments of all pairs."""
    return (params["a"] * data["within_moment"]).sum() + _inverse_moment(params["a"], data["between_moment"])


def metric_accuracy(params: Params, data: Data) -> Tensor:
    """Return the share of test samples whose nearest class mean, in the metric A, is the right one."""
    samples, means, a = data["test_inputs"], data["means"], params["a"]
    scores = samples @ a @ means.mT - 0.5 * (means * (means @ a)).sum(dim=-1)
    return (scores.argmax(dim=-1) == data["test_labels"]).float().mean()


@functools.cache
def metric_problem(n: int) -> Problem:
    """Return the problem of one size."""
    geometry = Geometry.from_rules({"a": torch.empty(n, n, device="meta")}, {"a": SPD()})
    return Problem(geometry, metric_loss, metric_objective, metric_accuracy)


@dataclass(frozen=True)
class MetricLearning(TaskFamily):
    """Mahalanobis metric on the n leading principal components of a data set, from random pairs of samples.

    The metric is a test accuracy.

    Attributes:
        source: name of the data set, for tables.
        load: cached function that returns inputs and labels; every fifth sample is the test set.
        n: number of principal components.
        pairs: number of pairs within classes, and between classes.
    """

    source: str
    load: Callable[[], tuple[Tensor, Tensor]]
    n: int
    pairs: int = 1000
    batch_size: int = 64

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name with the size."""
        return f"metric learning on {self.source} {self.n}x{self.n}"

    @property
    def problem(self) -> Problem:  # type: ignore[override]
        """The problem of this size."""
        return metric_problem(self.n)

    def draw(self, generator: torch.Generator, count: int) -> Data:
        """Draw pairs."""
        inputs, labels, test_inputs, test_labels = split(*self.load())
        components = torch.linalg.eigh(inputs.mT @ inputs)[1][:, -self.n :]
        inputs, test_inputs = inputs @ components, test_inputs @ components
        scale = inputs.square().mean().sqrt()
        inputs, test_inputs = inputs / scale, test_inputs / scale
        one_hot = F.one_hot(labels).float()
        same = (one_hot @ one_hot.mT).bool()
        pairs = []
        for wanted in (same & ~torch.eye(len(inputs), dtype=torch.bool, device=inputs.device), ~same):
            left, right = wanted.nonzero(as_tuple=True)
            chosen = torch.randint(len(left), (count, self.pairs), generator=generator, device=generator.device)
            pairs.append(inputs[left[chosen]] - inputs[right[chosen]])
        moments = [z.double().mT @ z.double() / self.pairs for z in pairs]
        values, vectors = torch.linalg.eigh(moments[0])
        root = (vectors * values.sqrt()[:, None, :]) @ vectors.mT
        spectrum = torch.linalg.eigvalsh(root @ moments[1] @ root)
        means = (one_hot.mT @ inputs) / one_hot.sum(dim=0)[:, None]
        common = {"means": means, "test_inputs": test_inputs, "test_labels": test_labels}
        return {
            "within": pairs[0],
            "between": pairs[1],
            "within_moment": moments[0].float(),
            "between_moment": moments[1].float(),
            **once_per_task(common, count),
            "reference": 2.0 * spectrum.sqrt().sum(dim=-1).float(),
        }

    def sample(self, data: Data, generator: torch.Generator, steps: int) -> Batch:
        """Draw pairs of each kind, with replacement."""
        return draw_rows(data, ("within", "between"), self.batch_size, generator, steps)

    def measured(self, data: Data) -> Data:
        """Return moments and test samples."""
        return {name: value for name, value in data.items() if name not in ("within", "between")}


def incomplete_likelihood(params: Params, batch: Batch) -> Tensor:
    """Return the mean of (log det S_o + z_o^T S_o^{-1} z_o) / 2, o the known entries of each sample.

    S_o is held as the full matrix with unit rows where nothing is known: same determinant, same quadratic form.
    """
    z, mask, covariance = batch["z"], batch["mask"], params["covariance"]
    known = mask[:, :, None] * mask[:, None, :] * covariance + torch.diag_embed(1.0 - mask)
    factor = torch.linalg.cholesky_ex(known).L
    whitened = torch.linalg.solve_triangular(factor, (mask * z)[:, :, None], upper=False)
    log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum()
    return (log_det + 0.5 * whitened.square().sum()) / z.shape[0]


def kullback_leibler(params: Params, data: Data) -> Tensor:
    """Return the divergence of N(0, covariance) from N(0, truth), given the truth's inverse and determinant."""
    product = data["precision"] @ params["covariance"]
    log_det = 2.0 * torch.linalg.cholesky_ex(params["covariance"]).L.diagonal().log().sum()
    return 0.5 * (product.diagonal().sum() - log_det + data["log_det"] - product.shape[-1])


@functools.cache
def incomplete_problem(n: int) -> Problem:
    """Return the problem of one size."""
    geometry = Geometry.from_rules({"covariance": torch.empty(n, n, device="meta")}, {"covariance": SPD()})
    return Problem(geometry, incomplete_likelihood, incomplete_likelihood, kullback_leibler)


@dataclass(frozen=True)
class IncompleteCovariance(TaskFamily):
    """Covariance of normal samples of which each entry is missing with probability ``missing``.

    Eigenvalues are 0.1 to 10. The reference is what descent in float64 reaches from the true covariance: the best known
    value. The metric is the divergence from the true distribution.
    """

    n: int
    samples: int = 500
    missing: float = 0.3
    batch_size: int = 64

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name with the size."""
        return f"covariance with missing data {self.n}x{self.n}"

    @property
    def problem(self) -> Problem:  # type: ignore[override]
        """The problem of this size."""
        return incomplete_problem(self.n)

    def draw(self, generator: torch.Generator, count: int) -> Data:
        """Draw covariances, samples and masks."""
        spectrum = torch.logspace(-1.0, 1.0, self.n, dtype=torch.float64, device=generator.device).expand(count, -1)
        truth, basis = symmetric_matrix(spectrum, generator)
        noise = torch.randn(count, self.samples, self.n, generator=generator, device=generator.device)
        z = noise @ (basis * spectrum.sqrt()[:, None, :]).float().mT
        mask = (
            torch.rand(count, self.samples, self.n, generator=generator, device=generator.device) >= self.missing
        ).float()
        data = {"z": z, "mask": mask}
        return {
            **data,
            "precision": torch.linalg.inv(truth).float(),
            "log_det": spectrum.log().sum(dim=-1).float(),
            "reference": reference_by_descent(self.problem, {"covariance": truth}, data).float(),
        }

    def sample(self, data: Data, generator: torch.Generator, steps: int) -> Batch:
        """Draw samples, with replacement."""
        return draw_rows(data, ("z", "mask"), self.batch_size, generator, steps)
