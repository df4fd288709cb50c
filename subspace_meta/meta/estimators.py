"""Estimators of the meta-gradient: back-propagation, evolution strategies, implicit differentiation.

All have one signature. An inner problem of T steps is cut into *segments*; an estimator is started at the beginning of
the inner problem, is called once a segment, and hands its carry from call to call. Each call returns an estimate of the
derivative of the segment's outer loss, averaged over tasks. What it is an estimate *of* differs:

* Backpropagation: the derivative itself, as far back as the segment's start (exact if the segment is all of T).
* EvolutionStrategies: the segment's loss, smoothed, its start a constant (unbiased for all of T only as one segment).
* PersistentES: the loss of all T steps, smoothed by independent perturbations of the segments.
* SinglePerturbationES: the loss of all T steps, smoothed by one common perturbation.
* ImplicitDifferentiation: the derivative at a fixed point, by some terms of a series.

*Smoothed* is the mean over normal perturbations of theta with standard deviation ``sigma``; for the loss itself all
three are off by O(sigma^2). What is unbiased is the sum of the estimates of all segments as long as theta stays the
same: if theta moves on between segments, states and sums of perturbations belong to older theta (hysteresis).
Everything random comes from the given generator. All tasks share the perturbations.
"""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from subspace_meta.adapter.network import Weights
from subspace_meta.geometry import Geometry, Params
from subspace_meta.meta.compiling import compile_block
from subspace_meta.meta.isolation import segment_gradient
from subspace_meta.meta.unroll import Carry, InnerLoop, block_of, steps_of, windows
from subspace_meta.tasks.base import Batch, Data

_Block = Callable[[Weights, Carry, Batch, Data], tuple[Carry, Tensor]]


class Segment(NamedTuple):
    """The steps that one call looks at.

    Attributes:
        batches: mini-batches, leading dimensions ``(steps, tasks)``; the steps are a multiple of the loop's block.
        data: what the objective needs, leading dimension ``(tasks,)``.
        outer_loss: objectives ``(steps, tasks)`` to the loss of each task ``(tasks,)``, pure and differentiable; their
            mean over tasks is the outer loss.
    """

    batches: Batch
    data: Data
    outer_loss: Callable[[Tensor], Tensor]


class Estimate(NamedTuple):
    """What a call returns.

    Attributes:
        gradient: names and shapes of the meta-parameters.
        carry: for the next segment.
        metrics: ``"loss"``, the mean outer loss, and ``"non_finite_tasks"``, how many tasks are not finite. These are
            left out of gradient and loss (back-propagation: see :mod:`subspace_meta.meta.isolation`); only implicit
            differentiation counts them and leaves its loss non-finite. Where no task is left the gradient is NaN.
    """

    gradient: Weights
    carry: Any
    metrics: dict[str, float]


@dataclass(frozen=True)
class Estimator(abc.ABC):
    """What every estimator offers.

    Attributes:
        loop: the inner loop. Evolution strategies look at neither ``first_order`` nor ``interval``.
    """

    loop: InnerLoop

    def start(self, theta: Weights, params: Params, generator: torch.Generator) -> Any:
        """Return the carry at starting points, leading dimension ``(tasks,)``; how it depends on theta is not seen."""
        return self.loop.start(theta, params)

    @abc.abstractmethod
    def __call__(self, theta: Weights, segment: Segment, carry: Any, generator: torch.Generator) -> Estimate:
        """Estimate the meta-gradient of one segment.

        Raises:
            ValueError: there are no steps, their number is not a multiple of the loop's block, or the outer loss has
                not the shape ``(tasks,)``.
        """


@dataclass(frozen=True)
class Backpropagation(Estimator):
    """Back-propagation through the segment (Werbos 1990; for learned optimizers Andrychowicz et al. 2016).

    One segment over all steps gives the exact derivative. Segments one after the other are truncated back-propagation:
    the carry at a segment's start is a constant, a bias that does not average out (Wu et al. 2018; Metz et al. 2019).
    With ``loop.first_order`` inner gradients are constants as well.
    """

    def __call__(self, theta: Weights, segment: Segment, carry: Carry, generator: torch.Generator) -> Estimate:
        """See :class:`Estimator`."""
        outer_loss = functools.partial(_losses, segment)
        found = segment_gradient(self.loop, theta, carry, segment.batches, segment.data, outer_loss)
        metrics = {"loss": float(found.loss), "non_finite_tasks": float(found.spoiled.sum())}
        return Estimate(found.theta, found.carry, metrics)


@dataclass(frozen=True)
class _Evolution(Estimator):
    """Settings of antithetic evolution strategies; ``ValueError`` if they are out of range.

    Attributes:
        sigma: standard deviation of a perturbation, positive and finite.
        pairs: perturbations, at least 1, each used with both signs; each particle (pair and sign) runs all tasks.
    """

    sigma: float
    pairs: int

    def __post_init__(self) -> None:
        if not 0.0 < self.sigma < math.inf:
            raise ValueError(f"sigma must be positive and finite, got {self.sigma}")
        if self.pairs < 1:
            raise ValueError(f"evolution strategies need at least one pair, got {self.pairs}")

    def _draw(self, theta: Weights, generator: torch.Generator) -> Weights:
        """Draw perturbations ``(pairs, ...)``, the same ones for every type and device of theta."""
        draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64, device=generator.device)
        return {name: self.sigma * draw((self.pairs, *value.shape)).to(value) for name, value in theta.items()}

    def _go_on(self, theta: Weights, segment: Segment, particles: Carry, noise: Weights, weights: Weights) -> Estimate:
        """Run each particle on from its own state, perturbed by ``noise``; weight the loss differences."""
        after, losses = _run_particles(self.loop, _both(theta, noise), particles, segment)
        metrics = _metrics(losses, losses[losses.isfinite()])
        return Estimate(_correlate(weights, losses, self.sigma), Particles(after, weights), metrics)


@dataclass(frozen=True)
class EvolutionStrategies(_Evolution):
    """Antithetic evolution strategies over one segment: the mean of eps (L(theta + eps) - L(theta - eps)) / 2 sigma^2.

    Unbiased for the gradient of E L(theta + eps), eps ~ N(0, sigma^2), where L is the loss of *this segment* from the
    given carry (Salimans et al. 2017; Nesterov and Spokoiny 2017). All particles start from this carry, which moves on
    with the unperturbed theta: how later starts depend on theta is missed. The loss in the metrics is the unperturbed.
    """

    def __call__(self, theta: Weights, segment: Segment, carry: Carry, generator: torch.Generator) -> Estimate:
        """See :class:`Estimator`."""
        noise = self._draw(theta, generator)
        # The unperturbed theta is one more particle: it shares the compiled code and the launches.
        perturbed = {k: torch.cat([v, theta[k].detach()[None]]) for k, v in _both(theta, noise).items()}
        after, losses = _run_particles(self.loop, perturbed, _spread(carry, 2 * self.pairs + 1), segment)
        metrics = _metrics(losses[:-1], losses[-1][losses[-1].isfinite()])
        carry = pytree.tree_map(lambda leaf: leaf[-1].clone(), after)
        return Estimate(_correlate(noise, losses[:-1], self.sigma), carry, metrics)


class Particles(NamedTuple):
    """Carries ``(2 pairs, tasks, ...)``, plus signs first; sums of the plus signs' perturbations ``(pairs, ...)``."""

    carry: Carry
    weights: Weights


@dataclass(frozen=True)
class PersistentES(_Evolution):
    """Persistent evolution strategies (Vicol, Metz and Sohl-Dickstein 2021), antithetic.

    Each segment t draws a new eps_t and runs each particle on from its own state; the loss is multiplied by the sum
    xi_t = eps_1 + ... + eps_t instead of eps_t, which makes up for truncation. The sum over segments is unbiased for
    the gradient of E sum_t L_t(theta + eps_1, ..., theta + eps_t): the loss of all steps, smoothed by *independent*
    perturbations of the segments. With their number the variance grows where the first ones decide all later losses.
    """

    def start(self, theta: Weights, params: Params, generator: torch.Generator) -> Particles:
        """Return all particles at the starting points, and sums of nothing."""
        zero = {name: value.detach().new_zeros(self.pairs, *value.shape) for name, value in theta.items()}
        return Particles(_spread(self.loop.start(theta, params), 2 * self.pairs), zero)

    def __call__(self, theta: Weights, segment: Segment, carry: Particles, generator: torch.Generator) -> Estimate:
        """See :class:`Estimator`."""
        noise = self._draw(theta, generator)
        accumulated = {name: carry.weights[name] + value for name, value in noise.items()}
        return self._go_on(theta, segment, carry.carry, noise, accumulated)


@dataclass(frozen=True)
class SinglePerturbationES(_Evolution):
    """Evolution strategies with one perturbation for the whole inner problem (ES-Single: Vicol, Kolter, Swersky 2023).

    The perturbation is drawn at the start and kept; each particle runs on from its own state. The sum over segments is
    unbiased for the gradient of E L(theta + eps), L the loss of *all* steps: plain evolution strategies over the full
    horizon, handed out in parts. So its variance does not depend on the number of segments.
    """

    def start(self, theta: Weights, params: Params, generator: torch.Generator) -> Particles:
        """Return all particles at the starting points, and their perturbations."""
        return Particles(_spread(self.loop.start(theta, params), 2 * self.pairs), self._draw(theta, generator))

    def __call__(self, theta: Weights, segment: Segment, carry: Particles, generator: torch.Generator) -> Estimate:
        """See :class:`Estimator`."""
        return self._go_on(theta, segment, carry.carry, carry.weights, carry.weights)


@dataclass(frozen=True)
class ImplicitDifferentiation(Estimator):
    """The derivative of a fixed point by some terms of its series (Lorraine et al. 2020; Fan et al. 2022).

    Let Z = (X, S) be parameters and optimizer state, Z+ = Phi(Z; theta) one step, Z* = Phi(Z*; theta). Differentiating
    gives (I - A) dZ* = B dtheta with A = dPhi/dZ, B = dPhi/dtheta. For an outer loss with gradient v_0 (zero on the
    state) dL = <v_0, (I - A)^{-1} B dtheta>. With the series of the inverse the meta-gradient is

        B^T sum_{k < K} (A^T)^k v_0,    missing B^T (A^T)^K (I - A^T)^{-1} v_0:  smaller by |A| with each term.

    A maps the tangent space at X to that at X+, so A^T v = P_X J^T P_{X+} v with J the ambient Jacobian and P the
    orthogonal projections (on Grassmann: on horizontal spaces). At a fixed point P changes no result, as B dtheta is
    tangent; but what is normal, and stands for nothing, could still grow. Away from it P identifies the two spaces.

    Phi is linearised at the segment's last step with its mini-batch; v_0 is taken after it, as if all objectives of the
    segment were its last. At a fixed point K terms are back-propagation through K steps; elsewhere the first term is,
    and the others are biased. A critical point is fixed whatever an optimizer's meta-parameters are: there the limit is
    0. (And a Riemannian gradient that is nothing but rounding errors is taken for 0, with its derivative.)

    Attributes:
        loop: the inner loop; with ``first_order`` A is no contraction, and the series has no limit.
        terms: K, at least 1 (else ``ValueError``); each costs a backward pass through one step.
    """

    terms: int

    def __post_init__(self) -> None:
        if self.terms < 1:
            raise ValueError(f"the series needs at least one term, got {self.terms}")

    def __call__(self, theta: Weights, segment: Segment, carry: Carry, generator: torch.Generator) -> Estimate:
        """See :class:`Estimator`."""
        loop, theta = self.loop, {name: value.detach() for name, value in theta.items()}
        (steps, count), single = _size(loop, segment.batches), replace(loop, block=1)
        earlier, last = (
            {name: b[part] for name, b in segment.batches.items()} for part in (slice(steps - 1), steps - 1)
        )
        with torch.no_grad():
            carry, objectives = _advance(single, block_of(single, count), theta, carry, earlier, segment.data)

        def outer(params: Params) -> Tensor:
            return _losses(segment, loop.objective(params, segment.data).expand(steps, count)).mean()

        step = functools.partial(loop.step, batch=last, data=segment.data)
        after, adjoint, values = cast(Any, torch.func.vjp)(step, theta, carry, has_aux=True)
        geometry = loop.problem.geometry.stacked(count)
        first = _tangent(geometry, after.params, torch.func.grad(outer)(after.params))
        term = Carry(first, pytree.tree_map(torch.zeros_like, after.state))
        total = {name: torch.zeros_like(value) for name, value in theta.items()}
        for _ in range(self.terms):
            to_theta, back = adjoint(term)
            total = {name: value + to_theta[name] for name, value in total.items()}
            term = Carry(_tangent(geometry, after.params, _tangent(geometry, carry.params, back.params)), back.state)
        losses = _losses(segment, torch.cat([*objectives, values[None]]))
        return Estimate(total, after, _metrics(losses, losses))


def _size(loop: InnerLoop, batches: Batch) -> tuple[int, int]:
    """Return how many steps and tasks there are."""
    return steps_of(loop, batches), next(iter(batches.values())).shape[1]


def _losses(segment: Segment, objectives: Tensor) -> Tensor:
    """Return the outer loss of each task, ``(tasks,)``."""
    losses = segment.outer_loss(objectives)
    expected, found = tuple(objectives.shape[1:]), tuple(losses.shape)
    if found != expected:
        raise ValueError(f"the outer loss must be one number for each task, of shape {expected}, got {found}")
    return losses


def _metrics(losses: Tensor, shown: Tensor) -> dict[str, float]:
    """Average ``shown``; count tasks (the last dimension), each once in however many particles it is not finite."""
    finite = losses.isfinite().reshape(-1, losses.shape[-1]).all(0)
    return {"loss": float(shown.mean()), "non_finite_tasks": float((~finite).sum())}


def _tangent(geometry: Geometry, params: Params, cotangents: Params) -> Params:
    """Project cotangents on the tangent spaces at ``params``; every manifold's projection is its own adjoint."""
    points, given = geometry.gather(params), geometry.gather(cotangents)
    return geometry.scatter([g.manifold.project(x, v) for g, x, v in zip(geometry.groups, points, given, strict=True)])


def _both(theta: Weights, noise: Weights) -> Weights:
    """Return theta + noise, then theta - noise, ``(2 pairs, ...)``."""
    return {name: torch.cat([value + noise[name], value - noise[name]]).detach() for name, value in theta.items()}


def _spread(carry: Carry, particles: int) -> Carry:
    """Give every particle its copy of a carry."""
    return pytree.tree_map(lambda leaf: leaf.detach().expand(particles, *leaf.shape).contiguous(), carry)


@functools.cache
def _particle_block(loop: InnerLoop, tasks: int) -> _Block:
    """Return the block with one more leading dimension, of particles, on meta-parameters, carry and objectives."""
    block = torch.func.vmap(block_of(replace(loop, compiled=False), tasks), in_dims=(0, 0, None, None))

    def particle_block(theta: Weights, carry: Carry, batches: Batch, data: Data) -> tuple[Carry, Tensor]:
        # A block that saw other strides would be compiled a second time.
        return pytree.tree_map(torch.Tensor.contiguous, block(theta, carry, batches, data))

    return compile_block(particle_block) if loop.compiled else particle_block


def _advance(
    loop: InnerLoop, block: _Block, theta: Weights, carry: Carry, batches: Batch, data: Data
) -> tuple[Carry, list[Tensor]]:
    """Take the steps of ``batches`` block by block; return the carry and the objectives of each block."""
    objectives = []
    for window in windows(loop, batches, range(len(next(iter(batches.values()))))):
        carry, values = block(theta, carry, window, data)
        objectives.append(values)
    return carry, objectives


@torch.no_grad()
def _run_particles(loop: InnerLoop, theta: Weights, carry: Carry, segment: Segment) -> tuple[Carry, Tensor]:
    """Run all particles through the segment; return their carries and losses ``(particles, tasks)``."""
    block = _particle_block(loop, _size(loop, segment.batches)[1])
    carry, objectives = _advance(loop, block, theta, carry, segment.batches, segment.data)
    return carry, torch.func.vmap(functools.partial(_losses, segment))(torch.cat(objectives, dim=1))


def _correlate(weights: Weights, losses: Tensor, sigma: float) -> Weights:
    """Return the mean over pairs of weights (L+ - L-) / 2 sigma^2; losses ``(2 pairs, tasks)``, plus signs first.

    A task that is not finite under one sign is left out of its pair under both, else the pair would not be antithetic;
    the pair's mean is over its other tasks. A pair without any task is left out. Without pairs the result is NaN.
    """
    plus, minus = losses.chunk(2)
    valid = plus.isfinite() & minus.isfinite()
    counts = valid.sum(1)
    # Selected before anything is multiplied: NaN times zero is NaN.
    difference = torch.where(valid, plus - minus, 0.0).sum(1) / counts.clamp(min=1)
    coefficients = difference / (2 * sigma**2 * (counts > 0).sum())
    return {name: torch.tensordot(coefficients.to(value.dtype), value, 1) for name, value in weights.items()}
