"""Blind deconvolution: one filter that makes all observed signals sparse.

The signals are y_i = a * x_i (circular), one unknown kernel a and sparse x_i. minimise the mean over signals and
positions of sqrt(u^2 + eps^2) - eps, u = q * P y_i, over filters q on the unit sphere; P is the filter that makes the
spectrum of the observations flat, as whitening does for independent components. Up to sign every shift of q is as good
as q. Sources: Li and Bresler, "Global geometry of multichannel sparse blind deconvolution on the sphere", NeurIPS 2018;
Qu, Li, Zhu, "A nonconvex approach for exact and efficient multichannel sparse blind deconvolution", NeurIPS 2019.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from subspace_meta.geometry import Geometry, Params
from subspace_meta.manifolds import Sphere
from subspace_meta.tasks.base import Batch, Data, Problem, TaskFamily, draw_rows
from subspace_meta.tasks.references import reference_by_descent

SMOOTHING = 0.05


def convolved(a: Tensor, b: Tensor) -> Tensor:
    """Return the circular convolution along the last dimension."""
    return torch.fft.irfft(torch.fft.rfft(a) * torch.fft.rfft(b), n=a.shape[-1])


def filtered_sparsity(params: Params, batch: Batch) -> Tensor:
    """Return the mean of sqrt(u^2 + eps^2) - eps for u = q * z, whitened signals ``z`` ``(B, n)``."""
    u = convolved(batch["z"], params["q"])
    return ((u.square() + SMOOTHING**2).sqrt() - SMOOTHING).mean()


def spike_error(params: Params, data: Data) -> Tensor:
    """Return 1 - max|r| / |r| for the response r of the filter to the whitened kernel, a spike if all is found."""
    response = convolved(data["kernel"], params["q"])
    return 1.0 - response.abs().amax() / response.square().sum().sqrt()


@functools.cache
def deconvolution_problem(n: int) -> Problem:
    """Return the problem of one size."""
    geometry = Geometry.from_rules({"q": torch.empty(n, device="meta")}, {"q": Sphere()})
    return Problem(geometry, filtered_sparsity, filtered_sparsity, spike_error)


@dataclass(frozen=True)
class BlindDeconvolution(TaskFamily):
    """Signals of n moments, a share ``density`` of normal spikes in each; mini-batches are signals.

    The reference is what descent in float64 reaches from the inverse of the kernel: the best known value. The metric is
    one minus the share of the largest entry in what becomes of a single spike.
    """

    n: int
    signals: int = 400
    density: float = 0.15
    noise: float = 0.02
    batch_size: int = 16

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name with the size."""
        return f"blind deconvolution {self.n}"

    @property
    def problem(self) -> Problem:  # type: ignore[override]
        """The problem of this size."""
        return deconvolution_problem(self.n)

    def draw(self, generator: torch.Generator, count: int) -> Data:
        """Draw kernels, which fade over a quarter of the moments, and signals."""
        shape = (count, self.signals, self.n)
        fading = torch.exp(-8.0 * torch.arange(self.n) / self.n)
        kernel = fading * torch.randn(count, self.n, generator=generator)
        spikes = torch.randn(*shape, generator=generator) * (torch.rand(*shape, generator=generator) < self.density)
        y = convolved(spikes, kernel[:, None]) + self.noise * torch.randn(*shape, generator=generator)
        power = torch.fft.rfft(y).abs().square().mean(dim=1)
        whitening = torch.fft.irfft(power.rsqrt().to(torch.complex64), n=self.n) * self.n**0.5
        z, kernel = convolved(y, whitening[:, None]), convolved(kernel, whitening)
        inverse = torch.fft.irfft(torch.fft.rfft(kernel).reciprocal(), n=self.n)
        start = inverse / torch.linalg.vector_norm(inverse, dim=-1, keepdim=True)
        reference = reference_by_descent(self.problem, {"q": start}, {"z": z}).float()
        return {"z": z, "kernel": kernel, "reference": reference}

    def sample(self, data: Data, generator: torch.Generator, steps: int) -> Batch:
        """Draw signals, with replacement."""
        return draw_rows(data, ("z",), self.batch_size, generator, steps)
