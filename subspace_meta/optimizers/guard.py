"""The safeguard of the learned optimizer: it watches the loss, and falls back to plain gradient steps.

Bounded steps keep one update harmless; that a thousand of them lead down is learned, and not promised on a problem
unlike all that was trained on. The guard needs no more than the loss of the mini-batch at each step. It keeps two
running means of it that forget polynomially, so that they look back over a fixed share of the steps so far (Shamir and
Zhang, "Stochastic gradient descent for non-smooth optimization", ICML 2013, use such an average). After a spike of the
loss, and while the short mean is above the long one or above the start by more than the noise, the learned direction
gives way to ``-SAFE_RATE`` times the Riemannian gradient, shortened to columns of mean length ``SAFE_RATE``. Trust
comes back while the loss is calm. A step with a gradient or a loss that is not finite is not taken at all.

Shorter steps where the loss merely stops falling were tried, and are not here: the loss of a mini-batch stops falling
visibly long before the objective does, and where noise is the limit such steps mostly lost more than they gained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

SHORT, LONG = 16.0, 4.0  # the means look back over about t/16 and t/4 steps
RECOVER = 8.0  # of the log trust, by this over t a step
DISTRUST = math.log(4.0)  # one alarm divides the trust by this
LEAST = math.log(1e-5)  # trust, as a logarithm: then the longest learned step is far shorter than a safe one
SPIKE = 8.0  # mean deviations above the short mean
RISE = 3.0  # standard errors of the short mean above the long one
BLIND = 5  # first steps without alarms: there is no deviation yet
SAFE_RATE = 1e-2


class GuardState(NamedTuple):
    """What the guard remembers; all of the shape of the loss (that of one run: a scalar)."""

    step: Tensor
    first: Tensor  # the loss at the start
    short: Tensor
    long: Tensor
    deviation: Tensor  # mean of |value - short|: of the noise, a trend has little part in it
    trust: Tensor  # logarithm of the share of the learned direction, <= 0
    finite: Tensor  # whether the last step was taken


def initial(like: Tensor) -> GuardState:
    """Return the state before the first step: full trust; ``like`` gives dtype and device."""
    zero = like.new_zeros(())
    return GuardState(zero, zero, zero, zero, zero, zero, torch.isfinite(zero))


def finite_runs(value: Tensor, grads: Mapping[str, Tensor]) -> Tensor:
    """Return for each run whether its loss, and the sum of squares of each of its gradients, is finite."""
    finite = torch.isfinite(value)
    for grad in grads.values():
        finite = finite & torch.isfinite(grad.square().reshape(*value.shape, -1).sum(dim=-1))
    return finite


def without_spoiled(grads: Mapping[str, Tensor], finite: Tensor) -> dict[str, Tensor]:
    """Return the gradients, zero in runs that are not finite: so they leave the state finite."""

    def of(grad: Tensor) -> Tensor:
        return torch.where(_per_run(finite, grad.ndim - finite.ndim), grad, torch.zeros_like(grad))

    return {name: of(grad) for name, grad in grads.items()}


def _per_run(x: Tensor, dims: int) -> Tensor:
    return x.reshape((*x.shape, *(1,) * dims))


def watch(state: GuardState, value: Tensor, finite: Tensor) -> GuardState:
    """Take note of the loss at the current parameters, a scalar or one a run.

    Where a run is not finite only its trust falls.
    """
    value = torch.where(finite, value, torch.zeros_like(value)).to(state.short.dtype)
    step = state.step + 1
    short_weight, long_weight = SHORT / (step + SHORT - 1), LONG / (step + LONG - 1)
    first = torch.where(step == 1, value, state.first)
    spike = value - state.short > SPIKE * state.deviation
    short = state.short + short_weight * (value - state.short)
    long = state.long + long_weight * (value - state.long)
    deviation = state.deviation + long_weight * ((value - short).abs() - state.deviation)
    rises = short - long > RISE * deviation * short_weight.sqrt()
    failing = short - first > RISE * deviation
    alarm = (spike | rises | failing) & (step > BLIND)
    trust = (state.trust + torch.where(alarm, -DISTRUST, RECOVER / (step + LONG))).clamp(LEAST, 0.0)
    new = GuardState(step, first, short, long, deviation, trust, finite)
    spoiled = state._replace(trust=(state.trust - DISTRUST).clamp(min=LEAST), finite=finite)
    return GuardState(*(torch.where(finite, a, b) for a, b in zip(new, spoiled, strict=True)))


def blend(state: GuardState, gradient: Tensor, direction: Tensor, factor: Tensor | float, dims: int) -> Tensor:
    """Return the guarded update: the learned one as far as it is trusted, and the safe one for the rest.

    Args:
        state: after :func:`watch`.
        gradient: the Riemannian gradient in coordinates of the metric, ``(..., d, p)``.
        direction, factor: the learned update is their product.
        dims: dimensions of one run's parameter, seen as a matrix: 2, or 3 for a batch of matrices.
    """
    trust = state.trust.exp()
    learned, safe = _per_run(state.finite * trust, dims), _per_run(1 - trust, dims)
    length = gradient.square().sum(dim=-2, keepdim=True).mean(dim=-1, keepdim=True).sqrt()
    return learned * (factor * direction) - safe * (SAFE_RATE / length.clamp(min=1.0)) * gradient


def taken(state: GuardState, x: Tensor, moved: Tensor, dims: int) -> Tensor:
    """Return the points after the step, those before it in runs whose step is not taken; ``dims`` as for blend."""
    return torch.where(_per_run(state.finite, dims), moved, x)
